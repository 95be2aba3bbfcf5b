"""The settings of decoding."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    model_validator,
)

from dparallel.config.base import Config
from dparallel.config.rules import RULES


class DecodingConfig(Config):
    """How a canvas is filled: which blocks are open, which tokens are committed, what is recomputed.

    Args:
        gen_length: response positions, a multiple of `block_length`.
        rule: which of the masked tokens in open blocks a forward commits; always the best one. `steps`
            the most confident on a fixed schedule of `steps` forwards; `confidence` those of
            probability >= `threshold`; `entropy` those of entropy <= `threshold` nats (0.5 unless told);
            `entropy_budget` the surest whose entropies sum to <= `threshold` nats; `margin` those whose
            likeliest token leads the next by >= `threshold`; `stability` those of probability >=
            `threshold` that moved by <= `stability_threshold` nats (KL) since the forward before;
            `dream_entropy`, `dream_maskgit_plus`, `dream_topk_margin` Dream's own sampler: the
            whole response is one block, in `steps` forwards.
        mode: `sequential` opens a block when the one before is full; `multi_block` when
            `block_add_threshold` of it is committed (d3LLM), and the first unfinished block always
            commits a token. Its `decoded_token_threshold`, from which on the next block must advance
            too, is accepted and changes nothing: before the first unfinished block all are full.
            `pipelined` (D2F) is for a block-causal model, which never sees a later block: blocks open as
            in `multi_block`, none behind an end-of-text; a forward commits what the rule chooses, and the
            best of each block whose predecessor has `decoded_token_threshold` committed.
            `autoregressive` is for a causal model: token by token, rule `steps`, `block_length` 1.
        cache: keep keys and values, an approximation for bidirectional models. After a forward over
            everything at a block's start, `prefix` recomputes from the active block on, `dual` the active
            block alone. `multi_block` recomputes everything at every `refresh_every`-th forward, and
            a full block for `settle_rounds` more forwards. `exact`, of `pipelined` and `autoregressive`:
            what no later token can change is computed once.
        stop_at_eos: end a row once an end-of-text token and everything before it are committed; in
            `autoregressive` that is so in any case.
        temperature, top_p, seed: draw tokens instead of taking the likeliest. The same seed and
            prompt give the same tokens, whatever else is in the batch.
        compile: run compiled kernels of fixed shapes, on a GPU as CUDA graphs.
    """

    gen_length: PositiveInt = 256
    block_length: PositiveInt = 32
    rule: str = "entropy"
    threshold: NonNegativeFloat | None = None
    stability_threshold: float | None = Field(None, ge=1e-4)  # float32 tells no less apart
    steps: PositiveInt | None = None
    mode: Literal["sequential", "multi_block", "pipelined", "autoregressive"] = "sequential"
    block_add_threshold: float | None = Field(None, gt=0, le=1)
    decoded_token_threshold: float | None = Field(None, gt=0, le=1)
    cache: Literal["none", "prefix", "dual", "exact"] = "none"
    settle_rounds: PositiveInt | None = None
    refresh_every: PositiveInt | None = None
    stop_at_eos: bool = True
    temperature: NonNegativeFloat = 0.0
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    compile: bool = False

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def looks_back(self) -> bool:
        """Whether no position sees a later block."""
        return self.mode in ("pipelined", "autoregressive")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fill in what the chosen rule, mode and cache need and the caller left out."""
        if not isinstance(data, dict):
            return data
        if data.get("mode") == "autoregressive":
            gen_length = data.get("gen_length", cls.model_fields["gen_length"].default)
            data = {"rule": "steps", "steps": gen_length, "block_length": 1, **data}
        needed: dict[str, Any] = {}
        rule = RULES.get(data.get("rule", "entropy"))
        if rule is not None and rule.whole_response:
            needed["block_length"] = data.get("gen_length", cls.model_fields["gen_length"].default)
        if data.get("rule", "entropy") == "entropy":
            needed["threshold"] = 0.5
        if data.get("rule") == "stability":
            needed["stability_threshold"] = 0.01
        if data.get("mode") == "multi_block":
            needed["block_add_threshold"] = 0.1
            if data.get("cache", "none") != "none":
                needed |= {"settle_rounds": 1, "refresh_every": 8}
        if data.get("mode") in ("pipelined", "autoregressive"):
            needed["cache"] = "exact"
        if data.get("mode") == "pipelined":
            needed |= {"block_add_threshold": 0.1, "decoded_token_threshold": 0.95}
        return data | {key: value for key, value in needed.items() if data.get(key) is None}

    @model_validator(mode="after")
    def _consistent(self) -> "DecodingConfig":
        if self.gen_length % self.block_length:
            raise ValueError(
                f"gen_length={self.gen_length} is not divisible by block_length={self.block_length}; "
                f"the nearest valid gen_length is "
                f"{max(1, round(self.gen_length / self.block_length)) * self.block_length}"
            )
        self._check_rule()
        self._check_mode()
        if self.top_p is not None and self.temperature == 0:
            raise ValueError(
                f"top_p={self.top_p} has no effect at temperature=0.0: raise temperature or drop top_p"
            )
        return self

    def _check_mode(self) -> None:
        if self.mode in ("sequential", "autoregressive"):
            where = f"mode={self.mode!r}"
            needed = "mode='multi_block' or 'pipelined'"
            self._refuse(where, needed, "block_add_threshold", "decoded_token_threshold")
        if self.mode != "multi_block" or self.cache == "none":
            where = f"mode={self.mode!r}, cache={self.cache!r}"
            self._refuse(where, "mode='multi_block' with a cache", "settle_rounds", "refresh_every")
        if self.cache != "none" and (self.cache == "exact") != self.looks_back:
            valid = "'exact' or 'none'" if self.looks_back else "'prefix', 'dual' or 'none'"
            raise ValueError(f"cache={self.cache!r} with mode={self.mode!r}: give {valid}")
        if self.mode == "autoregressive" and (self.block_length, self.rule) != (1, "steps"):
            raise ValueError(
                f"block_length={self.block_length}, rule={self.rule!r} with mode='autoregressive', which "
                "decodes token by token: drop them, or use mode='pipelined'"
            )

    def _check_rule(self) -> None:
        rule = RULES.get(self.rule)
        if rule is None:
            raise ValueError(f"unknown rule={self.rule!r}; known rules: {', '.join(sorted(RULES))}")
        if self.rule != "stability":
            self._refuse(f"rule={self.rule!r}", "rule='stability'", "stability_threshold")
        if rule.scheduled:
            self._check_schedule(rule.whole_response)
            return
        if self.threshold is None or self.steps is not None:
            raise ValueError(
                f"rule={self.rule!r} with threshold={self.threshold}, steps={self.steps}: "
                f"give threshold and no steps"
            )
        limit = rule.threshold_limit
        if limit is not None and self.threshold > limit:
            raise ValueError(
                f"threshold={self.threshold} for rule={self.rule!r} compares probabilities: "
                f"give 0 to {limit:g}"
            )

    def _check_schedule(self, whole_response: bool) -> None:
        if self.steps is None or self.threshold is not None:
            raise ValueError(
                f"rule={self.rule!r} with steps={self.steps}, threshold={self.threshold}: "
                f"give steps (at most gen_length={self.gen_length}) and no threshold"
            )
        if whole_response and self.blocks > 1:
            raise ValueError(
                f"rule={self.rule!r} with block_length={self.block_length}: it knows no blocks; leave "
                f"block_length out or set it to gen_length={self.gen_length}"
            )
        if self.steps > self.gen_length or self.steps % self.blocks:
            raise ValueError(
                f"steps={self.steps} must be a multiple of the {self.blocks} blocks "
                f"(gen_length / block_length) and at most gen_length={self.gen_length}"
            )
        if self.mode not in ("sequential", "autoregressive"):
            raise ValueError(
                f"rule={self.rule!r} with mode={self.mode!r}: its schedule is per block; use "
                "mode='sequential' or a rule with a threshold"
            )

    def _refuse(self, given: str, needed: str, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) is not None:
                raise ValueError(
                    f"{field}={getattr(self, field)} has no effect with {given}: drop it or use {needed}"
                )

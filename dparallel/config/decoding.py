"""The settings of decoding.

What a rule takes stands in `config.rules.RULES`, what a mode takes in `config.modes.MODES`. Both the defaults
that depend on them and the refusals of settings without effect are read from there.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from dparallel.config.base import Config, nearest
from dparallel.config.modes import GEN_LENGTH, MODES
from dparallel.config.rules import RULES

MIN_TEMPERATURE = 1e-6  # float32 tells log-probabilities apart to about 1e-6; far below, 1 / T overflows


class DecodingConfig(Config):
    """How a response is decoded: which blocks are open, which tokens a forward commits, what is cached.

    Args:
        gen_length: response positions, a multiple of `block_length`.
        block_length: positions in a block.
        rule: which masked tokens of the open blocks a forward commits; it always commits the best one.
            `steps`: the most confident ones, on a fixed schedule of `steps` forwards.
            `confidence`: probability >= `threshold`.
            `entropy`: entropy <= `threshold` nats (default 0.5).
            `entropy_budget`: the lowest entropies that sum to <= `threshold` nats.
            `margin`: the likeliest token leads the next by >= `threshold`.
            `stability`: probability >= `threshold`, and a change since the previous forward of
            <= `stability_threshold` nats (KL divergence; default 0.01).
            `dream_entropy`, `dream_maskgit_plus`, `dream_topk_margin`: Dream's own samplers, which
            treat the response as one block and take `steps` forwards.
        mode: how blocks follow each other.
            `sequential`: a block opens when the previous one is full.
            `multi_block` (d3LLM): a block opens when a share `block_add_threshold` (default 0.1) of the
            previous one is committed; the first unfinished block commits a token in every forward.
            d3LLM's `decoded_token_threshold`, from which the next block must commit a token too, is
            accepted and changes nothing: all blocks before the first unfinished one are full.
            `pipelined` (D2F): for a block-causal model, in which no position attends to a later block.
            Blocks open as in `multi_block`, but not after an end-of-sequence token. A forward commits
            what the rule chooses, and the best token of each block whose previous block has a share
            `decoded_token_threshold` (default 0.95) committed.
            `autoregressive`: for a causal model; one token a forward, left to right.
        cache: which keys and values are kept between forwards. `prefix` and `dual` approximate a
            bidirectional model: a forward over everything at the start of a block, then `prefix`
            recomputes from the active block on, `dual` the active block only. `multi_block` recomputes
            everything every `refresh_every` forwards (default 8), and a full block for
            `settle_rounds` more forwards (default 1). `exact`, of `pipelined` and `autoregressive`, and
            their default: what no later token can change is computed once.
        stop_at_eos: end a response once an end-of-sequence token and everything before it are committed;
            always so in `autoregressive`.
        temperature: draw tokens from the distribution at this temperature; 0 takes the likeliest.
        top_p: draw from the likeliest tokens of this total probability only.
        seed: of the draws. The same seed and prompt give the same tokens, whatever else is in the batch.
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
        """Whether no position attends to a later block."""
        return self.mode in ("pipelined", "autoregressive")

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule not in RULES:
            hint = nearest(rule, list(RULES))
            raise ValueError(f"unknown rule={rule!r}; {hint}known rules: {', '.join(RULES)}")
        return rule

    @model_validator(mode="after")
    def _complete_and_consistent(self) -> "DecodingConfig":
        mode = MODES[self.mode]
        self._fill_in({"cache": mode.caches[0], **mode.fixed})
        self._fill_in({**self._own_settings(), **self._fixed()})
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Set what the user left out; this is still part of the construction of frozen settings."""
        for field, default in defaults.items():
            if field not in self.model_fields_set or getattr(self, field) is None:
                self.__dict__[field] = self._value(default)

    def _value(self, entry: Any) -> Any:
        return self.gen_length if entry == GEN_LENGTH else entry

    def _fixed(self) -> dict[str, Any]:
        """The settings that have one valid value with the chosen rule and mode."""
        whole = {"block_length": GEN_LENGTH} if RULES[self.rule].whole_response else {}
        return {**MODES[self.mode].fixed, **whole}

    def _own_settings(self) -> dict[str, Any]:
        """The settings that the chosen rule, mode and cache take and others do not; their defaults."""
        mode = MODES[self.mode]
        return {**RULES[self.rule].settings, **mode.defaults, **(mode.cached if self.cache != "none" else {})}

    def _problems(self) -> Iterator[str]:
        yield from self._wrong_choices()
        yield from self._without_effect()
        yield from self._wrong_numbers()

    def _wrong_choices(self) -> Iterator[str]:
        """Values that exclude each other."""
        mode = MODES[self.mode]
        for field, entry in self._fixed().items():
            if getattr(self, field) != self._value(entry):
                kind = "mode" if field in mode.fixed else "rule"
                valid = f"gen_length={self.gen_length}" if entry == GEN_LENGTH else repr(entry)
                yield (
                    f"{field}={getattr(self, field)!r} with {kind}={getattr(self, kind)!r}: there it always "
                    f"is {valid}; drop it or use another {kind}"
                )
        if self.cache not in mode.caches:
            yield f"cache={self.cache!r} with mode={self.mode!r}: give {_any_of(mode.caches)}"
        if RULES[self.rule].scheduled and not mode.scheduled:
            yield (
                f"rule={self.rule!r} with mode={self.mode!r}: its schedule is per block; use "
                "mode='sequential' or a rule with a threshold"
            )

    def _without_effect(self) -> Iterator[str]:
        """Settings of another rule, mode or cache."""
        rule, mode, cache = f"rule={self.rule!r}", f"mode={self.mode!r}", f"cache={self.cache!r}"
        for chosen, needed, takers in (
            (rule, "rule={}", {name: rule.settings for name, rule in RULES.items()}),
            (mode, "mode={}", {name: mode.defaults for name, mode in MODES.items()}),
            (f"{mode}, {cache}", "mode={} with a cache", {name: mode.cached for name, mode in MODES.items()}),
        ):
            for field in {field: None for settings in takers.values() for field in settings}:
                value = getattr(self, field)
                if value is not None and field not in self._own_settings():
                    valid = needed.format(_any_of(name for name in takers if field in takers[name]))
                    yield f"{field}={value} has no effect with {chosen}: drop it or use {valid}"
        if self.top_p is not None and self.temperature == 0:
            yield f"top_p={self.top_p} has no effect at temperature=0.0: raise temperature or drop top_p"

    def _wrong_numbers(self) -> Iterator[str]:
        rule = RULES[self.rule]
        if self.gen_length % self.block_length:
            nearest_length = max(1, round(self.gen_length / self.block_length)) * self.block_length
            yield (
                f"gen_length={self.gen_length} is not divisible by block_length={self.block_length}; "
                f"the nearest valid gen_length is {nearest_length}"
            )
        for field in rule.settings:
            if getattr(self, field) is None:
                most = f" (at most gen_length={self.gen_length})" if rule.scheduled else ""
                yield f"rule={self.rule!r} with {field}=None: give {field}{most}"
        if self.steps is not None and (self.steps > self.gen_length or self.steps % self.blocks):
            yield (
                f"steps={self.steps} must be a multiple of the {self.blocks} blocks "
                f"(gen_length / block_length) and at most gen_length={self.gen_length}"
            )
        limit = rule.threshold_limit
        if self.threshold is not None and limit is not None and self.threshold > limit:
            yield (
                f"threshold={self.threshold} for rule={self.rule!r} compares probabilities: "
                f"give 0 to {limit:g}"
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            yield (
                f"temperature={self.temperature} is too small to draw tokens in float32: give at least "
                f"{MIN_TEMPERATURE}, or 0 to take the likeliest ones"
            )


def _any_of(names: Iterable[str]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last

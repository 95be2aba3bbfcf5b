"""Every setting of every stage, as frozen models; `config_files` reads them from YAML.

An unknown key, a wrong type or a combination that makes no sense is a `ConfigError` that names
the key, the value and what would be valid, before any work starts.
"""

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

# Becomes part of folder names, metric names and registered models.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, why and what to write."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


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
        cache: keep keys and values, an approximation for bidirectional models. After a forward over
            everything at a block's start, `prefix` recomputes from the active block on, `dual` the active
            block alone. `multi_block` recomputes everything at every `refresh_every`-th forward, and
            a full block for `settle_rounds` more forwards.
        stop_at_eos: end a row once an end-of-text token and everything before it are committed.
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
    mode: Literal["sequential", "multi_block"] = "sequential"
    block_add_threshold: float | None = Field(None, gt=0, le=1)
    decoded_token_threshold: float | None = Field(None, gt=0, le=1)
    cache: Literal["none", "prefix", "dual"] = "none"
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

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fill in what the chosen rule, mode and cache need and the caller left out."""
        if not isinstance(data, dict):
            return data
        from dparallel.decoding.rules import RULES

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
        if self.mode == "sequential":
            self._refuse(
                "mode='sequential'", "mode='multi_block'", "block_add_threshold", "decoded_token_threshold"
            )
        if self.mode == "sequential" or self.cache == "none":
            where = f"mode={self.mode!r}, cache={self.cache!r}"
            self._refuse(where, "mode='multi_block' with a cache", "settle_rounds", "refresh_every")
        if self.top_p is not None and self.temperature == 0:
            raise ValueError(
                f"top_p={self.top_p} has no effect at temperature=0.0: raise temperature or drop top_p"
            )
        return self

    def _check_rule(self) -> None:
        from dparallel.decoding.rules import RULES  # here, since decoding itself reads settings

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
                f"threshold={self.threshold} for rule={self.rule!r} compares probabilities: give 0 to {limit:g}"
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
        if self.mode != "sequential":
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


class SourceConfig(Config):
    """One data set: files, a folder, or a name on the hub.

    Args:
        path: a JSONL, JSON or Parquet file (or a pattern such as `data/*.parquet`), a folder of them, or
            a name on the hub such as `openai/gsm8k`.
        subset, split, revision: which part of a hub data set or a folder; any of them may be sliced,
            `train[:500]`. Of a file only the slice of `split` matters.
        prompt: a format string over the columns; write `{{` for a brace.
        reference, id: columns; None takes those of these names where there are any.
        count: how many rows; the first ones, or drawn by `seed`.
    """

    path: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str = "{prompt}"
    reference: str | None = None
    id: str | None = None
    count: PositiveInt | None = None
    seed: NonNegativeInt | None = None

    @property
    def prompt_columns(self) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None]

    @property
    def label(self) -> str:
        """Its name in messages and records."""
        part = [self.subset, None if self.split == "train" else self.split]
        return " ".join([self.path, *filter(None, part)])

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        try:
            columns = self.prompt_columns
        except ValueError as error:
            raise ValueError(f"prompt={self.prompt!r}: {error}; write {{{{ and }}}} for braces") from error
        if not all(columns) or not columns:
            raise ValueError(f"prompt={self.prompt!r} must name the columns it is made of, as {{question}}")
        if self.seed is not None and self.count is None:
            raise ValueError(f"seed={self.seed} draws count rows: give count, or drop seed")
        return self


class ProblemsConfig(Config):
    """Which problems, how they become prompts, and how a response is scored.

    Args:
        benchmark: `coins` is generated, from `split`, `count` and `seed`; `dataset` reads `sources`, one
            after another.
        chat: the problem is a user's turn, in the checkpoint's own chat template; else the prompt is
            the text as it is.
        chat_template: file of a Jinja template, for a checkpoint that brings none.
        scoring: of data sets. `exact`: the response is the reference; `flexible_extract`: its last
            number is the reference's final answer.
    """

    benchmark: Literal["coins", "dataset"]
    split: Literal["train", "distillation", "validation", "test"] = "train"
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    sources: tuple[SourceConfig, ...] = ()
    chat: bool = False
    chat_template: str | None = None
    scoring: Literal["exact", "flexible_extract"] = "exact"

    @model_validator(mode="after")
    def _consistent(self) -> "ProblemsConfig":
        if self.benchmark == "dataset":
            if not self.sources:
                raise ValueError("benchmark='dataset' needs sources: a list of data sets, each with its path")
            if (self.split, self.count, self.seed) != ("train", None, 0):
                raise ValueError(
                    f"benchmark='dataset' with split={self.split!r}, count={self.count}, seed={self.seed}: "
                    "give them to each of its sources"
                )
        elif self.sources or self.count is None or self.scoring != "exact":
            raise ValueError(
                f"benchmark='coins' with count={self.count}, {len(self.sources)} sources, "
                f"scoring={self.scoring!r}: it is generated and has its own score, so give count alone"
            )
        if self.chat_template is not None and not self.chat:
            raise ValueError(f"chat_template={self.chat_template!r} has no effect with chat=false")
        return self


class TrajectoriesConfig(Config):
    """Record how the teacher decodes. Every decoded row is kept, right or wrong."""

    problems: ProblemsConfig
    decoding: DecodingConfig
    shard_size: PositiveInt = 500
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _repeatable(self) -> "TrajectoriesConfig":
        if self.decoding.temperature > 0 and self.decoding.seed is None:
            raise ValueError(
                f"decoding.temperature={self.decoding.temperature} without decoding.seed: "
                "give a seed, else a resumed recording would differ"
            )
        return self


class RecipeConfig(Config):
    """What one distillation sample looks like and what its loss is.

    Args:
        region: mask inside one `block` (earlier clean, later all masks) or the whole `response`.
        masking: `random` masks each position with probability `mask_ratio`; `trajectory` masks
            what the teacher committed at or after a uniformly drawn point of its own order.
        complement: a second view that masks the rest of the region (`random` only).
        certainty_weight, certainty_temperature: lambda and T of the entropy term, over masked
            positions whose argmax already is the teacher's token.
        eos_region_ratio: how often a region that holds nothing but padding after the first EOS
            is sampled, against a region with content.
    """

    region: Literal["block", "response"] = "block"
    block_length: PositiveInt | None = None
    masking: Literal["random", "trajectory"]
    mask_ratio: float = Field(0.5, gt=0, le=1)
    complement: bool = False
    certainty_weight: NonNegativeFloat = 0.0
    certainty_temperature: PositiveFloat = 0.5
    eos_region_ratio: float = Field(0.1, ge=0, le=1)

    @property
    def views(self) -> int:
        return 2 if self.complement else 1

    @model_validator(mode="after")
    def _consistent(self) -> "RecipeConfig":
        if (self.region == "block") != (self.block_length is not None):
            raise ValueError(
                f"region={self.region!r} with block_length={self.block_length}: "
                "give block_length for region='block', and only there"
            )
        if self.masking == "trajectory" and self.complement:
            raise ValueError(
                "masking='trajectory' with complement=true: the complement of a trajectory's "
                "future is a canvas that decoding never meets; set complement: false"
            )
        return self


class LoraSettings(Config):
    """`targets` must each match in every layer."""

    rank: PositiveInt = 32
    alpha: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0


class TrainingConfig(Config):
    """Distil by LoRA. One train step reads `views_per_step` canvases over all processes.

    Args:
        views_per_step: rows that go through the model in one train step; a recipe with a
            complement view draws half as many samples, so recipes compare at equal compute.
        micro_batch_size: views per forward and process; the rest is gradient accumulation.
        max_length: prompt + response tokens; longer trajectories are left out and counted.
        only_correct: train on trajectories that were scored as correct.
        precision: `auto` is bf16 on GPUs that have it, else fp32.
        gradient_checkpointing: keep each layer's input alone and compute the layer again backwards.
        quantization: `nf4` holds the base's matrices in 4 bits; the adapter is trained as ever.
        deepspeed: ZeRO settings; batch sizes, clipping and precision are filled in.
    """

    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerConfig
    train_steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    views_per_step: PositiveInt = 64
    micro_batch_size: PositiveInt = 64
    max_length: PositiveInt | None = None
    only_correct: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    quantization: Literal["nf4"] | None = None
    deepspeed: dict[str, Any] = {}
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if (self.train_steps is None) == (self.epochs is None):
            raise ValueError(
                f"train_steps={self.train_steps}, epochs={self.epochs}: give exactly one of them"
            )
        return self


class MergingConfig(Config):
    """Merge the adapter; the merged logits must equal base + adapter on real prompts.

    `format` is that of the merged model: our own (`native`), that of the teacher's publishers
    (`original`), or whichever of them the teacher is in (`auto`).
    """

    format: Literal["auto", "native", "original"] = "auto"
    check_prompts: PositiveInt = 8
    tolerance: PositiveFloat = 1e-4


class Sweep(Config):
    """One decoding at several thresholds."""

    decoding: DecodingConfig
    thresholds: tuple[NonNegativeFloat, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_threshold_makes_sense(self) -> "Sweep":
        try:
            self.decodings()
        except ValidationError as error:
            raise ValueError(plain_message(error.errors()[0])) from error
        return self

    def decodings(self) -> list[DecodingConfig]:
        settings = self.decoding.model_dump()
        return [DecodingConfig(**{**settings, "threshold": each}) for each in self.thresholds]


class BenchmarkConfig(Config):
    """Measure teacher and students; thresholds are chosen on validation, reported on test.

    Args:
        reference: the decoding every loss of accuracy is counted from: one token per step.
        fixed: further decodings of the teacher by name, such as few-step.
        sweeps: thresholds by name; each sweep's operating point is the one of highest TPF among
            those that lose at most `max_loss` of the reference's accuracy on the validation problems.
        teacher_sweeps, student_sweeps: which of them each kind of model is measured with.
        sweep_test: also decode the whole sweep on the test problems (for AUP and the picture);
            otherwise these come from the validation problems, and say so, and a sweep of the
            teacher is decoded there only from its operating point to one that keeps the accuracy.
    """

    test: ProblemsConfig
    validation: ProblemsConfig
    reference: DecodingConfig
    fixed: dict[Name, DecodingConfig] = {}
    sweeps: dict[Name, Sweep]
    teacher_sweeps: tuple[str, ...] = Field(min_length=1)
    student_sweeps: tuple[str, ...] = Field(min_length=1)
    max_loss: NonNegativeFloat = 0.01
    sweep_test: bool = False
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _consistent(self) -> "BenchmarkConfig":
        unknown = {*self.teacher_sweeps, *self.student_sweeps} - set(self.sweeps)
        if unknown:
            raise ValueError(f"unknown sweep {sorted(unknown)}; sweeps defines {sorted(self.sweeps)}")
        twice = sorted(set(self.fixed) & set(self.sweeps))
        if twice:
            raise ValueError(f"{twice[0]!r} names a fixed decoding and a sweep; rename one of them")
        return self


class LaunchConfig(Config):
    """How work is spread over processes and machines; changes where it runs, not what it computes.

    Args:
        processes: of training, at most one for each GPU of the machine.
        hostfile: train on several machines: lines of `HOST slots=N`, a process for each slot.
        parts: how many runs share the missing shards where trajectories are recorded on a work pool;
            any number of workers picks them up, so several parts for each GPU even out.
    """

    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    processes: PositiveInt = 1
    hostfile: str | None = None
    parts: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> "LaunchConfig":
        if self.hostfile is not None and self.launcher != "deepspeed":
            raise ValueError(
                f"hostfile={self.hostfile!r} with launcher={self.launcher!r}: only launcher: deepspeed "
                "reads a hostfile"
            )
        if self.hostfile is not None and self.processes != 1:
            raise ValueError(
                f"processes={self.processes} with hostfile={self.hostfile!r}: the slots of its hosts say "
                "how many processes there are; drop processes"
            )
        return self


class DistillConfig(Config):
    """One experiment: a teacher, one student per recipe, and how they are compared."""

    name: Name
    teacher: str
    runs: str = "runs"
    trajectories: TrajectoriesConfig
    training: TrainingConfig
    students: dict[Name, RecipeConfig] = Field(min_length=1)
    merging: MergingConfig = MergingConfig()
    benchmark: BenchmarkConfig
    launch: LaunchConfig = LaunchConfig()


class TeacherConfig(Config):
    """The tiny teacher, trained from scratch."""

    out: str
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 320
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    max_position_embeddings: PositiveInt = 64
    train_steps: PositiveInt
    batch_size: PositiveInt = 64
    block_length: PositiveInt = 12
    seed: NonNegativeInt = 0
    check_problems: PositiveInt = 200
    min_accuracy: float = Field(0.97, ge=0, le=1)


def plain_message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ")

"""Every setting of every stage, as frozen models; `config.files` reads them from YAML.

An unknown key, a wrong type or a combination that makes no sense is a `ConfigError` that names
the key, the value and what would be valid, before any work starts.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dparallel.config.base import HOW, Config, ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.config.recipe import RecipeConfig

__all__ = ["ConfigError", "DecodingConfig", "RecipeConfig"]  # from where all settings are

# Becomes part of folder names, metric names and registered models.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes no larger one

CodeDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class TrajectoriesConfig(Config):
    """Record how the teacher decodes. Every decoded row is kept, right or wrong."""

    problems: ProblemsConfig
    decoding: DecodingConfig
    shard_size: Annotated[PositiveInt, HOW] = 500
    batch_size: Annotated[PositiveInt, HOW] = 64

    @model_validator(mode="after")
    def _repeatable(self) -> "TrajectoriesConfig":
        if self.decoding.temperature > 0 and self.decoding.seed is None:
            raise ValueError(
                f"decoding.temperature={self.decoding.temperature} without decoding.seed: "
                "give a seed, else a resumed recording would differ"
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
    micro_batch_size: Annotated[PositiveInt, HOW] = 64
    max_length: PositiveInt | None = None
    only_correct: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: Annotated[bool, HOW] = False
    quantization: Literal["nf4"] | None = None
    deepspeed: Annotated[dict[str, Any], HOW] = {}
    log_every: Annotated[PositiveInt, HOW] = 10
    checkpoint_every: Annotated[PositiveInt, HOW] = 100
    seed: Seed = 0

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
        self.decodings()
        return self

    def decodings(self) -> list[DecodingConfig]:
        settings = self.decoding.model_dump()
        return [DecodingConfig(**{**settings, "threshold": each}) for each in self.thresholds]


SweepNames = Annotated[tuple[str, ...], Field(min_length=1)]


class Baseline(Config):
    """A model of another kind, such as an autoregressive one, and how it is decoded."""

    model: str
    decoding: DecodingConfig


class BenchmarkConfig(Config):
    """Measure teacher and students; thresholds are chosen on validation, reported on test.

    Args:
        reference: the decoding every loss of accuracy is counted from: one token per step.
        fixed: further decodings of the teacher by name, such as few-step.
        sweeps: thresholds by name; each sweep's operating point is the one of highest TPF among
            those that lose at most `max_loss` of the reference's accuracy on the validation problems.
        teacher_sweeps, student_sweeps: which of them each kind of model is measured with; for students
            that are decoded in different ways, a list for each of them by name.
        baselines: models of other kinds, measured on the same problems and chosen by nothing.
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
    student_sweeps: SweepNames | dict[Name, SweepNames]
    baselines: dict[Name, Baseline] = {}
    max_loss: NonNegativeFloat = 0.01
    sweep_test: bool = False
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _consistent(self) -> "BenchmarkConfig":
        unknown = {*self.teacher_sweeps, *self.all_student_sweeps} - set(self.sweeps)
        if unknown:
            raise ValueError(f"unknown sweep {sorted(unknown)}; sweeps defines {sorted(self.sweeps)}")
        twice = sorted(set(self.fixed) & set(self.sweeps))
        if twice:
            raise ValueError(f"{twice[0]!r} names a fixed decoding and a sweep; rename one of them")
        return self

    @property
    def all_student_sweeps(self) -> tuple[str, ...]:
        """Those that some student is measured with."""
        if isinstance(self.student_sweeps, dict):
            return tuple(dict.fromkeys(name for names in self.student_sweeps.values() for name in names))
        return self.student_sweeps

    def sweeps_of(self, student: str) -> tuple[str, ...]:
        """Those that one student is measured with."""
        return self.student_sweeps[student] if isinstance(self.student_sweeps, dict) else self.student_sweeps

    def check_students(self, students: Iterable[str]) -> None:
        """Raise a ConfigError unless there is a list of sweeps for each student and for nobody else."""
        if isinstance(self.student_sweeps, dict) and set(self.student_sweeps) != set(students):
            raise ConfigError(
                f"benchmark.student_sweeps lists {', '.join(self.student_sweeps)}; the students are "
                f"{', '.join(students)}: give a list for each of them, or one list for all"
            )


class LaunchConfig(Config):
    """How work is spread over processes and machines; changes where it runs, not what it computes.

    Args:
        processes: of training, at most one for each GPU of the machine.
        hostfile: train on several machines: lines of `HOST slots=N`, a process for each slot.
        parts: how many runs share what is missing where trajectories are recorded, or a benchmark is
            measured, on a work pool; any number of workers picks them up, so several for each GPU even out.
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
    """One experiment: a teacher, one student per recipe, and how they are compared.

    Args:
        code: digests of code by stage. A stage named here keeps the result of that code, as its
            `manifest.json` names it: you vouch that later changes of the code would not have changed it.
    """

    name: Name
    teacher: str
    runs: str = "runs"
    code: dict[Literal["trajectories", "training", "merging"], CodeDigest] = {}
    trajectories: TrajectoriesConfig
    training: TrainingConfig
    students: dict[Name, RecipeConfig] = Field(min_length=1)
    merging: MergingConfig = MergingConfig()
    benchmark: BenchmarkConfig
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DistillConfig":
        self.benchmark.check_students(self.students)
        return self


class TeacherConfig(Config):
    """The tiny teacher, trained from scratch, or a model of its shape that predicts the next token.

    Args:
        block_length: of `diffusion` (12 unless told): the blocks in which half of the training rows and the
            check at the end are filled.
    """

    out: str
    # Left out where it is the default, so that a finished teacher's settings stay what its folder states.
    objective: Literal["diffusion", "autoregressive"] = Field(
        "diffusion", exclude_if=lambda objective: objective == "diffusion"
    )
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 320
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    max_position_embeddings: PositiveInt = 64
    train_steps: PositiveInt
    batch_size: PositiveInt = 64
    block_length: PositiveInt | None = None
    seed: Seed = 0
    check_problems: PositiveInt = 200
    min_accuracy: float = Field(0.97, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("objective", "diffusion") != "diffusion":
            return data
        return data if data.get("block_length") is not None else data | {"block_length": 12}

    @model_validator(mode="after")
    def _consistent(self) -> "TeacherConfig":
        if self.objective == "autoregressive" and self.block_length is not None:
            raise ValueError(
                f"block_length={self.block_length} with objective='autoregressive', which knows no blocks: "
                "drop block_length"
            )
        return self

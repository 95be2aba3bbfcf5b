"""Every setting of every stage, as frozen models; `config.files` reads them from YAML.

An unknown key, a wrong type or a combination that makes no sense is a `ConfigError` that names
the key, the value and what would be valid, before any work starts.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from dparallel.config.base import HOW, LIST, SECTION, Config, ConfigError, LocalPath, form
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import COINS_LIMIT, ProblemsConfig
from dparallel.config.recipe import RecipeConfig

__all__ = ["ConfigError", "DecodingConfig", "RecipeConfig"]  # from where all settings are

# Becomes part of folder names, metric names and registered models.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes no larger one

CodeDigest = Annotated[str, Field(pattern=r"^c[0-9a-f]{11}$")]


def _refuse_unrepeatable(decodings: Mapping[str, DecodingConfig]) -> None:
    """Raise unless decoding again gives the same tokens; the keys say which settings these are."""
    for place, decoding in decodings.items():
        if decoding.temperature > 0 and decoding.seed is None:
            raise ValueError(
                f"{place}.temperature={decoding.temperature} without {place}.seed: give a seed; otherwise a "
                "stage that was interrupted would go on with other draws"
            )


def _refuse_same_names(names: Iterable[tuple[str, str]]) -> None:
    """Raise if two of (what is named, its name) have names that differ in upper and lower case at most."""
    seen: dict[str, str] = {}
    for what, name in names:
        if other := seen.get(name.lower()):
            raise ValueError(
                f"{what} {name!r} and {other} have the same name in folders and metrics; rename one of them"
            )
        seen[name.lower()] = f"{what} {name!r}"


class TrajectoriesConfig(Config):
    """Record how the teacher decodes. Every response is kept, right or wrong.

    Args:
        shard_size: responses in a file.
        batch_size: responses decoded together.
    """

    problems: ProblemsConfig
    decoding: DecodingConfig
    shard_size: Annotated[PositiveInt, HOW] = 500
    batch_size: Annotated[PositiveInt, HOW] = 64

    @model_validator(mode="after")
    def _repeatable(self) -> "TrajectoriesConfig":
        _refuse_unrepeatable({"decoding": self.decoding})
        return self


class LoraSettings(Config):
    """The adapter: low-rank updates of weight matrices.

    Args:
        rank: of an update.
        alpha: updates are scaled by alpha / rank.
        dropout: probability, on the input of an update.
        targets: names of the matrices; every name must match one in every layer.
    """

    rank: PositiveInt = 32
    alpha: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its learning rate over the training.

    Args:
        learning_rate: at its peak.
        schedule: after the warm-up: constant, or falling to 0 in a line or half a cosine.
        warmup_ratio: share of the train steps over which the rate rises from 0.
        max_grad_norm: longer gradients are scaled down to this norm.
    """

    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0


class TrainingConfig(Config):
    """Distil with LoRA. A train step reads `views_per_step` canvases over all processes.

    Args:
        train_steps: length of the training, or
        epochs: that length in passes over the trajectories.
        views_per_step: canvases that go through the model in a train step; a recipe with a
            complement view draws half as many samples, so that recipes compare at equal compute.
        micro_batch_size: canvases per forward and process; the rest is gradient accumulation.
        max_length: prompt + response tokens; longer trajectories are left out and counted.
        only_correct: train only on trajectories that were scored as correct.
        precision: `auto` is bf16 on GPUs that support it, otherwise fp32.
        gradient_checkpointing: keep only the input of every layer, and compute the layer again in the
            backward pass.
        quantization: `nf4` stores the base model's matrices in 4 bits; the adapter stays as it is.
        deepspeed: DeepSpeed's ZeRO settings; batch sizes, clipping and precision are filled in.
        log_every: train steps between two lines of the metrics log.
        checkpoint_every: train steps between two checkpoints, from which a training resumes.
        seed: of samples, masks and initial weights of the adapter.
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
    """Merge the adapter; the merged model's logits must equal those of base and adapter on real prompts.

    Args:
        format: of the merged model: our own (`native`), that of the teacher's publishers (`original`), or
            the one that the teacher is in (`auto`).
        check_prompts: how many prompts are compared.
        tolerance: largest difference of logits that counts as equal.
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
        return [DecodingConfig(**{**settings, "threshold": threshold}) for threshold in self.thresholds]


SweepNames = Annotated[tuple[str, ...], Field(min_length=1)]


class Baseline(Config):
    """A model of another kind, such as an autoregressive one, and how it is decoded.

    Args:
        model: its folder or its name on the hub.
    """

    model: LocalPath
    decoding: DecodingConfig


class BenchmarkConfig(Config):
    """Measure teacher and students; thresholds are chosen on validation problems, reported on test problems.

    Args:
        reference: the teacher's decoding that losses of accuracy are measured against: one token per step.
        fixed: further decodings of the teacher by name, such as one with few steps.
        sweeps: decodings at several thresholds, by name. A sweep's operating point is the threshold of
            highest TPF (tokens per forward) among those that lose at most `max_loss` of the reference's
            accuracy on the validation problems.
        teacher_sweeps: the sweeps that the teacher is measured with.
        student_sweeps: the sweeps that students are measured with; one list for all, or a list for every
            student by name.
        baselines: models of other kinds, by name; measured on the same problems, without any choice.
        max_loss: 0.01 is one percentage point.
        sweep_test: also decode all sweeps on the test problems, for AUP and the plot. Otherwise these come
            from the validation problems, and say so; on the test problems, a sweep of the teacher is
            then decoded only from its operating point to one that keeps the accuracy.
        batch_size: responses decoded together.
    """

    test: ProblemsConfig
    validation: ProblemsConfig
    reference: DecodingConfig
    fixed: dict[Name, DecodingConfig] = {}
    sweeps: dict[Name, Sweep]
    teacher_sweeps: tuple[str, ...] = Field(min_length=1)
    student_sweeps: Annotated[
        Annotated[SweepNames, Tag(LIST)] | Annotated[dict[Name, SweepNames], Tag(SECTION)],
        Discriminator(form, "wrong_form", "Give a list of sweeps, or such a list for every student by name"),
    ]
    baselines: dict[Name, Baseline] = {}
    max_loss: NonNegativeFloat = 0.01
    sweep_test: bool = False
    batch_size: Annotated[PositiveInt, HOW] = 64

    @model_validator(mode="after")
    def _consistent(self) -> "BenchmarkConfig":
        unknown = {*self.teacher_sweeps, *self.all_student_sweeps} - set(self.sweeps)
        if unknown:
            raise ValueError(f"unknown sweep {sorted(unknown)}; sweeps defines {sorted(self.sweeps)}")
        methods = [("the reference", self.reference_name)]
        methods += [("fixed", name) for name in self.fixed] + [("sweeps", name) for name in self.sweeps]
        _refuse_same_names(methods + ([("the baselines' method", "baseline")] if self.baselines else []))
        _refuse_same_names(("baselines", name) for name in self.baselines)
        decodings = {"reference": self.reference}
        decodings |= {f"fixed.{name}": decoding for name, decoding in self.fixed.items()}
        decodings |= {f"sweeps.{name}.decoding": sweep.decoding for name, sweep in self.sweeps.items()}
        decodings |= {f"baselines.{name}.decoding": rival.decoding for name, rival in self.baselines.items()}
        _refuse_unrepeatable(decodings)
        return self

    @property
    def reference_name(self) -> str:
        """The method of the reference's rows in tables and metrics."""
        one_token = self.reference.steps == self.reference.gen_length
        return "one_token_per_step" if one_token else "reference"

    @property
    def all_student_sweeps(self) -> tuple[str, ...]:
        """The sweeps that any student is measured with."""
        if isinstance(self.student_sweeps, dict):
            return tuple(dict.fromkeys(name for names in self.student_sweeps.values() for name in names))
        return self.student_sweeps

    def sweeps_of(self, student: str) -> tuple[str, ...]:
        """The sweeps that one student is measured with."""
        return self.student_sweeps[student] if isinstance(self.student_sweeps, dict) else self.student_sweeps

    def check_students(self, students: Iterable[str]) -> None:
        """Raise a ConfigError unless there is a list of sweeps for every student and for no other."""
        if isinstance(self.student_sweeps, dict) and set(self.student_sweeps) != set(students):
            raise ConfigError(
                f"benchmark.student_sweeps lists {', '.join(self.student_sweeps)}; the students are "
                f"{', '.join(students)}: give a list for every student, or one list for all"
            )


class LaunchConfig(Config):
    """How work is distributed over processes and machines; changes where it runs, not what it computes.

    Args:
        launcher: of the training processes.
        processes: training processes, at most one for every GPU of the machine.
        hostfile: train on several machines: a file with lines of `HOST slots=N`, one process for every slot.
        parts: how many runs share the work of recording trajectories or measuring on a work pool. Any
            number of workers takes them in turn, so several parts for every GPU balance the load.
    """

    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    processes: PositiveInt = 1
    hostfile: LocalPath | None = None
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
        name: of the experiment, in folders and in MLflow.
        teacher: a checkpoint's folder or its name on the hub.
        runs: folder of all results.
        code: digests of code by stage. A stage named here keeps the result of that code, as its
            `manifest.json` names it: you vouch that later changes of the code would not have changed it.
        students: their recipes, by name.
    """

    name: Name
    teacher: LocalPath
    runs: LocalPath = "runs"
    code: dict[Literal["trajectories", "training", "merging"], CodeDigest] = {}
    trajectories: TrajectoriesConfig
    training: TrainingConfig
    students: dict[Name, RecipeConfig] = Field(min_length=1)
    merging: MergingConfig = MergingConfig()
    benchmark: BenchmarkConfig
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DistillConfig":
        _refuse_same_names(("students", name) for name in self.students)
        self.benchmark.check_students(self.students)
        return self


class TeacherConfig(Config):
    """The embedded teacher, trained from scratch, or a model of its shape that predicts the next token.

    Args:
        out: folder of the model.
        objective: `diffusion`, or `autoregressive` for the model that predicts the next token.
        block_length: of `diffusion` (default 12): the blocks in which half of the training rows, and the
            responses of the final check, are filled.
        check_problems: how many problems are solved at the end.
        min_accuracy: a lower share of solved problems is an error.
    """

    out: LocalPath
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
    check_problems: PositiveInt = Field(default=200, le=COINS_LIMIT)
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
                f"block_length={self.block_length} with objective='autoregressive', which has no blocks: "
                "drop block_length"
            )
        return self

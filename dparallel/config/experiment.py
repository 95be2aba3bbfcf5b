"""Settings of all stages as frozen models; `config.files` loads them from YAML.

Unknown keys, wrong types and invalid combinations raise a `ConfigError` before any work starts. It names
the key, the value and what would be valid.
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
from dparallel.config.problems import ProblemsConfig
from dparallel.config.recipe import RecipeConfig

__all__ = [
    "ConfigError",
    "DecodingConfig",
    "RecipeConfig",
]  # re-exported: all settings are imported from here

# Used in folder names, metric names and names of registered models, which have at most 255 characters.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of torch's seeds

CodeDigest = Annotated[str, Field(pattern=r"^c[0-9a-f]{11}$")]


def _refuse_unrepeatable(decodings: Mapping[str, DecodingConfig]) -> None:
    """Raise if a decoding samples without a seed; `decodings` is keyed by the setting's name."""
    for place, decoding in decodings.items():
        if decoding.temperature > 0 and decoding.seed is None:
            raise ValueError(
                f"{place}.temperature={decoding.temperature} without {place}.seed: give a seed; otherwise a "
                "stage that was interrupted would go on with other draws"
            )


def _refuse_same_names(names: Iterable[tuple[str, str]]) -> None:
    """Raise if two names are equal up to case; `names` holds pairs (description, name)."""
    seen: dict[str, str] = {}
    for what, name in names:
        if other := seen.get(name.lower()):
            raise ValueError(
                f"{what} {name!r} and {other} have the same name in folders and metrics; rename one of them"
            )
        seen[name.lower()] = f"{what} {name!r}"


class TrajectoriesConfig(Config):
    """Record teacher trajectories. All responses are kept, correct or not.

    Args:
        problems: the problems the teacher responds to.
        decoding: how the teacher decodes.
        shard_size: responses per file.
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
    """The LoRA adapter.

    Args:
        rank: rank of the low-rank updates.
        alpha: updates are scaled by alpha / rank.
        dropout: dropout probability on the adapter's input.
        targets: names of the adapted weight matrices; each name must match a matrix in every layer.
    """

    rank: PositiveInt = 32
    alpha: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its learning rate schedule.

    Args:
        learning_rate: peak learning rate.
        schedule: after the warm-up: constant, or decay to 0, linear or cosine.
        warmup_ratio: fraction of the train steps with linear warm-up from 0.
        betas: AdamW's decay rates of the first and second moment.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: gradients are clipped to this norm.
    """

    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0


class TrainingConfig(Config):
    """LoRA distillation. A train step processes `views_per_step` canvases over all processes.

    Args:
        lora: the adapter.
        optimizer: AdamW and its schedule.
        train_steps: number of train steps; give either this or `epochs`.
        epochs: passes over the trajectories.
        views_per_step: canvases per train step. A recipe with a complement view draws half as many
            samples, so that recipes compare at equal compute.
        micro_batch_size: canvases per forward pass and process; gradient accumulation makes up the rest.
        max_length: limit of prompt + response tokens; longer trajectories are skipped and counted.
        only_correct: train only on trajectories whose response was judged correct.
        precision: `auto` is bf16 on GPUs that support it, otherwise fp32.
        gradient_checkpointing: store only the input of each layer and recompute the layer in the backward
            pass.
        quantization: `nf4` stores the base model's matrices in 4 bits; the adapter is not quantized.
        deepspeed: DeepSpeed's ZeRO settings; batch sizes, gradient clipping and precision are filled in.
        log_every: train steps between two records of the metrics log.
        checkpoint_every: train steps between two checkpoints, from which training resumes.
        seed: of sampling, masking and the adapter's initial weights.
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
    """Merge the adapter into the base model and compare logits with those of base + adapter.

    Args:
        format: checkpoint format of the merged model: `native` (dparallel's own), `original` (that of the
            model's publisher), or `auto` (that of the teacher's checkpoint).
        check_prompts: number of prompts compared.
        tolerance: largest accepted difference of logits.
    """

    format: Literal["auto", "native", "original"] = "auto"
    check_prompts: PositiveInt = 8
    tolerance: PositiveFloat = 1e-4


class Sweep(Config):
    """A decoding at several thresholds."""

    decoding: DecodingConfig
    thresholds: tuple[NonNegativeFloat, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_threshold_makes_sense(self) -> "Sweep":
        self.decodings()
        return self

    def decodings(self) -> list[DecodingConfig]:
        """The decoding at each threshold, in the order given."""
        settings = self.decoding.model_dump()
        return [DecodingConfig(**{**settings, "threshold": threshold}) for threshold in self.thresholds]


SweepNames = Annotated[tuple[str, ...], Field(min_length=1)]


class Baseline(Config):
    """Another model to compare with, such as an autoregressive one, and how it is decoded.

    Args:
        model: checkpoint folder or Hugging Face Hub id.
        decoding: how it is decoded.
    """

    model: LocalPath
    decoding: DecodingConfig


class BenchmarkConfig(Config):
    """Measure teacher and students; select thresholds on validation problems, report on test problems.

    Args:
        test: problems for the reported numbers.
        validation: problems for the selection of thresholds and students.
        reference: the teacher's decoding that accuracy is compared with: one token per step.
        fixed: further decodings of the teacher by name, such as one with few steps.
        sweeps: decodings at several thresholds, by name. The operating point of a sweep is the threshold
            with the highest TPF (tokens per forward pass) whose accuracy on the validation problems is at
            most `max_loss` below the reference's.
        teacher_sweeps: names of the sweeps measured with the teacher.
        student_sweeps: names of the sweeps measured with the students: one list for all students, or a
            list per student name.
        baselines: other models by name, measured on the same problems without selection.
        max_loss: accepted loss of accuracy; 0.01 is one percentage point.
        sweep_test: also decode all sweeps on the test problems, for AUP and the plot. Otherwise AUP and
            plot use the validation problems and are labelled so, and a teacher's sweep is decoded on the
            test problems only from its operating point to a threshold that keeps the accuracy.
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
        """Method name of the reference in tables and metrics."""
        one_token = self.reference.steps == self.reference.gen_length
        return "one_token_per_step" if one_token else "reference"

    @property
    def all_student_sweeps(self) -> tuple[str, ...]:
        """The sweeps measured with at least one student."""
        if isinstance(self.student_sweeps, dict):
            return tuple(dict.fromkeys(name for names in self.student_sweeps.values() for name in names))
        return self.student_sweeps

    def sweeps_of(self, student: str) -> tuple[str, ...]:
        """The sweeps measured with a student."""
        return self.student_sweeps[student] if isinstance(self.student_sweeps, dict) else self.student_sweeps

    def check_students(self, students: Iterable[str]) -> None:
        """Raise a ConfigError unless `student_sweeps` is one list or has exactly these students as keys."""
        if isinstance(self.student_sweeps, dict) and set(self.student_sweeps) != set(students):
            raise ConfigError(
                f"benchmark.student_sweeps lists {', '.join(self.student_sweeps)}; the students are "
                f"{', '.join(students)}: give a list for every student, or one list for all"
            )


class LaunchConfig(Config):
    """Distribution over processes and machines; does not affect results.

    Args:
        launcher: starts the training processes.
        processes: training processes, at most one per GPU of the machine.
        hostfile: for training on several machines: a file with lines `HOST slots=N`; one process per slot.
        parts: number of flow runs among which recording and measuring are divided on a work pool. Workers
            take them in turn, so several parts per GPU balance the load.
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


STORE = "measurements"  # folder in `runs` for the samples and verdicts of all experiments


class DistillConfig(Config):
    """An experiment: a teacher, one student per recipe, and the benchmark that compares them.

    Args:
        name: name of the experiment in folders and in MLflow.
        teacher: checkpoint folder or Hugging Face Hub id.
        runs: folder for all results.
        code: code digests by stage. A stage listed here keeps the result that code with this digest made
            (see its `manifest.json`): you vouch that later code changes do not affect it.
        trajectories, training, merging, benchmark: settings of the stages.
        students: recipes by student name.
        launch: distribution over processes and machines.
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
        if self.name.casefold() == STORE:
            raise ValueError(
                f"name={self.name!r}: {self.runs}/{STORE} holds all experiments' samples; choose another name"
            )
        _refuse_same_names(("students", name) for name in self.students)
        self.benchmark.check_students(self.students)
        return self

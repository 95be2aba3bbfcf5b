"""Settings of all stages as frozen models; `config.files` loads them from YAML.

Unknown keys, wrong types and invalid combinations raise a `ConfigError` before any work starts. It names
the key, the value and what would be valid.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dparallel.config.adapter import AdapterConfig, Student
from dparallel.config.base import HOW, Config, ConfigError
from dparallel.config.benchmark import (
    Baseline,
    BenchmarkConfig,
    Loss,
    Name,
    Sweep,
    refuse_same_names,
    refuse_unrepeatable,
)
from dparallel.config.decoding import DecodingConfig
from dparallel.config.imported import ImportedConfig
from dparallel.config.paths import LocalPath, PathOrHubId, RunsFolder, StoreUrl
from dparallel.config.problems import ProblemsConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.config.sources import ColumnText

__all__ = [
    "AdapterConfig",
    "Baseline",
    "BenchmarkConfig",
    "ConfigError",
    "DecodingConfig",
    "RecipeConfig",
    "Sweep",
]  # re-exported: all settings are imported from here

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of torch's seeds

CodeDigest = Annotated[str, Field(pattern=r"^c[0-9a-f]{11}$")]


class PrivilegedConfig(Config):
    """Prompts of the teacher that hold the reference answer (TAD). The student's prompts do not.

    Args:
        prompt: the question that the teacher is asked in place of the problem's. `{prompt}` stands for the
            problem's question, `{reference}` for its reference answer.
        decode: whether the teacher decodes its trajectories with these prompts. Otherwise they are only
            recorded, for recipes with `teacher_prompt: privileged`.
    """

    prompt: str = "Reference answer: {reference}\n\n{prompt}"
    decode: bool = True

    @model_validator(mode="after")
    def _names_the_reference(self) -> "PrivilegedConfig":
        columns = set(ColumnText(self.prompt).columns)
        if "reference" not in columns or not columns <= {"prompt", "reference"}:
            raise ValueError(
                f"prompt={self.prompt!r}: give a text with {{reference}}, and with {{prompt}} where the "
                "problem's question is to stand"
            )
        return self


class TrajectoriesConfig(Config):
    """Record teacher trajectories. All responses are kept, correct or not.

    Args:
        problems: the problems the teacher responds to.
        decoding: how the teacher decodes; of imported responses, `gen_length` is their length.
        imported: read published responses in place of recording, see `ImportedConfig`.
        privileged: also record a prompt with the reference answer for the teacher, see `PrivilegedConfig`.
        shard_size: responses per file.
        batch_size: responses decoded together.
    """

    problems: ProblemsConfig
    decoding: DecodingConfig
    shard_size: Annotated[PositiveInt, HOW] = 500
    batch_size: Annotated[PositiveInt, HOW] = 64
    # Omitted from dumps at their defaults, so that recordings keep their keys.
    imported: ImportedConfig | None = Field(None, exclude_if=lambda imported: imported is None)
    privileged: PrivilegedConfig | None = Field(None, exclude_if=lambda privileged: privileged is None)

    @property
    def has_steps(self) -> bool:
        """Whether the steps are known at which tokens were committed."""
        return self.imported is None or self.imported.has_steps

    @model_validator(mode="after")
    def _consistent(self) -> "TrajectoriesConfig":
        refuse_unrepeatable({"decoding": self.decoding})
        if self.imported is not None and self.privileged is not None:
            raise ValueError(
                "imported with privileged: published responses come without prompts of the teacher; drop "
                "one of them"
            )
        if self.imported is not None and self.problems.benchmark != "dataset":
            raise ValueError(
                f"imported with problems.benchmark={self.problems.benchmark!r}: published responses are "
                "columns of a data set; give benchmark: dataset with its sources"
            )
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


class StudentConfig(Config):
    """Settings of a training stage."""

    training: TrainingConfig
    recipe: RecipeConfig

    @property
    def only_correct(self) -> bool:
        """Whether trajectories that are not known to be correct are left out."""
        return self.training.only_correct if self.recipe.only_correct is None else self.recipe.only_correct


LEAST_TRAJECTORIES = 10  # of a commit rule: one in five is held out


class CommitRuleConfig(Config):
    """Fit a commit rule for a model on recorded trajectories: a network that the rule `learned` reads.

    Args:
        trajectories: number of trajectories, the first ones, or all if there are fewer. One in five is held
            out, for the numbers of its quality.
        canvases: canvases drawn from each trajectory, at random steps.
        block_length: that the model is decoded with; by default that of the trajectories, of a block-causal
            student that of its training.
        hidden: units of the network's hidden layer; 0 for a logistic regression.
        seed: of the canvases and of the network's initial weights.
    """

    trajectories: int = Field(300, ge=LEAST_TRAJECTORIES)
    canvases: PositiveInt = 12
    block_length: PositiveInt | None = None
    hidden: NonNegativeInt = 8
    seed: Seed = 0


class MergingConfig(Config):
    """Merge the adapter into the base model and compare logits with those of base + adapter.

    Args:
        format: checkpoint format of the merged model: `native` (dparallel's own), `original` (that of the
            model's publisher), or `auto` (that of the teacher's checkpoint).
        check_prompts: number of prompts compared.
        tolerance: largest accepted difference of logits.
        attention: attention pattern that the merged model states, of an adapter that was trained elsewhere;
            that of the student, so leave it out.
        commit_rule: fit a commit rule for the merged model, which the rule `learned` reads; by default none.
    """

    format: Literal["auto", "native", "original"] = "auto"
    check_prompts: PositiveInt = 8
    tolerance: PositiveFloat = 1e-4
    # Omitted from dumps at their defaults, so that the folders of trained students keep their keys.
    attention: Literal["full", "block_causal"] | None = Field(None, exclude_if=lambda value: value is None)
    commit_rule: CommitRuleConfig | None = Field(None, exclude_if=lambda value: value is None)


class LaunchConfig(Config):
    """Distribution over processes and machines; does not affect results.

    Args:
        launcher: starts the training processes.
        processes: training processes, at most one per GPU of the machine.
        hostfile: for training on several machines: a file with lines `HOST slots=N`; one process per slot.
        parts: number of flow runs among which recording and measuring are divided on a work pool. Workers
            take them in turn, so several parts per GPU balance the load.
        attempts: how often a stage is sent to its work pool while its run crashes, as when a worker or its
            machine is lost. A run that fails is not sent again.
        timeout_hours: a stage's run on its work pool that takes longer is cancelled.
    """

    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    processes: PositiveInt = 1
    hostfile: LocalPath | None = None
    parts: PositiveInt = 1
    attempts: PositiveInt = 3
    timeout_hours: PositiveFloat | None = None

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


class PromotionConfig(Config):
    """When the default student's merged model becomes the champion in MLflow's registry.

    Args:
        max_loss: accepted loss of accuracy against the teacher and against the present champion, on the test
            problems of each benchmark; 0.01 is one percentage point.
        replace_other_samples: also replace a champion that was measured on other problems, or asked or
            judged by another protocol, with which no comparison is possible.
    """

    max_loss: Loss = 0.01
    replace_other_samples: bool = False


RUNS = "runs"  # in the working folder
MEASUREMENTS = "measurements"  # folder in `runs` for the samples and verdicts of all experiments


class DistillConfig(Config):
    """An experiment: a teacher, students, and the benchmarks that compare them.

    Args:
        name: name of the experiment in folders and in MLflow.
        teacher: checkpoint folder, Hugging Face Hub id, or URL of a model in a store.
        runs: folder for all results.
        store: folder or URL (`s3://bucket/folder`, `gs://…`) through which machines that share no folder
            exchange results; `runs` is then each machine's own. By default none.
        code: code digests by stage. A stage listed here keeps the result that code with this digest made
            (see its `manifest.json`): you vouch that later code changes do not affect it.
        trajectories, training, merging: settings of these stages.
        students: by name, the recipes of students that are trained here, and `{adapter: PATH}` for those
            that are trained already.
        benchmarks: benchmarks by name; each is a stage of its own. What the first one with validation
            problems chooses becomes the decode defaults of the students' checkpoints.
        launch: distribution over processes and machines.
        promotion: when a student becomes the champion in MLflow's registry.
    """

    file_kind: ClassVar[str] = (
        "an experiment: give it to `python -m flows.distill --config`, "
        "`dparallel plan` or `prefect deployment run`"
    )

    name: Name
    teacher: PathOrHubId
    runs: RunsFolder = RUNS
    store: StoreUrl | None = None
    code: dict[Literal["trajectories", "training", "merging"], CodeDigest] = {}
    trajectories: TrajectoriesConfig
    training: TrainingConfig
    students: dict[Name, Student] = Field(min_length=1)
    merging: MergingConfig = MergingConfig()
    benchmarks: dict[Name, BenchmarkConfig] = Field(min_length=1)
    launch: LaunchConfig = LaunchConfig()
    promotion: PromotionConfig = PromotionConfig()

    @property
    def recipes(self) -> dict[str, RecipeConfig]:
        """Recipes of the students that are trained here, by student name."""
        return {name: made for name, made in self.students.items() if isinstance(made, RecipeConfig)}

    @property
    def adapters(self) -> dict[str, AdapterConfig]:
        """The students that are trained already, by student name."""
        return {name: made for name, made in self.students.items() if isinstance(made, AdapterConfig)}

    def baseline_models(self) -> list[str]:
        """The models of all baselines, once each."""
        benchmarks = self.benchmarks.values()
        return list(dict.fromkeys(rival.model for bench in benchmarks for rival in bench.baselines.values()))

    @property
    def setting_defaults(self) -> str:
        """The benchmark whose choices become the students' decode defaults.

        It is the first one that chooses, on validation problems; the first of all if none does.
        """
        choosing = (name for name, benchmark in self.benchmarks.items() if benchmark.validation is not None)
        return next(choosing, next(iter(self.benchmarks)))

    @model_validator(mode="after")
    def _consistent(self) -> "DistillConfig":
        if not self.recipes:
            raise ValueError(
                f"students: {', '.join(self.students)}: all are adapters, so nothing is trained; add a "
                "student with a recipe, or measure them with `dparallel merge` and `dparallel eval`"
            )
        if self.merging.attention is not None:
            raise ValueError(
                f"merging.attention={self.merging.attention!r}: a student states its own attention, as "
                "students.NAME.attention; drop it"
            )
        if self.name.casefold() == MEASUREMENTS:
            raise ValueError(
                f"name={self.name!r}: {self.runs}/{MEASUREMENTS} holds all experiments' samples; choose "
                "another name"
            )
        refuse_same_names(("students", name) for name in self.students)
        refuse_same_names(("benchmarks", name) for name in self.benchmarks)
        for name, benchmark in self.benchmarks.items():
            benchmark.check_students(self.students, f"benchmarks.{name}")
        return self

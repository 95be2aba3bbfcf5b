"""The requirements of an experiment compared with numbers worked by hand from the tiny config."""

import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dparallel.cli.main import main
from dparallel.cli.plan import _hours
from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.distillation.quantization import check_blocks
from dparallel.models.checkpoints import read_config, save_model
from dparallel.models.placement import empty_model
from dparallel.preflight.checks import check_experiment
from dparallel.preflight.disk import free_disk
from dparallel.preflight.memory import RESERVED, DecodingMemory
from dparallel.preflight.plan import Plan, check_fits, make_plan
from dparallel.preflight.progress import Progress
from dparallel.preflight.prompts import PromptLengths
from dparallel.preflight.rate import Rate, measure_rate, timed_shape
from dparallel.preflight.remedy import ways_to_save_memory
from dparallel.preflight.work import Forwards, forwards_by_stage
from dparallel.problems.scorer import Scorer
from dparallel.problems.scoring import SCORERS
from dparallel.stages.experiment import Experiment, StagePlan
from dparallel.stages.manifest import Stage
from tests.conftest import random_model
from tests.dparallel.models.published import publish

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "tiny.yaml")
TEACHER = f"teacher={ROOT / 'teachers' / 'tiny'}"
LONG = "x" * 300  # no file can be called so
ADAPTER = 303_104  # 32 (4·256 + 3·448) in each of 4 layers
GIB = 2**30


def plan(*overrides: str, on_gpu: bool = True) -> Plan:
    config = load_config(DistillConfig, CONFIG, [TEACHER, *overrides])
    return make_plan(config, check_experiment(config), on_gpu)


def test_parameters_memory_and_disk() -> None:
    made = plan()
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 320) + 2 * 50 * 128
    assert made.parameters == matrices + 9 * 128  # and nine norms
    assert made.trainable == ADAPTER == 32 * 4 * (4 * 256 + 3 * 448)
    assert (made.shape.processes, made.shape.precision, made.shape.length) == (
        2,
        "bf16",
        48,
    )  # prompts of 12 tokens
    assert made.training.weights == 2 * (made.parameters + ADAPTER)
    assert made.training.optimizer == 12 * ADAPTER / 2  # two processes share the states
    # 1,500 rows: 48 ids and texts of 5 bytes, 36 steps of 2 bytes and confidences of 4
    assert made.disk["trajectories"] == 1500 * (48 * (4 + 5) + 36 * (2 + 4))
    # three students, each with two checkpoints, and one being written
    assert made.disk["checkpoints"] == (3 * 2 + 1) * 12 * ADAPTER
    stored = (ROOT / "teachers" / "tiny" / "model.safetensors").stat().st_size
    assert made.disk["merged models"] == 3 * stored == pytest.approx(3 * 4 * made.parameters, rel=0.01)
    # one row reads a block of 12: its logits and five float32 copies, the widest layer, rotation
    assert made.decoding.weights == stored
    assert made.decoding.row == 12 * 50 * (4 + 5 * 4) + 48 * 4 * (4 * 128 + 3 * 320) + 48 * 8 * 128 * 4
    assert made.decoding.peak == stored + math.ceil(made.decoding.row / 0.9)
    assert plan(on_gpu=False).shape.precision == "fp32"


def test_forwards_by_hand() -> None:
    """1,500 trajectories of 36 steps; three students of 150 steps of 64 views; backward counts as forward."""
    work = plan().forwards
    assert work["trajectories"] == Forwards(1500 * 36, 1500 * 36 * 48)
    # Each measurement decodes 8 prompts again, alone: 300 + 8 validation problems, 1000 + 8 test problems.
    both = 308 + 1008
    teacher = 36 * both + 9 * both + (5 + 7) * 36 * both  # all thresholds on both splits, the worst case
    assert work["benchmark coins"].rows == teacher + 3 * 36 * (7 * 308 + 1008)
    swept = plan("benchmarks.coins.sweep_test=true").forwards["benchmark coins"].rows
    assert swept == teacher + 3 * 36 * 7 * both
    # At least, a threshold commits a block of 12 in a forward pass, and the first of each sweep is chosen
    fewest = plan().fewest
    teacher = 36 * both + 9 * both + 3 * (12 * 308 + 2 * 1008)
    assert fewest["benchmark coins"].rows == teacher + 3 * 3 * (7 * 308 + 1008)
    assert {name: fewest[name] for name in ("trajectories", "training")} == {
        name: work[name] for name in ("trajectories", "training")
    }
    assert work["training"].rows == 3 * 150 * 64 * 2
    assert plan("training.gradient_checkpointing=true").forwards["training"].rows == 3 * 150 * 64 * 3
    # epochs: certainty forcing and consistency draw 32 samples a step, trajectory-ordered 64
    epochs = plan("training.train_steps=null", "training.epochs=2").forwards["training"].rows
    assert epochs == (94 + 94 + 47) * 64 * 2
    assert Rate(1000, "").hours([Forwards(1, 1_800_000), Forwards(1, 1_800_000)]) == 1


def test_a_teacher_that_is_asked_costs_a_forward_and_its_logits() -> None:
    """A step of 64 views in one process, for three students of 150 steps; 36 positions of 50 tokens each."""
    alone = "launch.processes=1"
    recipe = f"students.consistency={ROOT}/configs/recipes/d2f.yaml"
    full = "students.consistency.attention=full"  # decoded like the others
    made, before = plan(alone, recipe, full), plan(alone)
    assert made.forwards["training"].rows - before.forwards["training"].rows == 150 * 64
    hard = plan(alone, recipe, full, "students.consistency.targets=trajectory")
    assert hard.forwards["training"].rows == before.forwards["training"].rows
    assert made.training.activations - hard.training.activations == 2 * 64 * 36 * 50  # in bf16


def test_a_block_that_grows_is_planned_at_its_longest() -> None:
    def activations(block_length: str) -> int:
        recipe = f"students={{one: {{masking: random, block_length: {block_length}}}}}"
        return plan(recipe).training.activations

    assert activations("{start: 6, end: 12}") == activations("12") > activations("6")


def test_what_fits_is_let_through() -> None:
    made = plan()
    check_fits(made, made.training.peak + RESERVED, sum(made.disk.values()))
    check_fits(made, None, sum(made.disk.values()))
    with pytest.raises(ConfigError, match="training needs"):
        check_fits(made, made.training.peak + RESERVED - 1, 10**12)


def test_the_remedy_fits() -> None:
    """Each memory limit is met by the settings that the error message proposes."""
    made, remedies = plan("launch.processes=1"), set()
    for share in (0.95, 0.9, 0.85):
        limit = int(RESERVED + share * made.training.peak)
        with pytest.raises(ConfigError) as refused:
            check_fits(made, limit, 10**12)
        message = str(refused.value)
        assert "on each GPU (weights" in message
        words = shlex.split(message.partition("with --set ")[2].partition(" it needs")[0])
        assert words, message
        remedies.add(tuple(words))
        goes_on = message.endswith("; a training already begun goes on from its checkpoint")
        assert goes_on == (not any("quantization" in word for word in words))
        check_fits(plan("launch.processes=1", *words), limit, 10**12)
    assert "training.gradient_checkpointing=true" in {word for words in remedies for word in words}


def test_what_nothing_makes_fit() -> None:
    made = plan()
    limit = made.decoding.peak + RESERVED
    with pytest.raises(ConfigError, match="training needs .* no setting makes it fit: use larger GPUs"):
        check_fits(made, limit, 10**12)
    with pytest.raises(
        ConfigError, match=r"the benchmark need .* \(weights .*, one row .*: load the teacher in bf"
    ):
        check_fits(made, limit - 1, 10**12)


def test_no_setting_of_training_is_named_where_the_teacher_cannot_decode() -> None:
    """LLaDA-8B with 12 GB: 4-bit training would fit, but its 15 GiB in bf16 cannot record."""
    made = replace(plan(), decoding=DecodingMemory(15 * GIB, GIB // 2, torch.bfloat16))
    with pytest.raises(ConfigError, match=r"recording .* need 15.56 GiB") as refused:
        check_fits(made, 12 * GIB, 10**12)
    assert "--set" not in str(refused.value)
    wide = replace(made, decoding=DecodingMemory(30 * GIB, GIB // 2, torch.float32))
    with pytest.raises(ConfigError, match="load the teacher in bfloat16, save it once"):
        check_fits(wide, 24 * GIB, 10**12)


def test_four_bits_are_no_remedy_for_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    training, asked = plan().config.training, {}
    for width in (128, 96):
        save_model(random_model(hidden_size=64, intermediate_size=width), tmp_path / f"{width}")
        model = empty_model(read_config(tmp_path / f"{width}"))
        asked[width] = {way.get("quantization") for way in ways_to_save_memory(training, 1, 1, model)}
        if width == 96:
            with pytest.raises(ConfigError, match=r"down_proj has 96 inputs, no multiple of 64: leave"):
                check_blocks(model)
    assert asked == {128: {None, "nf4"}, 96: {None}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_models_are_as_wide_as_an_original_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    """Independent of the dtype in its config.json."""
    folder = publish(tmp_path / "teacher", "llada", dtype)
    config = load_config(DistillConfig, CONFIG, [f"teacher={folder}"])
    made = make_plan(config, PromptLengths([12], {"coins": {"test": [12], "validation": [12]}}), on_gpu=True)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert made.disk["merged models"] == 3 * files >= 3 * dtype.itemsize * made.parameters
    assert made.decoding.weights == files
    assert made.decoding.dtype == dtype


def test_too_little_disk() -> None:
    made = plan()
    with pytest.raises(ConfigError, match=r"needs .* of disk \(trajectories .* are free: free some"):
        check_fits(made, None, sum(made.disk.values()) - 1)


def test_free_disk_is_that_of_the_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=12345)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert free_disk(tmp_path / "not" / "there") == 12345
    assert asked == [tmp_path]


def test_the_rate_is_measured_where_the_teacher_fits(capsys) -> None:
    made = plan(on_gpu=False)
    rate = measure_rate(made)
    assert rate is not None
    assert rate.tokens_per_second > 100
    assert "measured here" in rate.origin
    assert "64 x 48 tokens on cpu; use --rate N to skip this" in capsys.readouterr().err
    assert measure_rate(replace(made, parameters=10**15)) is None


def test_a_large_model_reads_one_short_row_on_a_cpu() -> None:
    """A forward pass of LLaDA-8B over 8 rows of 384 tokens takes minutes there."""
    made = replace(plan(on_gpu=False), parameters=8_015_581_184)
    made = replace(made, shape=replace(made.shape, length=384))
    assert timed_shape(made, torch.device("cpu")) == (1, 64)
    assert timed_shape(made, torch.device("cuda")) == (8, 384)


def test_a_cpu_says_nothing_of_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", CONFIG, "--set", TEACHER, "--gpu-memory", "24GB"]) == 0
    printed = capsys.readouterr()
    assert "hours need --rate N" in printed.out
    assert "hours of one device" not in printed.out
    assert "timing" not in printed.err


def stage(name: str, made_by: StagePlan, *files: tuple[str, int]) -> Path:
    """A finished stage's folder with files of the given sizes."""
    stage = Stage(name, made_by.settings(), made_by.inputs, made_by.out_dir)
    for file, size in files:
        (stage.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / file).write_bytes(bytes(size))
    stage.finish([file for file, _ in files])
    return stage.folder


@pytest.mark.slow
def test_only_what_is_still_to_be_written_is_charged(tmp_path: Path, monkeypatch) -> None:
    """During a run of two students, with MLflow's store on another disk, then on the same one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    setting = [
        f"runs={tmp_path}",
        "students={a: {masking: random, block_length: 12}, b: {masking: random, block_length: 12}}",
    ]

    def needed() -> dict[str, int]:
        return plan(*setting).disk

    adapter, checkpoint = 2 * ADAPTER, 12 * ADAPTER
    whole = needed()
    assert "copies in MLflow" not in whole
    config = plan(*setting).config
    experiment = Experiment(config)
    row, merged = whole["trajectories"] // 1500, whole["merged models"] // 2

    # 1. One of three shards recorded
    folder = Path(experiment.trajectories().out_dir)
    folder.mkdir(parents=True)
    (folder / "part-00001.parquet").write_bytes(b"x")
    assert needed() == whole | {"trajectories": 1000 * row}
    (folder / "part-00001.parquet").unlink()
    stage("trajectories", experiment.trajectories(), ("part-00000.parquet", 10))
    assert needed() == whole | {"trajectories": 0}

    # 2. A training stopped after its second checkpoint, then finished
    begun = experiment.training("a")
    kept = Stage("training", begun.settings(), begun.inputs, begun.out_dir).folder / "checkpoints"
    for name in ("step-1", "step-2"):
        (kept / name).mkdir(parents=True)
        (kept / name / "state").write_bytes(bytes(checkpoint))
    assert needed()["checkpoints"] == (2 * 2 + 1) * checkpoint - 2 * checkpoint
    stage("training", experiment.training("a"), ("adapter/adapter_model.safetensors", 10))
    assert needed() == {
        "trajectories": 0,
        "checkpoints": 3 * checkpoint,
        "adapters": adapter,
        "merged models": 2 * merged,
    }
    # 3. Merged, the other one too: nothing is left
    stage("merging", experiment.merging("a"), ("model.safetensors", 10))
    assert needed()["merged models"] == merged
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    assert needed()["copies in MLflow"] == adapter + merged
    stage("training", experiment.training("b"), ("adapter/adapter_model.safetensors", 10))
    stage("merging", experiment.merging("b"), ("model.safetensors", 10))
    made = plan(*setting)
    assert set(made.disk.values()) == {0}
    check_fits(made, None, 0)
    assert made.training is None  # finished training needs no GPU


def test_only_what_is_left_is_counted_in_hours(tmp_path: Path, monkeypatch, capsys) -> None:
    setting = [
        TEACHER,
        f"runs={tmp_path}",
        "students={a: {masking: random, block_length: 12}, b: {masking: random, block_length: 12}}",
    ]
    command = ["plan", CONFIG, "--set", *setting, "--rate", "100000"]

    def printed() -> dict[str, list[str]]:
        """The columns of a stage."""
        assert main(command) == 0
        lines = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
        return {first: others for first, *others in lines}

    whole = printed()
    assert len(whole["trajectories"]) == len(whole["training"]) == 2, "rows and hours"
    experiment = Experiment(plan(*setting).config)
    folder = Path(experiment.trajectories().out_dir)
    folder.mkdir(parents=True)
    (folder / "part-00001.parquet").write_bytes(b"x")
    assert printed()["trajectories"] == ["36,000", "under a minute", "500 of 1,500 are recorded"]
    (folder / "part-00001.parquet").unlink()
    stage("trajectories", experiment.trajectories(), ("part-00000.parquet", 10))
    stage("training", experiment.training("a"), ("adapter/adapter_model.safetensors", 10))
    now = printed()
    assert now["trajectories"] == ["0", "none", "finished"]
    assert now["training"] == ["19,200", "under a minute", "1 of 2 students are trained"]
    assert now["benchmark coins"] == whole["benchmark coins"]

    stage("training", experiment.training("b"), ("adapter/adapter_model.safetensors", 10))
    for student in ("a", "b"):
        stage("merging", experiment.merging(student), ("model.safetensors", 10))
    stage("benchmark", experiment.benchmark("coins"), ("results.json", 10))
    assert main(command[:-2]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip().endswith("Everything is finished: no forward passes are left")
    assert "timing" not in err


def test_responses_that_are_judged_together_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to each problem where they are sampled, with other seeds, and one where they would be equal."""
    scorer = Scorer("vote", 1, ("right",), lambda problems, responses: [], repeats=3)
    monkeypatch.setitem(SCORERS, "vote", scorer)
    config = load_config(DistillConfig, CONFIG, [TEACHER]).model_dump()
    benchmark = config["benchmarks"]["coins"]
    for split in ("test", "validation"):
        benchmark[split]["protocol"]["scorers"] = ["vote"]
    benchmark["reference"] |= {"temperature": 0.5, "seed": 1}
    settings, lengths = DistillConfig.model_validate(config), {"coins": {"test": [10] * 20, "validation": []}}
    once, thrice = (
        forwards_by_stage(each, PromptLengths((), lengths), 48, Progress())["benchmark coins"].rows
        for each in (load_config(DistillConfig, CONFIG, [TEACHER]), settings)
    )
    assert thrice - once == 2 * 36 * (20 + 8)


def test_the_command_prints_the_plan(capsys) -> None:
    assert main(["plan", CONFIG, "--set", TEACHER, "--gpu-memory", "24GB", "--rate", "1000"]) == 0
    printed = capsys.readouterr().out
    for words in ("767,616 parameters", "trains 303,104", "Limit of each", "23.00 GiB", "as given by --rate"):
        assert words in printed
    assert re.search(r"trajectories +54,000 +0\.72 hours\n", printed), "an exact number is no range"
    assert re.search(r"together +[\d.]+ to [\d.]+ hours\n", printed)
    assert "1 processes" not in printed
    assert printed.rstrip().endswith(
        "Not counted: starting the programs, judging the responses, and the report's pictures"
    )


def test_times_below_a_minute_are_no_fractions_of_hours() -> None:
    assert _hours([1.9e-05, 0.001]) == "under a minute"
    assert _hours([1.9e-05, 0.5]) == "under a minute to 0.5 hours"
    assert _hours([0.5, 12.3]) == "0.5 to 12 hours"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "1050MB"], "training needs"),
        (["--gpu-memory", "24"], "--gpu-memory 24: give a number and its unit, such as 24GB"),
        (["--gpu-memory", "0GB"], "--gpu-memory 0GB"),
        (["--set", "training.micro_batch_size=24"], "micro_batch_size=24 does not divide"),
        (["--set", "training.deepspeed={zero: 1}"], "training.deepspeed.zero is unknown"),
        (["--set", "training.lora.targets=[qkv]"], "LoRA target 'qkv' matches in 0 of 4 layers"),
        (["--set", "training.max_length=47"], "training.max_length=47 leaves nothing to train on"),
        (["--set", "merging.format=original"], "which is in our own format"),
        (["--set", "trajectories.problems.protocol.chat=true"], "chat template"),
        (["--set", "benchmarks.coins.test.split=distillation"], "share 1000 prompts"),
        (["--set", f"runs={LONG}/runs"], "cannot be written to (File name too long"),
        (["--set", f"name={LONG}"], "name: String should have at most 100 characters"),
        (["--set", f"students.{LONG}=../configs/recipes/consistency.yaml"], "at most 100 characters"),
    ],
)
def test_refusals_exit_with_2(arguments, message, capsys) -> None:
    settings = [TEACHER, *(arguments[1:] if arguments[0] == "--set" else [])]
    others = arguments if arguments[0] != "--set" else []
    assert main(["plan", CONFIG, "--rate", "1000", *others, "--set", *settings]) == 2
    assert message in capsys.readouterr().err

"""What an experiment needs, against numbers worked out by hand from the tiny config."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dparallel.cli import main
from dparallel.config import ConfigError, DistillConfig
from dparallel.config_files import load_config
from dparallel.plan import RESERVED, Plan, Rate, Work, check_fits, free_disk, make_plan, measure_rate

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "tiny.yaml")
TEACHER = f"teacher={ROOT / 'teachers' / 'tiny'}"
ADAPTER = 303_104  # 32 (4·256 + 3·448) in each of 4 layers
GIB = 2**30


def plan(*overrides: str, on_gpu: bool = True) -> Plan:
    return make_plan(load_config(DistillConfig, CONFIG, [TEACHER, *overrides]), on_gpu)


def test_parameters_memory_and_disk() -> None:
    made = plan("training.max_length=50")
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 320) + 2 * 50 * 128
    assert made.parameters == matrices + 9 * 128  # and nine norms
    assert made.trainable == ADAPTER == 32 * 4 * (4 * 256 + 3 * 448)
    assert (made.processes, made.precision, made.length) == (2, "bf16", 50)
    assert made.memory.weights == 2 * (made.parameters + ADAPTER)
    assert made.memory.optimizer == 12 * ADAPTER / 2  # two processes share the states
    # 1,500 rows: 50 ids and texts of 5 bytes, 36 steps of 2 bytes and confidences of 4
    assert made.disk["trajectories"] == 1500 * (50 * (4 + 5) + 36 * (2 + 4))
    # three students, each with two checkpoints and one being written
    assert made.disk["checkpoints"] == 3 * 3 * (2 + 12) * ADAPTER
    assert plan(on_gpu=False).precision == "fp32"


def test_forwards_by_hand() -> None:
    """1,500 trajectories of 36 steps; three students of 150 steps of 64 views, backward as much again."""
    work = plan("training.max_length=50").work
    assert work["trajectories"] == Work(1500 * 36, 1500 * 36 * 50)
    assert work["training"].forwards == 3 * 150 * 64 * 2
    assert plan("training.gradient_checkpointing=true").work["training"].forwards == 3 * 150 * 64 * 3
    # epochs: certainty forcing and consistency draw 32 samples a step, trajectory-ordered 64
    epochs = plan("training.train_steps=null", "training.epochs=2").work["training"].forwards
    assert epochs == (94 + 94 + 47) * 64 * 2
    assert Rate(1000, "").hours([Work(1, 1_800_000), Work(1, 1_800_000)]) == 1


def test_what_fits_is_let_through() -> None:
    made = plan()
    check_fits(made, made.memory.peak + RESERVED, sum(made.disk.values()))
    check_fits(made, None, sum(made.disk.values()))
    with pytest.raises(ConfigError, match="training needs"):
        check_fits(made, made.memory.peak + RESERVED - 1, 10**12)


def test_the_remedy_fits() -> None:
    """Each memory limit is met by the settings that its refusal names."""
    made, remedies = plan("launch.processes=1"), set()
    for share in (0.95, 0.9, 0.85):
        limit = int(RESERVED + share * made.memory.peak)
        with pytest.raises(ConfigError) as refused:
            check_fits(made, limit, 10**12)
        message = str(refused.value)
        assert "on each GPU (weights" in message
        words = shlex.split(message.partition("with --set ")[2].partition(" it needs")[0])
        assert words, message
        remedies.add(tuple(words))
        check_fits(plan("launch.processes=1", *words), limit, 10**12)
    assert "training.gradient_checkpointing=true" in {word for words in remedies for word in words}


def test_what_nothing_makes_fit() -> None:
    with pytest.raises(ConfigError, match="no setting makes it fit: use larger GPUs"):
        check_fits(plan(), RESERVED, 10**12)


def test_too_little_disk() -> None:
    made = plan()
    with pytest.raises(ConfigError, match=r"needs .* of disk \(trajectories .* are free: free some"):
        check_fits(made, None, sum(made.disk.values()) - 1)


def test_free_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "there") > 0


def test_the_rate_is_measured_where_the_teacher_fits() -> None:
    made = plan(on_gpu=False)
    rate = measure_rate(made)
    assert rate is not None
    assert rate.tokens_per_second > 100
    assert "measured here" in rate.origin
    assert measure_rate(replace(made, parameters=10**15)) is None


def test_the_command_prints_the_plan(capsys) -> None:
    assert main(["plan", CONFIG, "--set", TEACHER, "--gpu-memory", "24GB", "--rate", "1000"]) == 0
    printed = capsys.readouterr().out
    for words in ("767,616 parameters", "trains 303,104", "limit", "23.00 GiB", "as given by --rate"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "1050MB"], "training needs"),
        (["--gpu-memory", "24"], "--gpu-memory 24: give a number and its unit, such as 24GB"),
        (["--gpu-memory", "0GB"], "--gpu-memory 0GB"),
        (["--set", "training.micro_batch_size=24"], "micro_batch_size=24 does not divide"),
        (["--set", "training.deepspeed={zero: 1}"], "training.deepspeed.zero is unknown"),
        (["--set", "training.lora.targets=[qkv]"], "LoRA target 'qkv' matches in 0 of 4 layers"),
    ],
)
def test_refusals_exit_with_2(arguments, message, capsys) -> None:
    settings = [TEACHER, *(arguments[1:] if arguments[0] == "--set" else [])]
    others = arguments if arguments[0] != "--set" else []
    assert main(["plan", CONFIG, "--rate", "1000", *others, "--set", *settings]) == 2
    assert message in capsys.readouterr().err

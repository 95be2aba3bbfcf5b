"""Every file in configs/ loads, and starts with a header that says how to run it."""

import re
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.completion import complete
from dparallel.config.base import ConfigError
from dparallel.config.experiment import BenchmarkConfig, DistillConfig
from dparallel.config.files import load_config
from dparallel.config.problems import ProtocolConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.config.teacher import TeacherConfig
from dparallel.distillation.data import step_shape
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.preflight.checks import check_experiment
from dparallel.problems.embedded import embedded_task
from dparallel.problems.judging import score
from dparallel.problems.registry import load_problems
from dparallel.problems.scoring import scorers_of
from dparallel.stages.manifest import verify
from dparallel.tiny.objectives import OBJECTIVES
from tests.conftest import TEACHERS

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def kind(path: Path):
    if path.parent.name == "recipes":
        return RecipeConfig
    if path.parent.name == "benchmarks":
        return BenchmarkConfig
    if path.parent.name == "protocols":
        return ProtocolConfig
    return TeacherConfig if path in TEACHERS else DistillConfig


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads(path):
    config = load_config(kind(path), path)
    if isinstance(config, ProtocolConfig):
        assert scorers_of(config)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("# ")
    if kind(path) in (DistillConfig, TeacherConfig):
        for entry in ("command", "hardware", "time", "expect"):
            assert f"#   {entry}" in path.read_text(encoding="utf-8"), f"{path} does not state its {entry}"
        assert not re.search(r"[A-Z]+_[A-Z0-9]+", header), "a number is still to be filled in"


@pytest.mark.parametrize(
    "folder", sorted((CONFIGS.parent / "teachers").iterdir()), ids=lambda path: path.name
)
def test_an_embedded_teacher_was_made_by_its_config(folder):
    configs = {
        Path(teacher.out).name: teacher for teacher in (load_config(TeacherConfig, path) for path in TEACHERS)
    }
    manifest = verify(folder, "teacher")
    assert manifest.config == configs[folder.name].what()
    assert sum(record.bytes for record in manifest.files.values()) < 6_000_000


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_an_embedded_teacher_solves_problems_of_its_task(path):
    teacher = load_config(TeacherConfig, path)
    model, tokenizer = load_model(teacher.out), load_tokenizer(teacher.out)
    drawn = islice(embedded_task(teacher.task).problems("test", 0), 2)
    for problem in drawn:
        decoding = OBJECTIVES[teacher.objective].decoding(teacher)
        (completion,) = complete(model, tokenizer, [problem.prompt], decoding)
        assert embedded_task(teacher.task).mistake(problem, completion.text) is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_on_an_embedded_teacher_passes_its_checks(path, tmp_path):
    if kind(path) is not DistillConfig:
        pytest.skip("no experiment")
    config = load_config(DistillConfig, path, [f"runs={tmp_path}"])
    if "teachers" not in Path(config.teacher).parts:
        pytest.skip("its teacher does not come with the project")
    check_experiment(config)


def test_zero_settings_are_json():
    assert (
        load_config(DistillConfig, CONFIGS / "tiny.yaml").training.deepspeed["zero_optimization"]["stage"]
        == 2
    )


PUBLISHED = {  # dParallel's training settings: rank = alpha, epochs, max_length, schedule, certainty_weight
    "llada_8b": (128, 6, 384, "constant", 2.0),
    "dream_7b": (32, 3, 512, "cosine", 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_are_as_published(name):
    config = load_config(DistillConfig, CONFIGS / f"{name}.yaml")
    training, recipe = config.training, config.students["certainty_forcing"]
    assert training.lora.rank == training.lora.alpha
    assert PUBLISHED[name] == (
        training.lora.rank,
        training.epochs,
        training.max_length,
        training.optimizer.schedule,
        recipe.certainty_weight,
    )
    shape = step_shape(training, recipe.views, processes=8)
    assert (shape.samples, shape.micro_samples, shape.accumulation) == (64, 1, 8)
    recording = config.trajectories.decoding
    assert (recording.gen_length, recording.block_length, recording.steps) == (256, 32, 256)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "gsm8k_llada",
            "Question: 1 + 1?\nAnswer: "
            "Please reason step by step, and put your final answer within \\boxed{}.",
        ),
        ("gsm8k_dream", "Q: 1 + 1?\nA: Let's think step by step."),
    ],
)
def test_gsm8k_is_asked_as_published(name, prompt, tmp_path):
    """From a local copy, split into problems for selecting the threshold and problems for reporting."""
    rows = [{"question": f"1 + {number}?", "answer": f"so\n#### {number + 1}"} for number in range(1, 203)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    benchmark = load_config(BenchmarkConfig, CONFIGS / "benchmarks" / f"{name}.yaml")
    validation, test = (
        part.model_copy(update={"path": str(tmp_path)}) for part in (benchmark.validation, benchmark.test)
    )
    problems = load_problems(validation)
    assert problems[0].prompt == prompt
    assert (len(problems), len(load_problems(test))) == (200, 2)
    verdicts = score(problems[:1], ["the answer is \\boxed{2}."], validation.protocol)
    assert [verdict.metrics["flexible_extract"] for verdict in verdicts] == [True]
    assert validation.protocol.chat


def test_no_experiment_takes_the_folder_that_all_share() -> None:
    for name in ("measurements", "Measurements"):
        with pytest.raises(ConfigError, match=f"name={name!r}: .*choose another name"):
            load_config(DistillConfig, CONFIGS / "tiny.yaml", [f"name={name}"])

"""Names, parameters and tags of runs."""

from pathlib import Path

import pytest
import yaml

from dparallel.config.experiment import DistillConfig, StudentConfig
from dparallel.config.files import load_config
from dparallel.stages.experiment import StagePlan
from dparallel.stages.origin import Origin
from tasks.tracking import describe
from tests.flows.conftest import small_settings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("parts", "overrides", "name"),
    [
        (["fast"], [], "tiny: fast"),
        (["fast", "slow"], ["training.seed=1"], "tiny: fast, slow (seed=1)"),
        (["fast"], ["training.seed=1", "name=tiny", "runs=/x", "a.b=2"], "tiny: fast (b=2, seed=1)"),
        (["fast"], ["a.b=2", "training.seed=1"], "tiny: fast (b=2, seed=1)"),
        (list("abcd"), [f"x.{key}=1" for key in "edcba"], "tiny: 4 students (a=1, b=1, c=1, 2 more)"),
        ([], [], "tiny"),
    ],
)
def test_a_name_says_students_and_overrides(parts: list[str], overrides: list[str], name: str) -> None:
    assert describe.run_name("tiny", parts, overrides) == name


def test_a_name_is_short() -> None:
    long = [f"{'k' * 30}.{'k' * 80}={'v' * 200}"] * 3
    assert len(describe.run_name("tiny", ["fast"], long)) <= describe.NAME_LENGTH


@pytest.mark.parametrize("file", ["tiny.yaml", "tiny_table.yaml", "llada_8b.yaml", "table1_llada.yaml"])
def test_parameters_are_few(file: str) -> None:
    found = describe.parameters(load_config(DistillConfig, str(ROOT / "configs" / file)))
    assert 10 < len(found) < 60
    assert all(0 < len(value) <= describe.VALUE_LENGTH for value in found.values())
    assert "training.optimizer.learning_rate" in found


def config(tmp_path: Path, **changes: object) -> DistillConfig:
    settings = {**small_settings(tmp_path, tmp_path / "runs"), **changes}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_config(DistillConfig, str(file))


def test_what_was_overridden_is_a_parameter_though_it_is_the_default(tmp_path: Path) -> None:
    given = config(tmp_path)
    assert "training.checkpoint_every" not in describe.parameters(given)
    overridden = describe.parameters(given, ["training.checkpoint_every=100", "name=other"])
    assert overridden["training.checkpoint_every"] == "100"
    assert "name" not in overridden


def test_a_stage_has_the_keys_of_its_experiment(tmp_path: Path) -> None:
    given = config(tmp_path)
    whole = describe.parameters(given)
    settings = StudentConfig(training=given.training, recipe=given.students["published"])
    plans = [
        ("training", settings, "published", None),
        ("trajectories", given.trajectories, None, None),
        ("benchmark", given.benchmarks["coins"], None, "coins"),
        ("merging", given.merging, "published", None),
    ]
    for stage, part, student, benchmark in plans:
        plan = StagePlan(
            stage=stage,
            student=student,
            benchmark=benchmark,
            config=part.model_dump(mode="json"),
            inputs={"teacher": given.teacher},
            out_dir=str(tmp_path / stage),
        )
        found = describe.stage_parameters(plan)
        assert found.items() <= whole.items()
        assert len(found) > 1


def test_tags_say_by_whom_and_by_which_code() -> None:
    tags = describe.origin_tags(Origin(config="configs/tiny.yaml", overrides=("training.seed=1", "name=a b")))
    assert tags["overrides"] == "training.seed=1 'name=a b'"
    assert tags["config"] == "configs/tiny.yaml"
    assert {"device", "mlflow.source.name", "mlflow.user"} <= set(tags)
    assert all(isinstance(value, str) and value for value in tags.values())


def test_settings_of_the_same_name_are_told_apart() -> None:
    overrides = ["a.test.count=5", "training.seed=1", "a.validation.count=4"]
    assert describe.run_name("tiny", [], overrides) == "tiny (seed=1, test.count=5, validation.count=4)"

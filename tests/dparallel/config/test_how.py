"""Settings are split into those that determine the result and those that do not, at any depth."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import PositiveInt

from dparallel.config.base import HOW, Config, joined
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.config.paths import shipped_configs
from dparallel.config.problems import ProblemsConfig
from dparallel.config.sources import SourceConfig
from dparallel.config.teacher import TeacherConfig


class Inner(Config):
    length: int = 3
    batch_size: Annotated[PositiveInt, HOW] = 4


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()
    named: dict[str, Inner] = {}
    listed: tuple[Inner, ...] = ()
    either: Inner | int = 1
    options: Annotated[dict[str, int], HOW] = {}


def test_what_and_how_at_any_depth() -> None:
    config = Outer(
        named={"x": Inner(batch_size=1)}, listed=(Inner(length=5),), either=Inner(), options={"stage": 2}
    )
    assert config.what() == {
        "name": "a",
        "inner": {"length": 3},
        "named": {"x": {"length": 3}},
        "listed": [{"length": 5}],
        "either": {"length": 3},
    }
    assert config.how() == {
        "inner": {"batch_size": 4},
        "named": {"x": {"batch_size": 1}},
        "listed": {"0": {"batch_size": 4}},
        "either": {"batch_size": 4},
        "options": {"stage": 2},
    }


def test_a_config_without_marked_settings_is_all_what() -> None:
    class Plain(Config):
        numbers: tuple[float, ...] = (0.5, 1)
        maybe: int | None = None

    assert Plain().what() == Plain().model_dump(mode="json")
    assert Plain().how() == {}


def test_both_parts_joined_are_the_settings() -> None:
    config = Outer(
        named={"x": Inner(batch_size=1)}, listed=(Inner(length=5), Inner()), either=Inner(), options={"a": 2}
    )
    assert joined(config.what(), config.how()) == config.model_dump(mode="json")


@pytest.mark.parametrize("file", sorted(path.name for path in shipped_configs().glob("*.yaml")))
def test_settings_of_whole_experiments_are_joined(file: str) -> None:
    model = DistillConfig if "\nstudents:" in (shipped_configs() / file).read_text("utf-8") else TeacherConfig
    config = load_config(model, file)
    assert joined(config.what(), config.how()) == config.model_dump(mode="json")


def test_the_path_of_a_local_source_is_joined(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    sources = (SourceConfig(path="org/on-the-hub"), SourceConfig(path=str(tmp_path / "rows.jsonl")))
    problems = ProblemsConfig(benchmark="dataset", sources=sources)
    assert "path" not in problems.what()["sources"][1]
    assert ProblemsConfig.model_validate(joined(problems.what(), problems.how())) == problems

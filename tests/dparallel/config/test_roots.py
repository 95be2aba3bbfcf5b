"""Paths of runs on a worker stay inside the folders that it allows."""

from pathlib import Path
from typing import Any

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.config.roots import ROOTS, check_inside_roots
from tasks.checks import checked_experiment, checked_teacher

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(ROOTS, f"{tmp_path / 'inside'}, s3://bucket/ours")
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


def tiny(*overrides: str) -> DistillConfig:
    return load_config(DistillConfig, str(CONFIGS / "tiny.yaml"), list(overrides))


@pytest.mark.parametrize(
    "override",
    [
        "runs=runs",
        "runs={0}/inside/a/../b",
        "teacher=somebody/model-7B",
        "store=s3://bucket/ours/deep",
        "store={0}/inside/store",
    ],
)
def test_what_lies_inside(override: str, roots: Path) -> None:
    check_inside_roots(tiny(override.format(roots)).model_dump(mode="json"))


@pytest.mark.parametrize(
    "override",
    [
        "runs={0}/outside",
        "runs={0}/inside/../outside",
        "runs={0}/inside/link/runs",
        "runs=..",
        "runs=/",
        "teacher={0}/outside/model",
        "teacher=../outside",
        "store={0}/outside",
        "store=s3://bucket/oursnot",
        "store=s3://other/ours",
    ],
)
def test_what_lies_outside(override: str, roots: Path) -> None:
    (roots / "inside" / "link").symlink_to(roots / "outside")
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}=.*outside of the folders .* add its folder to {ROOTS}"):
        check_inside_roots(tiny(override.format(roots)).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("problems.path", {"problems": {"path": "/outside/*.jsonl"}}),
        ("problems.path", {"problems": {"path": "/*/rows.jsonl"}}),
        ("problems.path", {"problems": {"path": "data/*/../../../outside/rows.jsonl"}}),
        ("runs", {"runs": "a[b]/../../outside"}),
        ("problems.sources.1.path", {"problems": {"sources": [{"path": "a.jsonl"}, {"path": "../b.jsonl"}]}}),
        ("problems.data_files.test", {"problems": {"data_files": {"test": "/outside/rows.jsonl"}}}),
        ("baselines.rival.model", {"baselines": {"rival": {"model": "/outside/rival"}}}),
        ("launch.hostfile", {"launch": {"hostfile": "/outside/hosts"}}),
        ("out", {"out": "/outside/teacher"}),
    ],
)
def test_settings_at_any_depth(key: str, settings: dict[str, Any], roots: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}=.*outside of the folders"):
        check_inside_roots(settings)


def test_config_files_and_those_that_they_include(roots: Path) -> None:
    secret = roots / "outside" / "own.yaml"
    secret.write_text("secret: value", encoding="utf-8")
    (roots / "inside" / "includes.yaml").write_text(f"training: {secret}", encoding="utf-8")
    for given in (
        lambda: checked_experiment(str(secret)),
        lambda: checked_teacher(str(secret)),
        lambda: checked_experiment("includes.yaml"),
        lambda: checked_experiment("tiny.yaml", [f"training={secret}"]),
    ):
        with pytest.raises(ConfigError, match="outside of the folders") as error:
            given()
        assert "value" not in str(error.value)
    load_config(DistillConfig, "tiny.yaml")  # which comes with the package


def test_without_the_variable_nothing_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", " , "):
        monkeypatch.setenv(ROOTS, value)
        check_inside_roots(tiny("runs=/anywhere").model_dump(mode="json"))

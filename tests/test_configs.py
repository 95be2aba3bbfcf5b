"""Every file in configs/ loads, and opens with a header that says how to run it."""

from pathlib import Path

import pytest

from dparallel.config import BenchmarkConfig, DistillConfig, RecipeConfig, TeacherConfig
from dparallel.config_files import load_config
from dparallel.manifest import verify

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def kind(path: Path):
    if path.parent.name == "recipes":
        return RecipeConfig
    if path.parent.name == "benchmarks":
        return BenchmarkConfig
    return TeacherConfig if path.stem.endswith("teacher") else DistillConfig


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads(path):
    assert load_config(kind(path), path)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# ")
    if kind(path) in (DistillConfig, TeacherConfig):
        for entry in ("command", "hardware", "time", "expect"):
            assert f"#   {entry}" in path.read_text(), f"{path} does not state its {entry}"


def test_the_embedded_teacher_was_made_by_its_config():
    teacher = load_config(TeacherConfig, CONFIGS / "tiny_teacher.yaml")
    manifest = verify(CONFIGS.parent / teacher.out, "teacher")
    assert manifest.config == teacher.model_dump(mode="json")
    assert sum(record.bytes for record in manifest.files.values()) < 6_000_000


def test_zero_settings_are_json():
    assert (
        load_config(DistillConfig, CONFIGS / "tiny.yaml").training.deepspeed["zero_optimization"]["stage"]
        == 2
    )

"""Messages that say what a file or a name is, and what was probably meant."""

import re
from pathlib import Path

import pytest

from dparallel.config.base import Config, ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.config.paths import shipped_configs
from dparallel.config.problems import ProtocolConfig
from dparallel.config.teacher import TeacherConfig


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("tinny", "tiny.yaml"),
        ("tiny", "tiny.yaml"),
        ("nowhere/llada8b.yaml", "llada_8b.yaml"),
        ("mine/smu", "mine/sums.yaml"),
        ("mine/sums.yml", "mine/sums.yaml"),
    ],
)
def test_a_config_of_a_similar_name_is_named(given: str, meant: str, tmp_path: Path) -> None:
    """Near names are looked for beside it and in the package."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sums.yaml").touch()
    with pytest.raises(ConfigError, match=rf"{given}: no such config file .*; did you mean '{meant}'\?$"):
        load_config(DistillConfig, given)
    with pytest.raises(ConfigError, match=r"no such config file \(looked in [^)]*\)$"):
        load_config(DistillConfig, "x" * 100)


def test_a_recipe_is_named_by_its_file() -> None:
    with pytest.raises(
        ConfigError, match=r"got 'recipes/consistensy'; did you mean 'recipes/consistency\.yaml"
    ):
        load_config(DistillConfig, "tiny.yaml", ["students.a=recipes/consistensy"])
    with pytest.raises(ConfigError, match=r"got 'dparalel'; known: recipes/certainty_forcing\.yaml, "):
        load_config(DistillConfig, "tiny.yaml", ["students.a=dparalel"])
    with pytest.raises(ConfigError, match=r"got 'zero2'; did you mean 'deepspeed/zero2\.json'\?"):
        load_config(DistillConfig, "tiny.yaml", ["training.deepspeed=zero2"])


@pytest.mark.parametrize(
    ("model", "file", "message"),
    [
        (
            DistillConfig,
            "recipes/d2f.yaml",
            "is the file of a recipe, not of an experiment: give it as `students",
        ),
        (DistillConfig, "benchmarks/coins.yaml", "is the file of a benchmark, not of an experiment: "),
        (DistillConfig, "tiny_teacher.yaml", "is the file of a tiny teacher, not of an experiment: "),
        (TeacherConfig, "tiny.yaml", "is the file of an experiment, not of a tiny teacher: give it to "),
        (ProtocolConfig, "tiny.yaml", "is the file of an experiment, not of a protocol: "),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_use(model: type[Config], file: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{file}: {re.escape(message)}"):
        load_config(model, shipped_configs() / file)
    with pytest.raises(ConfigError, match="(unknwn: unknown key; .*|required key is missing)"):
        load_config(model, shipped_configs() / file, ["unknwn=1"])


def test_unknown_keys_are_named_with_one_list_of_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="foo: unknown key; bar: unknown key; known: benchmarks, "
    ) as raised:
        load_config(DistillConfig, shipped_configs() / "tiny.yaml", ["foo=1", "bar=2"])
    assert str(raised.value).count("known:") == 1


def test_names_and_empty_sections_are_refused_in_words() -> None:
    for override, message in (
        ("name=a/b", "name: must consist of letters, .*, got 'a/b'"),
        ("students={}", "students: number of entries must be at least 1, got {}"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(DistillConfig, shipped_configs() / "tiny.yaml", [override])

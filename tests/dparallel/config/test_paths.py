"""Relative paths in files, in overrides and in Python, and the configs that come with the package."""

import os
from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.benchmark import Baseline
from dparallel.config.experiment import DistillConfig, LaunchConfig
from dparallel.config.files import load_config, read_settings
from dparallel.config.paths import Written, looks_local, shipped_configs
from dparallel.config.problems import ProblemsConfig
from dparallel.config.sources import SourceConfig
from dparallel.config.teacher import TeacherConfig

CONFIGS = Path(__file__).parents[3] / "configs"
DATASET = "{benchmark: dataset, sources: [{path: PATH}], protocol: {prompt: '{question}'}}"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "setting", ["out", "teacher", "model", "path", "hostfile", "data_files", "chat_template"]
)
def test_a_relative_path_is_relative_to_the_file_that_holds_it(tmp_path: Path, setting: str) -> None:
    """The same file means the same from any working folder, directly and included from another folder."""
    here = tmp_path / "deep" / "configs"
    there = tmp_path / "deep" / "things" / "x"
    there.mkdir(parents=True)
    forms = {
        "out": (TeacherConfig, "{train_steps: 1, out: ../things/x}", lambda c: c.out),
        "teacher": (
            DistillConfig,
            (CONFIGS / "tiny.yaml").read_text(encoding="utf-8").replace("../teachers/tiny", "../things/x"),
            lambda c: c.teacher,
        ),
        "model": (Baseline, "{model: ../things/x, decoding: {}}", lambda c: c.model),
        "path": (SourceConfig, "{path: ../things/x}", lambda c: c.path),
        "hostfile": (LaunchConfig, "{launcher: deepspeed, hostfile: ../things/x}", lambda c: c.hostfile),
        "data_files": (
            ProblemsConfig,
            "{benchmark: lm_eval, task: a, data_files: {test: ../things/x}}",
            lambda c: c.data_files["test"],
        ),
        "chat_template": (
            ProblemsConfig,
            "{benchmark: coins, count: 1, protocol: {chat: true, chat_template: ../things/x}}",
            lambda c: c.protocol.chat_template,
        ),
    }
    kind, text, read = forms[setting]
    file = write(here / "a.yaml", text)
    assert read(load_config(kind, file)) == str(there)
    os.chdir(here)
    assert read(load_config(kind, "a.yaml")) == str(there)
    os.chdir(tmp_path)
    assert read(load_config(kind, os.path.relpath(file))) == str(there)


def test_an_included_file_has_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    write(tmp_path / "sub" / "problems.yaml", DATASET.replace("PATH", "../rows.jsonl"))
    config = CONFIGS / "tiny.yaml"
    override = [f"trajectories.problems={tmp_path}/sub/problems.yaml"]
    assert load_config(DistillConfig, config, override).trajectories.problems.sources[0].path == (
        f"{tmp_path}/rows.jsonl"
    )


def test_overrides_are_relative_to_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "recipe.yaml", (CONFIGS / "recipes" / "d2f.yaml").read_text(encoding="utf-8"))
    overrides = [
        "teacher=mine",
        "runs=../runs",
        "students.d2f=recipe.yaml",
        "students.other=recipes/d2f.yaml",
    ]
    config = load_config(DistillConfig, CONFIGS / "tiny.yaml", overrides)
    assert (config.teacher, config.runs) == (str(tmp_path / "mine"), str(tmp_path.parent / "runs"))
    assert config.students["d2f"] == config.students["other"]


def test_a_name_that_is_no_path_stays_an_id_on_the_hub(tmp_path: Path) -> None:
    file = write(tmp_path / "sub" / "a.yaml", "{path: openai/gsm8k, split: test}")
    source = load_config(SourceConfig, file)
    assert (source.path, source.name) == ("openai/gsm8k", "openai/gsm8k test")
    assert load_config(SourceConfig, file, ["path=a/b@main"]).path == "a/b@main"
    # What cannot be an id is a path, whether it exists or not; so is a pattern.
    for path in ("./rows", "../rows.jsonl", "a/b/c", "data/*.jsonl", "rows/"):
        assert looks_local(path)
        changed = write(tmp_path / "sub" / "b.yaml", f"{{path: '{path}'}}")
        assert load_config(SourceConfig, changed).path == os.path.normpath(tmp_path / "sub" / path)


def test_a_path_that_was_meant_relative_to_the_working_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    file = write(tmp_path / "configs" / "a.yaml", "{path: rows.jsonl}")
    expected = (
        rf"path: 'rows.jsonl' is relative to {tmp_path}/configs, which has none; .* write \.\./rows\.jsonl"
    )
    with pytest.raises(ConfigError, match=expected):
        load_config(SourceConfig, file)


def test_python_and_json_values_are_relative_to_the_working_folder() -> None:
    assert SourceConfig(path="data/rows.jsonl").path == "data/rows.jsonl"
    assert TeacherConfig(out="a", train_steps=1).out == "a"


def test_where_data_lies_is_no_part_of_a_key(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "rows.jsonl", '{"question": "1?"}')
        write(tmp_path / folder / "problems.yaml", DATASET.replace("PATH", "rows.jsonl"))
    first, second = (
        load_config(ProblemsConfig, tmp_path / folder / "problems.yaml") for folder in ("a", "b")
    )
    assert first != second
    assert first.what() == second.what()
    assert first.sources[0].name == second.sources[0].name == "rows.jsonl"
    assert (
        "path"
        in ProblemsConfig(
            benchmark="dataset", sources=[{"path": "a/b"}], protocol={"prompt": "{question}"}
        ).what()["sources"][0]
    )  # an id on the hub matters


def test_configs_come_with_the_package(tmp_path: Path) -> None:
    """From a folder without any config, and from a config outside of the clone."""
    assert shipped_configs() == CONFIGS
    assert load_config(DistillConfig, "tiny.yaml").name == "tiny"
    copy = write(tmp_path / "mine.yaml", (CONFIGS / "tiny.yaml").read_text(encoding="utf-8"))
    mine, shipped = load_config(DistillConfig, copy), load_config(DistillConfig, CONFIGS / "tiny.yaml")
    assert mine == shipped
    # A file of one's own comes first.
    recipe = (CONFIGS / "recipes" / "consistency.yaml").read_text(encoding="utf-8")
    write(tmp_path / "recipes" / "certainty_forcing.yaml", recipe)
    changed = load_config(DistillConfig, copy)
    assert changed.students["certainty_forcing"] == shipped.students["consistency"]
    with pytest.raises(
        ConfigError, match=rf"nothing.yaml: no such config file \(looked in {tmp_path} and {CONFIGS}"
    ):
        load_config(DistillConfig, "nothing.yaml")


def test_validated_settings_hold_plain_text() -> None:
    """`Written` is for loading only: other libraries may treat a subclass of `str` differently."""
    assert isinstance(read_settings(CONFIGS / "tiny.yaml")["name"], Written)

    def texts(value):
        if isinstance(value, dict):
            for part in value.values():
                yield from texts(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from texts(part)
        elif isinstance(value, str):
            yield value

    dumped = load_config(DistillConfig, CONFIGS / "table1_llada.yaml").model_dump()
    assert {type(text) for text in texts(dumped)} == {str}

"""Properties of all settings, at any depth: known keys, strict numbers, paths, overrides."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import PositiveInt

from dparallel.config.base import Config, ConfigError
from dparallel.config.experiment import (
    Baseline,
    DistillConfig,
    LaunchConfig,
    TrainingConfig,
    TrajectoriesConfig,
)
from dparallel.config.files import load_config
from dparallel.config.problems import ProblemsConfig, ProtocolConfig, SourceConfig
from dparallel.config.teacher import TeacherConfig
from tests.conftest import TEACHERS

CONFIGS = Path(__file__).parents[3] / "configs"
OPTIMIZER = {"learning_rate": 1e-3}


class Inner(Config):
    length: PositiveInt = 1


class Outer(Config):
    """All kinds of nested sections."""

    section: Inner = Inner()
    listed: tuple[Inner, ...] = (Inner(),)
    named: dict[str, Inner] = {}
    lists: dict[str, tuple[Inner, ...]] = {}
    pair: tuple[Inner, float] = (Inner(), 1.0)
    either: Inner | int = 1
    maybe: tuple[Inner | None, ...] | None = None


@pytest.mark.parametrize(
    "misspelt",
    [
        {"section": {"lenght": 1}},
        {"listed": [{}, {"lenght": 1}]},
        {"named": {"a.b": {"lenght": 1}}},
        {"lists": {"a": [{"lenght": 1}]}},
        {"pair": [{"lenght": 1}, 2]},
        {"either": {"lenght": 1}},
        {"maybe": [None, {"lenght": 1}]},
    ],
)
def test_a_misspelt_key_is_explained_at_any_depth(misspelt, tmp_path) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps(misspelt), encoding="utf-8")
    for read in (lambda: Outer(**misspelt), lambda: load_config(Outer, tmp_path / "a.yaml")):
        with pytest.raises(ConfigError, match=r"lenght: unknown key; did you mean 'length'\? known: length"):
            read()


def test_a_misspelt_key_of_a_source(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text(
        "{benchmark: dataset, sources: [{path: a}, {path: b, promt: '{q}'}]}", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"sources\.1\.promt: unknown key; did you mean 'prompt'\?"):
        load_config(ProblemsConfig, tmp_path / "a.yaml")


def test_text_and_booleans_are_no_numbers_at_any_depth() -> None:
    for wrong, place in (
        ({"section": {"length": True}}, "section.length"),
        ({"listed": [{"length": "1"}]}, "listed.0.length"),
        ({"lists": {"a": [{"length": False}]}}, "lists.a.0.length"),
        ({"pair": [{}, "1"]}, "pair.1"),
    ):
        with pytest.raises(ConfigError, match=rf"^{place}: Input should be a valid (integer|number), got"):
            Outer(**wrong)
    with pytest.raises(ConfigError, match=r"^train_steps: .*valid integer, got True"):
        TrainingConfig(optimizer=OPTIMIZER, train_steps=True)
    with pytest.raises(ConfigError, match=r"^optimizer\.betas\.0: .*valid number, got '0\.9'"):
        TrainingConfig(optimizer={**OPTIMIZER, "betas": ["0.9", 0.99]}, train_steps=1)
    for text in ('{"length": "1"}', '{"length": true}'):
        with pytest.raises(ValueError, match="valid integer"):
            Inner.model_validate_json(text)


def test_whole_numbers_in_any_spelling() -> None:
    steps = TrainingConfig(optimizer={"learning_rate": 1}, train_steps=1e3).train_steps
    assert (steps, type(steps)) == (1000, int)
    rate = TrainingConfig(optimizer={"learning_rate": 1}, train_steps=1).optimizer.learning_rate
    assert (rate, type(rate)) == (1.0, float)
    with pytest.raises(ConfigError, match=r"^train_steps: .*valid integer.*, got 1\.5"):
        TrainingConfig(optimizer=OPTIMIZER, train_steps=1.5)


def test_homes_are_expanded_once_in_the_settings(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    source = SourceConfig(path="~/data/*.jsonl")
    assert source.path == "/home/me/data/*.jsonl"
    assert SourceConfig(**source.model_dump()) == source
    assert SourceConfig(path="openai/gsm8k").path == "openai/gsm8k"
    assert SourceConfig(path="./~/data").path == "./~/data"
    assert ProtocolConfig(chat=True, chat_template="~/a.jinja").chat_template == "/home/me/a.jinja"
    assert LaunchConfig(launcher="deepspeed", hostfile="~/hosts").hostfile == "/home/me/hosts"
    assert Baseline(model="~/llama", decoding={}).model == "/home/me/llama"
    assert TeacherConfig(out="~/teacher", train_steps=1).out == "/home/me/teacher"
    config = load_config(DistillConfig, CONFIGS / "tiny.yaml", ["runs=~/runs", "teacher=~/teacher"])
    assert (config.runs, config.teacher) == ("/home/me/runs", "/home/me/teacher")
    with pytest.raises(
        ConfigError, match=r"^path: no home folder is known for '~nobody-here': write the path"
    ):
        SourceConfig(path="~nobody-here/data")
    with pytest.raises(ConfigError, match="at least 1 character"):
        SourceConfig(path="")

    monkeypatch.setenv("HOME", str(tmp_path))  # also for settings files
    (tmp_path / "decoding.yaml").write_text("{gen_length: 64}", encoding="utf-8")
    (tmp_path / "a.yaml").write_text(
        "{problems: {benchmark: coins, count: 1}, decoding: ~/decoding.yaml}", encoding="utf-8"
    )
    assert load_config(TrajectoriesConfig, "~/a.yaml").decoding.gen_length == 64


def test_overrides_take_indices_of_lists(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("benchmark: dataset\nsources:\n- {path: a}\n- {path: b, split: test}\n", encoding="utf-8")
    config = load_config(ProblemsConfig, path, ["sources.0.path=c.json", "sources.1.count=1e1"])
    assert [source.path for source in config.sources] == ["c.json", "b"]  # a path, not a file to include
    assert config.sources[1].count == 10
    whole = load_config(ProblemsConfig, path, ["sources.0={path: d, split: validation}"])
    assert (whole.sources[0].path, whole.sources[0].split) == ("d", "validation")
    for override, message in (
        ("sources.2.path=c", r"override 'sources\.2\.path=c': '2' in a list of 2: give an index from 0 to 1"),
        ("sources.-1.path=c", "'-1' in a list of 2: give an index from 0 to 1"),
        ("sources.path=c", "'path' in a list of 2: give an index from 0 to 1"),
        (
            "sources.0.path.x.y=c",
            r"'x' lies below a plain value, not a section: sources\.0\.path is \"a\"; replace it as a whole, "
            r"as 'sources\.0\.path=\{x: \{y: VALUE\}\}', if it may be a section$",
        ),
        (
            "sources.path=c",
            r"; sources is a list: to make it a section, .* as 'sources=\{path: VALUE\}'$",
        ),
        ("sources.0.promt='{q}'", r"sources\.0\.promt: unknown key; did you mean 'prompt'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(ProblemsConfig, path, [override])
    with pytest.raises(ConfigError, match=r"training\.lora\.targets: .* whole list, got \{'0': 'q_proj'\}"):
        load_config(DistillConfig, CONFIGS / "tiny.yaml", ["training.lora.targets.0=q_proj"])
    with pytest.raises(ConfigError, match="'0' in a list of 0: give the whole list"):
        load_config(ProblemsConfig, path, ["sources=[]", "sources.0.path=c"])


def test_overrides_within_lists_of_named_sections(tmp_path) -> None:
    data = {"lists": {"a": [{}, {"length": 2}], "v1.2": [{}]}, "named": {"v1.2": {}}}
    (tmp_path / "a.yaml").write_text(json.dumps(data), encoding="utf-8")
    overrides = ["lists.a.1.length=5", "lists.v1.2.0.length=6", "named.v1.2.length=7"]
    config = load_config(Outer, tmp_path / "a.yaml", overrides)
    assert [inner.length for inner in config.lists["a"]] == [1, 5]
    assert config.lists["v1.2"] == (Inner(length=6),)
    assert config.named == {"v1.2": Inner(length=7)}


def leaves(data, path=()):
    """(keys, value) of all leaves of nested dicts and lists."""
    if not isinstance(data, dict | list):
        yield path, data
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield from leaves(value, (*path, str(key)))


names = st.sampled_from(["a", "b", "0", "v1.2", "c.d.e"])  # if two match, the longest name is used
sections = st.builds(Inner, length=st.integers(1, 10**9))
outers = st.builds(
    Outer,
    section=sections,
    listed=st.lists(sections, max_size=3).map(tuple),
    named=st.dictionaries(names, sections, max_size=3),
    lists=st.dictionaries(names, st.lists(sections, max_size=2).map(tuple), max_size=2),
    pair=st.tuples(sections, st.floats(allow_nan=False, allow_infinity=False)),
)


@settings(max_examples=20)
@given(outers, st.sampled_from(["yaml", "json"]))
def test_what_is_dumped_is_loaded_and_every_leaf_can_be_overridden(config, suffix) -> None:
    dumped = config.model_dump(mode="json")
    wanted = {keys: value + 1 for keys, value in leaves(dumped) if keys[-1] == "length"}
    overrides = [f"{'.'.join(keys)}={value}" for keys, value in wanted.items()]
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        path.write_text(json.dumps(dumped), encoding="utf-8")
        assert load_config(Outer, path) == config
        changed = load_config(Outer, path, overrides).model_dump(mode="json")
    assert dict(leaves(changed)) == dict(leaves(dumped)) | wanted


def test_every_experiment_survives_its_dump(tmp_path) -> None:
    for file in sorted(CONFIGS.glob("*.yaml")):
        kind = TeacherConfig if file in TEACHERS else DistillConfig
        config = load_config(kind, file, ["runs=runs"] if kind is DistillConfig else None)
        (tmp_path / "a.json").write_text(config.model_dump_json(), encoding="utf-8")
        assert load_config(kind, tmp_path / "a.json") == config

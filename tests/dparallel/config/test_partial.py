"""Settings of which all are optional: the form of a flow, and the overrides that it becomes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings as limits
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dparallel.config.base import Config, ConfigError
from dparallel.config.experiment import DistillConfig, TrainingConfig
from dparallel.config.files import _override, load_config, parse_yaml, quoted, split_override
from dparallel.config.partial import descriptions, overrides_of, partial_of
from dparallel.config.teacher import TeacherConfig

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


def models_in(model: type[BaseModel]) -> list[dict[str, Any]]:
    schema = model.model_json_schema()
    return [schema, *schema.get("$defs", {}).values()]


@pytest.mark.parametrize("settings", [DistillConfig, TeacherConfig])
def test_nothing_is_required_and_every_setting_is_described(settings: type[Config]) -> None:
    for schema in models_in(partial_of(settings)):
        if not schema.get("title", "").endswith("Overrides"):
            continue
        assert schema["additionalProperties"] is False
        assert "required" not in schema
        for name, field in schema["properties"].items():
            assert field.get("description"), f"{schema['title']}.{name}"
            assert "default" not in field
    assert partial_of(settings)() is not None


def test_limits_are_those_of_the_settings() -> None:
    form = partial_of(DistillConfig)
    for wrong in (
        {"training": {"views_per_step": 0}},
        {"training": {"precision": "fp8"}},
        {"launch": {"processes": "many"}},
        {"trainin": {}},
        {"training": {"train_stepz": 5}},
        {"students": {"fast": {"certainty_weight": "much"}}},
        {"name": "two words"},
    ):
        with pytest.raises(ValidationError):
            form.model_validate(wrong)


def test_what_is_set_overrides_a_file() -> None:
    given = {
        "name": "short",
        "training": {"train_steps": 5, "lora": {"rank": 4}},
        "students": {"consistency": {"certainty_weight": 0.5}},
        "trajectories": {"problems": {"count": 7}},
    }
    overrides = overrides_of(partial_of(DistillConfig).model_validate(given))
    config = load_config(DistillConfig, str(TINY), overrides)
    before = load_config(DistillConfig, str(TINY))
    assert config.name == "short"
    assert (config.training.train_steps, config.training.lora.rank) == (5, 4)
    assert config.students["consistency"].certainty_weight == 0.5
    assert config.trajectories.problems.count == 7
    assert config.training.lora.alpha == before.training.lora.alpha
    assert config.benchmarks == before.benchmarks
    assert sorted(overrides_of(given)) == sorted(overrides), "values and their JSON give the same"
    assert overrides_of(None) == overrides_of({}) == overrides_of(partial_of(DistillConfig)()) == []


def test_a_null_sets_a_setting_to_null_and_is_refused_where_it_is_no_value(tmp_path: Path) -> None:
    """A key that is left out keeps the file's value; one that is null takes it away."""
    form, file = partial_of(DistillConfig), tmp_path / "limited.yaml"
    file.write_text(f"{TINY.read_text(encoding='utf-8')}\nstore: {tmp_path}/store\n", encoding="utf-8")
    limited = "launch.timeout_hours=3"
    for given, hours in (({}, 3), ({"launch": {}}, 3), ({"launch": {"timeout_hours": None}}, None)):
        overrides = overrides_of(form.model_validate(given))
        assert load_config(DistillConfig, file, [limited, *overrides]).launch.timeout_hours == hours
    assert overrides_of({"store": None}) == ["store=null"]
    assert load_config(DistillConfig, file, ["store=null"]).store is None
    for wrong in (
        {"name": None},
        {"training": None},
        {"training": {"seed": None}},
        {"students": {"a": None}},
    ):
        with pytest.raises(ValidationError):
            form.model_validate(wrong)


def test_texts_that_yaml_would_read_otherwise_stay_texts() -> None:
    given = partial_of(DistillConfig).model_validate({"teacher": "1e3", "runs": "a: b, größe"})
    assert overrides_of(given) == ['teacher="1e3"', 'runs="a: b, größe"']


def test_descriptions_of_several_lines_and_several_names() -> None:
    class Made(Config):
        """What it is.

        Args:
            one, two: both of
                these.
            three: the third: with a colon.

        Raises:
            four: not a setting.
        """

    assert descriptions(Made) == {
        "one": "both of these.",
        "two": "both of these.",
        "three": "the third: with a colon.",
    }
    assert descriptions(TrainingConfig)["train_steps"].startswith("number of train steps")


def test_characters_that_yaml_reads_as_others() -> None:
    for text in ("a\x85b", "a\x7fb", "a\u2028b", "größe 😀\t"):
        [override] = overrides_of({"teacher": text})
        assert parse_yaml(override.removeprefix("teacher="), override) == text


def test_a_name_with_dots_that_the_file_lacks() -> None:
    form = partial_of(DistillConfig)
    block = {"masking": "random", "region": "block", "block_length": 12}
    overrides = overrides_of(form.model_validate({"students": {"a.b": block}}))
    assert sorted(overrides) == [
        'students."a.b".block_length=12',
        'students."a.b".masking="random"',
        'students."a.b".region="block"',
    ]
    before = load_config(DistillConfig, TINY).students
    assert "a.b" not in before
    students = load_config(DistillConfig, TINY, overrides).students
    assert set(students) == {*before, "a.b"}, "the file's stay"
    assert students["a.b"].block_length == 12
    again = load_config(DistillConfig, TINY, [*overrides, "students.a.b.block_length=6"]).students
    assert again["a.b"].block_length == 6, "without quotes once the name is there"


def test_a_section_over_a_plain_value_names_what_is_there() -> None:
    """The form has both kinds of values for a block that may grow, and lists or sections of sweeps."""
    before = ["students.a={masking: random, block_length: 12}"]
    growing = {"students": {"a": {"block_length": {"start": 6, "end": 12}}}}
    with pytest.raises(
        ConfigError, match=r"students\.a\.block_length is 12; .*block_length=\{start: VALUE\}"
    ):
        load_config(DistillConfig, TINY, [*before, *overrides_of(growing)])
    sweeps = {"benchmarks": {"coins": {"student_sweeps": {"consistency": ["entropy"]}}}}
    with pytest.raises(ConfigError, match=r"student_sweeps is a list: .* as .*=\{consistency: VALUE\}"):
        load_config(DistillConfig, TINY, overrides_of(sweeps))
    whole = ["students.a.block_length={start: 6, end: 12}"]
    recipe = load_config(DistillConfig, TINY, [*before, *whole]).students["a"]
    assert recipe.block_length.end == 12


# No sequence of them, joined with dots, is another one.
names = st.sampled_from(["a", "b", "c.d", "", "e=f", '"', '"g', "\\h.", "größe 1", "#"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text("ab.:[{'\"\\\x85 ")
    | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
sections = st.dictionaries(names, st.dictionaries(names, values, max_size=3), max_size=3)


def merged(file: Any, given: Any) -> Any:
    """Oracle: what overrides of nested values have to do."""
    if not isinstance(given, dict):
        return given
    whole = dict(file) if isinstance(file, dict) else {}
    for name, value in given.items():
        if value != {} and leaves(value):
            whole[name] = merged(whole.get(name), value)
    return whole


def leaves(value: Any) -> list[Any]:
    return [leaf for part in value.values() for leaf in leaves(part)] if isinstance(value, dict) else [value]


@limits(max_examples=60)
@drawn(sections, sections)
def test_overrides_change_what_is_given_and_nothing_else(file: dict[str, Any], given: dict[str, Any]) -> None:
    found = file
    try:
        for override in overrides_of({"top": given}):
            found = _override({"top": found}, override)["top"]
    except ConfigError as error:
        assert "below a plain value" in str(error) or "in a list of" in str(error)  # noqa: PT017
        return
    assert found == merged(file, given)


@limits(max_examples=40)
@drawn(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.text(max_size=5))
def test_keys_are_read_as_they_are_written(keys: list[str], value: str) -> None:
    text = ".".join(quoted(key) for key in keys)
    assert split_override(f"{text}={value}") == (keys, value)
    assert split_override(text) == (keys, None)


@limits(max_examples=60)
@drawn(st.text('a."=\\ '))
def test_any_text_is_split(text: str) -> None:
    keys, value = split_override(text)
    assert keys
    if '"' not in text:
        key, equals, after = text.partition("=")
        assert (keys, value) == (key.split("."), after if equals else None)


def test_an_empty_section_keeps_that_of_the_file_and_an_empty_list_replaces_it() -> None:
    form, before = partial_of(DistillConfig), load_config(DistillConfig, TINY)
    for empty in (
        {"students": {}},
        {"benchmarks": {}},
        {"code": {}, "training": {"lora": {}, "deepspeed": {}}},
        {"students": {"new": {}}},
    ):
        assert overrides_of(form.model_validate(empty)) == []
    [override] = overrides_of(form.model_validate({"trajectories": {"problems": {"sources": []}}}))
    assert override == "trajectories.problems.sources=[]"
    with pytest.raises(ValidationError, match="at least 1 item"):  # a list that cannot be empty
        form.model_validate({"training": {"lora": {"targets": []}}})
    assert load_config(DistillConfig, TINY, []) == before

"""Settings of which all are optional: the form of a flow, and the overrides that it becomes."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dparallel.config.base import Config
from dparallel.config.experiment import DistillConfig, TrainingConfig
from dparallel.config.files import load_config, parse_yaml
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

"""Settings given in Prefect's form: checked by the server when a run is submitted, and used by the run."""

from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.utilities.schema_tools.validation import validate

from dparallel.stages.experiment import Experiment
from flows import distill as module
from flows.distill import distill
from flows.teacher import teacher

pytestmark = pytest.mark.usefixtures("prefect_server")
FILE = "configs/tiny.yaml"


@pytest.fixture(scope="module", autouse=True)
def deployment(prefect_server: None) -> None:
    distill.to_deployment(name="form", parameters={"config": FILE}).apply()


def submit(**parameters: Any) -> None:
    run_deployment("distill/form", parameters=parameters, timeout=0, as_subflow=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"training": {"views_per_step": 0}}, "views_per_step|0"),
        ({"training": {"precision": "fp8"}}, "fp8"),
        ({"training": {"train_stepz": 5}}, "train_stepz"),
        ({"launch": {"processes": "many"}}, "many"),
        ({"students": {"consistency": {"certainty_weight": "much"}}}, "much|consistency"),
        ({"unknown": 1}, "unknown"),
        ({"training": {"seed": None}}, "seed"),
        ({"teacher": None}, "teacher"),
        ({"students": {"consistency": None}}, "consistency"),
        ({"students": {"two words": {"masking": "random"}}}, "two words"),
        ({"training": {"lora": {"targets": []}}}, "targets"),
    ],
)
def test_the_server_refuses_what_cannot_be(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(PrefectHTTPStatusError, match=named):
        submit(settings=settings)
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
    assert settings not in [run.parameters.get("settings") for run in runs]


@pytest.mark.parametrize("flow", [distill, teacher])
def test_null_is_a_value_in_the_form_where_it_is_one_of_the_setting(flow: Any) -> None:
    schema = flow.parameters.model_dump_for_openapi()
    for model, part in schema["definitions"].items():
        whole = {**schema, "properties": {"part": {"$ref": f"#/definitions/{model}"}}, "required": []}
        for name, setting in part.get("properties", {}).items():
            mistakes = validate({"part": {name: None}}, whole, ignore_required=True)
            nullable = {"type": "null"} in setting.get("anyOf", [])
            assert (not mistakes) == nullable, f"{model}.{name}"


def test_the_server_takes_empty_sections_and_nulls_that_are_values() -> None:
    submit(settings={"students": {}, "benchmarks": {}, "training": {}, "store": None})


def test_valid_settings_override_the_file_and_text_overrides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"name": "short", "training": {"train_steps": 5, "views_per_step": 8}}
    submit(settings=given)
    seen: list[Experiment] = []
    monkeypatch.setattr(module, "run", lambda experiment, on_pools: seen.append(experiment) or "")
    monkeypatch.chdir(module.__file__.rpartition("/flows/")[0])
    distill(FILE, ["training.train_steps=7", f"runs={tmp_path}"], settings=given)
    [experiment] = seen
    assert experiment.config.name == "short"
    assert experiment.config.training.train_steps == 7
    assert experiment.config.training.views_per_step == 8
    assert experiment.snapshot.overrides[:2] == ('name="short"', "training.train_steps=5")

"""Containers, units, work pools and automations: checked as far as that goes without running them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.server.api import collections

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = DEPLOY / "docker" / "compose.yaml"
CONDITIONS = {"service_healthy", "service_completed_successfully"}


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpus.yaml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    written = yaml.safe_load((DEPLOY / "docker" / name).read_text(encoding="utf-8"))
    assert [error.message for error in validator.iter_errors(written)] == []
    written["services"]["worker-gpu"]["depends"] = []
    assert len(list(validator.iter_errors(written))) == 1


def test_services_wait_for_services_that_tell_when_they_are_ready() -> None:
    services = compose()["services"]
    workers = {name for name in services if name.startswith("worker-")}
    assert workers == {"worker-cpu", "worker-gpu"}
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] in CONDITIONS
            waited_for = services[other]
            assert ("healthcheck" in waited_for) == (how["condition"] == "service_healthy"), (name, other)
            if how["condition"] != "service_healthy":
                assert waited_for.get("restart", "no") == "no", f"{other} would never complete"


def test_volumes_and_configs_are_declared() -> None:
    declared = compose()
    for service in declared["services"].values():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in declared["volumes"]
        for config in service.get("configs", []):
            assert config["source"] in declared["configs"]


def test_variables_of_compose_are_in_the_settings_file_and_passwords_have_no_default() -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    template = (DEPLOY / "settings.env").read_text(encoding="utf-8")
    variables = dict(re.findall(r"\$\{(\w+)(:[?-])", text))
    assert set(variables) == set(re.findall(r"\$\{?(\w+)", text))
    for name, kind in variables.items():
        assert re.search(rf"^#? ?{name}=", template, re.MULTILINE), name
        assert (kind == ":?") == name.endswith("PASSWORD")


def test_ports_are_published_on_loopback() -> None:
    published = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("${DPARALLEL_HOST:-127.0.0.1}:") for port in published)


def test_gpus_are_given_to_a_service_that_exists() -> None:
    extra = yaml.safe_load((DEPLOY / "docker" / "compose.gpus.yaml").read_text(encoding="utf-8"))
    assert set(extra["services"]) <= set(compose()["services"])


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    root = DEPLOY.parent
    kept = {
        line[1:]
        for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    lines = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied == kept
    assert all((root / name).exists() for name in copied)


@pytest.fixture(scope="module")
def known_templates() -> dict[str, dict[str, Any]]:
    """Prefect's own base job templates by type of the worker, also of Docker's and Kubernetes' workers."""
    file = Path(collections.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"
    packages = json.loads(file.read_text(encoding="utf-8"))
    return {
        kind: worker["default_base_job_configuration"]
        for package in packages.values()
        for kind, worker in package.items()
    }


@pytest.mark.parametrize("file", sorted((DEPLOY / "pools").glob("*.json")), ids=lambda file: file.stem)
def test_pools_differ_from_prefects_templates_in_defaults_only(
    file: Path, known_templates: dict[str, dict[str, Any]]
) -> None:
    ours = json.loads(file.read_text(encoding="utf-8"))
    known = known_templates[file.stem.split("-")[0]]
    assert set(ours["job_configuration"]) == set(known["job_configuration"])
    variables, their = ours["variables"]["properties"], known["variables"]["properties"]
    assert set(variables) - set(their) <= {"gpus"}, "of Kubernetes only"
    for name in their:
        assert {**variables[name], "default": 0} == {**their[name], "default": 0}
        if "enum" in their[name] and "default" in variables[name]:
            assert variables[name]["default"] in their[name]["enum"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used == set(variables)


UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def test_units_run_programs_of_the_environment_with_the_settings_file() -> None:
    assert len(UNITS) == 3
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        assert "\nEnvironmentFile=-/srv/dparallel/.env\n" in text
        assert re.search(
            r"\nExecStart=.*/srv/dparallel/\.venv/bin/(prefect|mlflow|python -m flows.worker) ", text
        )
        assert "0.0.0.0" not in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """With a program that is there: those of the units are not on this machine."""
    for unit in UNITS:
        text = re.sub(r"/srv/dparallel/\.venv/bin/\w+", "/bin/true", unit.read_text(encoding="utf-8"))
        (tmp_path / unit.name.replace("@", "@gpu")).write_text(text, encoding="utf-8")
    files = sorted(tmp_path.glob("*.service"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, encoding="utf-8"
    )
    complaints = [line for line in done.stderr.splitlines() if "dparallel" in line]
    assert complaints == []

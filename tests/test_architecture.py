"""The house: prefect.yaml -> flows -> tasks -> dparallel, one direction, read from the imports."""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

from tests.test_encoding import unencoded

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "dparallel": {"flows", "tasks", "prefect", "mlflow"},
    "tasks": {"flows"},
    "flows": {"mlflow"},
}
SOURCES = [path for storey in FORBIDDEN for path in sorted((ROOT / storey).rglob("*.py"))]
LIBRARIES = {
    *("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "evaluate", "pyarrow"),
    *("prefect", "mlflow", "pydantic", "yaml", "matplotlib", "numpy", "huggingface_hub", "safetensors"),
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports break where Prefect loads a flow by its path"
            found.add((node.module or "").split(".")[0])
    return found


def storey(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert not imported(path) & FORBIDDEN[storey(path)]


def test_only_tracking_knows_mlflow() -> None:
    knowing = {path.relative_to(ROOT).as_posix() for path in SOURCES if "mlflow" in imported(path)}
    assert knowing == {"tasks/tracking/upload.py", "tasks/tracking/registry.py"}


def test_flows_reach_the_library_for_types_only() -> None:
    """What a flow needs done is a task."""
    allowed = {"dparallel.stages.experiment", "dparallel.config.experiment"}
    for path in (ROOT / "flows").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dparallel"):
                assert node.module in allowed, f"{path} imports {node.module}"


def test_no_module_shadows_a_library() -> None:
    """Prefect puts a flow file's folder first on sys.path."""
    for path in [*(ROOT / "flows").glob("*.py"), *(ROOT / "tasks").glob("*.py")]:
        assert path.stem not in LIBRARIES | set(sys.stdlib_module_names), path


def test_every_text_file_is_opened_as_utf_8() -> None:
    """Files do not depend on the locale they are read and written in."""
    for folder in (*FORBIDDEN, "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = list(unencoded(ast.parse(path.read_text(encoding="utf-8"))))
            assert not lines, f'{path}, lines {lines}: give encoding="utf-8" ("utf-8-sig" where users write)'


def deployments() -> dict[str, tuple[Flow, dict[str, Any]]]:
    """What prefect.yaml deploys: its flow and its settings, by the deployment's full name."""
    found = {}
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]:
        file, function = deployment["entrypoint"].split(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), function)
        assert isinstance(flow, Flow)
        found[f"{flow.name}/{deployment['name']}"] = (flow, deployment)
    return found


def test_every_deployment_names_a_flow_and_its_parameters() -> None:
    for flow, deployment in deployments().values():
        flow.validate_parameters(deployment["parameters"])
        assert deployment["work_pool"]["name"] in ("cpu", "gpu")
        assert (ROOT / deployment["parameters"]["config"]).is_file()
    stages = ["trajectories", "training", "merging", "benchmark", "teacher"]
    expected = {"distill/full", "shards/part", "measurements/part", *(f"{stage}/stage" for stage in stages)}
    assert set(deployments()) == expected

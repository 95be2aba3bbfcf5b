"""The architecture: prefect.yaml -> flows -> tasks -> dparallel, in one direction, checked on the imports.

deploy/ stands beside it: it starts the others as processes, imports none of them, and is imported by none.

Inside dparallel/, packages are ordered by level, and a package imports only from lower levels.
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

from deploy.local.down import PART
from flows.dispatch import DEPLOYMENTS
from tests.test_encoding import unencoded

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "dparallel": {"flows", "tasks", "prefect", "mlflow", "deploy"},
    "tasks": {"flows", "deploy"},
    "flows": {"mlflow", "deploy"},
    "deploy": {"dparallel", "flows", "tasks", "mlflow", "prefect"},  # importing them takes seconds
}
FLOORS: list[set[str]] = [  # of the rooms in dparallel/, the lowest first
    {"rules"},
    {"config"},
    {"stages"},
    {"models"},
    {"decoding"},
    {"problems"},
    {"trajectories"},
    {"distillation"},
    {"evaluation", "tiny", "pages"},
    {"reporting", "serving"},
    {"preflight"},
    {"cli"},
    {"dparallel"},  # the files at the root: the public API
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = [path for storey in FORBIDDEN for path in sorted((ROOT / storey).rglob("*.py"))]
LIBRARIES = {
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "datasets",
    "evaluate",
    "pyarrow",
    "prefect",
    "mlflow",
    "pydantic",
    "yaml",
    "matplotlib",
    "numpy",
    "huggingface_hub",
    "safetensors",
}


def imported_modules(path: Path, tree: ast.Module) -> set[str]:
    """Dotted names that a file imports, at any place; `from package import name` gives both."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports break where Prefect loads a flow by its path"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported_modules(path, parsed(path))}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def rooms_entered(path: Path, tree: ast.Module) -> set[str]:
    """Packages of dparallel/ from which a file imports; `dparallel` stands for its top level."""
    parts = [name.split(".") for name in imported_modules(path, tree)]
    return {
        second[0] if second[0] in FLOOR else "dparallel" for first, *second in parts if first == "dparallel"
    }


def arrows_back(room: str, entered: set[str]) -> set[str]:
    return {other for other in entered if other != room and FLOOR[other] >= FLOOR[room]}


def storey(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert not imported(path) & FORBIDDEN[storey(path)]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "dparallel").parts
    return parts[0] if len(parts) > 1 else "dparallel"


LIBRARY = [path for path in SOURCES if storey(path) == "dparallel"]


def test_every_room_has_a_floor() -> None:
    folders = {path.parent.name for path in (ROOT / "dparallel").glob("*/__init__.py")}
    assert folders | {"dparallel"} == set(FLOOR)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_runs_back(path: Path) -> None:
    """Imports inside functions count as well."""
    back = arrows_back(room(path), rooms_entered(path, parsed(path)))
    assert not back, f"{path} imports from {back}, which stands no lower than {room(path)}"


@pytest.mark.parametrize(
    ("statement", "back"),
    [
        ("import torch", set()),
        ("from dparallel.models.lora import wrap", set()),
        ("from dparallel.decoding import predictions", set()),
        ("from dparallel.evaluation import metrics", {"evaluation"}),
        ("import dparallel.cli.main", {"cli"}),
        ("def later():\n    from dparallel.tiny.tokenizer import build_tokenizer", {"tiny"}),
        ("from dparallel import config", set()),
        ("from dparallel import preflight", {"preflight"}),
        ("from dparallel import generate", {"dparallel"}),
    ],
)
def test_an_arrow_that_runs_back_is_found(statement: str, back: set[str]) -> None:
    assert arrows_back("trajectories", rooms_entered(Path("written.py"), ast.parse(statement))) == back


def test_rooms_on_one_floor_do_not_import_each_other() -> None:
    assert arrows_back("tiny", {"evaluation", "distillation", "tiny"}) == {"evaluation"}


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_code_hides_in_a_package_file(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    hidden = [node.name for node in ast.walk(parsed(path)) if isinstance(node, kinds)]
    assert not hidden, f"{path} defines {', '.join(hidden)}: give them a module of their own"
    calls = [
        ast.unparse(line) for line in parsed(path).body if isinstance(getattr(line, "value", None), ast.Call)
    ]
    assert not calls, f"{path} calls {', '.join(calls)}: importing a package must have no effect"


def test_only_tracking_knows_mlflow() -> None:
    knowing = {path.relative_to(ROOT).as_posix() for path in SOURCES if "mlflow" in imported(path)}
    assert {name.rpartition("/")[0] for name in knowing} == {"tasks/tracking"}
    without = {"records", "links", "describe", "promotion", "view"}
    assert not knowing & {f"tasks/tracking/{name}.py" for name in without}


def test_flows_reach_the_library_for_types_only() -> None:
    """Flows do all work through tasks; their command line shows progress and encodes its own streams."""
    allowed = {"dparallel.stages.experiment", "dparallel.config.experiment", "dparallel.config.base"}
    allowed |= {"dparallel.stages.arguments", "dparallel.config.teacher"}
    allowed |= {"dparallel.stages.streams", "dparallel.stages.progress"}
    allowed |= {"dparallel.stages.origin", "dparallel.version"}  # the version of the flows
    allowed |= {"dparallel.stages.starting"}  # before torch is imported
    allowed |= {"dparallel.stages.permissions"}  # errors of the command line
    allowed |= {"dparallel.stages.files"}  # temporary files at a hard end
    for path in (ROOT / "flows").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dparallel"):
                assert node.module in allowed, f"{path} imports {node.module}"


def test_no_module_shadows_a_library() -> None:
    """Prefect puts a flow file's folder first on sys.path."""
    for path in [*(ROOT / "flows").glob("*.py"), *(ROOT / "tasks").glob("*.py")]:
        assert path.stem not in LIBRARIES | set(sys.stdlib_module_names), path


def test_every_text_file_is_opened_as_utf_8() -> None:
    """File contents do not depend on the locale."""
    for folder in (*FORBIDDEN, "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = list(unencoded(ast.parse(path.read_text(encoding="utf-8"))))
            assert not lines, f'{path}, lines {lines}: give encoding="utf-8" ("utf-8-sig" where users write)'


def deployments() -> dict[str, tuple[Flow, dict[str, Any]]]:
    """Flow and settings of the deployments in prefect.yaml, by full name."""
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
    assert set(deployments()) == {"distill/full", "teacher/pretrain", *DEPLOYMENTS.values()}


def test_what_only_other_runs_start_is_tagged_as_a_part() -> None:
    """`make down` prints no command that goes on with these."""
    parts = {name for name, (_, deployment) in deployments().items() if PART in deployment["tags"]}
    assert parts == {DEPLOYMENTS["shards"], DEPLOYMENTS["measurements"]}


def test_deployments_are_told_apart_by_their_names_alone() -> None:
    names = [deployment["name"] for _, deployment in deployments().values()]
    assert len(set(names)) == len(names)
    assert all(deployment["description"] for _, deployment in deployments().values())

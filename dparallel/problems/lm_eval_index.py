"""Tasks of lm-eval by name, and which of them can be used.

lm-eval parses 14,000 YAML files to know its tasks, which takes 10 to 30 s. Here their lines are searched,
which takes 0.3 s, and lm-eval parses only the folder of the task. Unknown names are refused without importing
lm-eval.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dparallel.problems.sources import ProblemsError

# `task: NAME`, `tag: [A, B]`, `group:` followed by a list
_LINE = re.compile(r"""^["']?(task|group|tag|class)["']?[ \t]*:(.*)((?:\n[ \t]*-[ \t].*)*)""", re.MULTILINE)
_NAME = re.compile(r"""[^\s"'\[\],{}]+""")
_OTHERS = (".py", ".pyc", ".md", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".jpg", ".png")


@dataclass
class Names:
    """Names in lm-eval's YAML files, and the file of each; of equal names the first file counts, as there.

    Attributes:
        tags: names that tasks share.
    """

    tasks: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@cache
def names() -> Names:
    """All names, found by the lines of the files.

    Raises:
        ProblemsError: lm-eval is missing.
    """
    found = Names()
    for file in _files(_folder()):
        with open(file, encoding="utf-8", errors="replace") as opened:
            lines = {kind: _values(value, items) for kind, value, items in _LINE.findall(opened.read())}
        for tag in lines.get("tag", ()):
            found.tags.setdefault(tag, file)
        if file.endswith(".yaml"):  # others are included by tasks
            grouped = "group" in lines and "class" not in lines
            named, kind = (found.groups, "group") if grouped else (found.tasks, "task")
            for name in lines.get(kind, ())[:1]:
                named.setdefault(name, file)
    return found


def _folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ProblemsError(
            "benchmark='lm_eval' needs lm-eval, which is not installed: pip install 'dparallel[lm-eval]'"
        )
    return Path(spec.origin).parent / "tasks"


def _files(root: Path) -> list[str]:
    """In lm-eval's order. Files that tasks include have any name."""
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path for path in paths if not path.endswith(_OTHERS))


def _values(value: str, items: str) -> list[str]:
    lines = [value, *(line.lstrip(" \t-") for line in items.splitlines())]
    return [name for line in lines for name in _NAME.findall(line.partition("#")[0])]


def manager(name: str) -> Any:
    """A TaskManager of lm-eval that knows the task `name`.

    Raises:
        ProblemsError: lm-eval is missing, or `name` is unknown or a group of tasks.
    """
    try:
        found = names()
    except ProblemsError as error:
        raise ProblemsError(f"task={name!r}: {error}") from error
    if name not in found.tasks:
        raise ProblemsError(_no_task(name, found))
    try:
        tasks = lm_eval_module("tasks")
    except ProblemsError as error:
        raise ProblemsError(f"task={name!r}: {error}") from error
    return tasks.TaskManager(include_path=os.path.dirname(found.tasks[name]), include_defaults=False)


def lm_eval_module(name: str) -> Any:
    """A module of lm-eval, which takes seconds to import.

    Raises:
        ProblemsError: lm-eval, or a package that it needs, is missing.
    """
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as error:
        reason = " ".join(str(error).split())  # names what is missing
        raise ProblemsError(
            f"lm-eval cannot be imported ({reason}): install all that it needs: "
            "pip install 'dparallel[lm-eval]'"
        ) from error


def _no_task(name: str, found: Names) -> str:
    if file := found.groups.get(name) or found.tags.get(name):
        folder = os.path.dirname(file) + os.sep
        listed = list(dict.fromkeys(_members(name, found, set())))
        members = listed or [task for task, place in found.tasks.items() if place.startswith(folder)]
        if not members:
            return f"task={name!r} is a group of tasks of lm-eval without names: choose another task"
        some = ", ".join(members[:5])
        return f"task={name!r} is a group of tasks of lm-eval: name one of its tasks, such as {some}"
    near = difflib.get_close_matches(name, found.tasks, n=5)
    similar = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown task={name!r} of lm-eval; {similar}`lm-eval ls subtasks` lists all"


def _members(group: str, found: Names, seen: set[str]) -> Iterator[str]:
    """The tasks that a group's file lists, also those of groups in it."""
    if group in seen or group not in found.groups:
        return
    seen.add(group)
    with open(found.groups[group], encoding="utf-8", errors="replace") as opened:
        settings = yaml.load(opened, _Plain)
    for member in _listed(settings):
        if member in found.tasks:
            yield member
        else:
            yield from _members(member, found, seen)


class _Plain(yaml.SafeLoader):
    """Reads `!function FILE.NAME` and other tags as nothing."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


def _listed(settings: Any) -> Iterator[str]:
    """Names in a group's list of tasks: texts, settings of a task, or groups within the group."""
    members = settings.get("task") if isinstance(settings, dict) else settings
    if isinstance(members, str):
        yield members
    elif isinstance(members, list):
        for member in members:
            yield from _listed(member)


@cache
def task_settings(name: str) -> dict[str, Any]:
    """The settings in a task's file, without the functions that it names.

    Raises:
        ProblemsError: lm-eval is missing, or the task is unknown or cannot be used.
    """
    entry = manager(name).task_index.get(name)
    if entry is None:
        raise ProblemsError(f"task={name!r}: lm-eval cannot read {names().tasks[name]}; choose another task")
    settings: dict[str, Any] = entry.cfg or {}
    kind = settings.get("output_type", "generate_until")
    if "class" in settings:
        reason = "is written in Python, without settings that can be read"
    elif kind != "generate_until":
        reason = f"is of the type {kind}, and only generate_until can be decoded in parallel"
    elif settings.get("unsafe_code"):
        raise ProblemsError(_unsafe(name))
    elif settings.get("doc_to_image") or settings.get("doc_to_audio"):
        reason = "asks about pictures or sounds"
    else:
        return settings
    raise ProblemsError(f"task={name!r} of lm-eval {reason}; choose another task")


def metrics(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a task's settings."""
    return settings.get("metric_list") or [{"metric": "exact_match"}]


def metric_name(metric: str) -> str:
    """Name of a metric; functions are written as FILE.NAME."""
    return metric.rpartition(".")[2] if "/" in metric else metric


def _unsafe(name: str) -> str:
    """The remedy for a task that runs generated code in the judge's own process."""
    said = f"task={name!r} of lm-eval runs generated code without a sandbox"
    for benchmark in ("humaneval", "mbpp"):
        if name.startswith(benchmark):
            return (
                f"{said}: take our own protocol of the same problems, which runs their tests in one: "
                f"--protocol {benchmark}_llada, or another one of {benchmark}_*"
            )
    return f"{said}, and there is no protocol of the same problems here: choose another task"

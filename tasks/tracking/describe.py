"""What a run is called and described by: its name, tags, and the few parameters that people compare by."""

import getpass
import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from dparallel.config.base import Config
from dparallel.config.experiment import BenchmarkConfig, DistillConfig, TrajectoriesConfig
from dparallel.config.files import split_override
from dparallel.config.problems import EMBEDDED, ProblemsConfig
from dparallel.stages.experiment import StagePlan
from dparallel.stages.origin import Origin

NAMED = 3  # students and overrides that a name lists
NAME_LENGTH = 120
VALUE_LENGTH = 500
WHERE = ("name", "runs", "launch", "code")  # settings that are no part of what is compared
# Also logged where they have their defaults.
COMPARED = (
    "training.lora.rank",
    "training.lora.alpha",
    "training.optimizer.learning_rate",
    "training.optimizer.schedule",
    "training.seed",
    "training.only_correct",
)
# Long texts and lists, which are in config.yaml, are left out: a protocol is named by a tag.
LEFT_OUT = ("protocol", "sources", "columns", "deepspeed")


def run_name(name: str, parts: Iterable[str], overrides: Iterable[str]) -> str:
    """A short name that is the same for the same settings: `tiny: consistency, d2f (seed=1)`.

    Args:
        name: of the experiment, or of a stage of it.
        parts: its students, or what the stage works on.
        overrides: settings `key.sub=value`, in any order.
    """
    listed = list(parts)
    listed = [f"{len(listed)} students"] if len(listed) > NAMED else listed
    return with_changes(f"{name}: {', '.join(listed)}" if listed else name, overrides)


def with_changes(name: str, overrides: Iterable[str]) -> str:
    """A name with what was overridden, in short and in the same order for all runs: `tiny (seed=1)`."""
    shown = [text for text in overrides if _key(text) not in ("name", "runs")]
    last = Counter(key.rpartition(".")[2] for key in {_key(text) for text in shown})
    changes = sorted(_short(text, 1 if last[_key(text).rpartition(".")[2]] == 1 else 2) for text in shown)
    left = f", {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    changed = ", ".join(changes[:NAMED]) + left
    return textwrap.shorten(f"{name} ({changed})" if changed else name, NAME_LENGTH, placeholder=" …")


def _key(override: str) -> str:
    return ".".join(split_override(override)[0]).strip()


def _short(override: str, parts: int) -> str:
    """`training.seed=1` as `seed=1`, or with more parts of the key."""
    key, (_, value) = _key(override), split_override(override)
    shown = textwrap.shorten((value or "").strip(), 24, placeholder="…")
    return f"{'.'.join(key.split('.')[-parts:])}={shown}"


def parameters(config: DistillConfig, overrides: Iterable[str] = ()) -> dict[str, str]:
    """Parameters of a whole experiment; the same keys as those of its stages."""
    found = {"teacher": config.teacher, "students": ", ".join(config.students)}
    found |= _trajectories(config.trajectories)
    found |= section("training", config.training)
    for name, recipe in config.students.items():
        found |= section(f"students.{name}", recipe)
    found |= section("merging", config.merging)
    for name, benchmark in config.benchmarks.items():
        found |= _benchmark(name, benchmark)
    everything = dict(_flat(config.model_dump(mode="json")))
    keys = [_key(text) for text in overrides]
    found |= {key: everything[key] for key in keys if key in everything and key.split(".")[0] not in WHERE}
    return _texts(found)


def stage_parameters(plan: StagePlan) -> dict[str, str]:
    """Parameters of a stage, under the keys that they have in the config of the experiment."""
    settings = plan.settings()
    if plan.stage == "training":
        found = section("training", settings.training) | section(f"students.{plan.student}", settings.recipe)
    elif isinstance(settings, TrajectoriesConfig):
        found = _trajectories(settings)
    elif isinstance(settings, BenchmarkConfig):
        found = _benchmark(plan.benchmark or "benchmark", settings)
    else:
        found = section(plan.stage, settings)
    teacher = plan.inputs.get("teacher")
    return _texts(({"teacher": teacher} if teacher else {}) | found)


def section(prefix: str, config: Config) -> dict[str, Any]:
    """The settings that determine the result and differ from their defaults, and those of `COMPARED`."""
    changed = dict(_flat(config.model_dump(mode="json", exclude_defaults=True), f"{prefix}."))
    how = {key for key, _ in _flat(config.how(), f"{prefix}.")}
    found = {key: value for key, value in changed.items() if key not in how and not _is_left_out(key)}
    everything = dict(_flat(config.model_dump(mode="json"), f"{prefix}."))
    return found | {key: everything[key] for key in COMPARED if key in everything}


def _trajectories(config: TrajectoriesConfig) -> dict[str, Any]:
    found = section("trajectories", config)
    found.pop("trajectories.problems.benchmark", None)
    return {"trajectories.problems": dataset_name(config.problems)} | found


def _benchmark(name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """What a benchmark is about; its many decodings are in config.yaml."""
    found: dict[str, Any] = {
        f"benchmarks.{name}.{split}": dataset_name(problems) for split, problems in config.splits().items()
    }
    counts = {split: problems.count for split, problems in config.splits().items()}
    found |= {f"benchmarks.{name}.{split}.count": count for split, count in counts.items() if count}
    return found | {f"benchmarks.{name}.max_loss": config.max_loss}


def _is_left_out(key: str) -> bool:
    return any(part in LEFT_OUT for part in key.split("."))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def _texts(found: Mapping[str, Any]) -> dict[str, str]:
    plain = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in found.items()
        if value not in (None, [], {})
    }
    return {key: textwrap.shorten(value, VALUE_LENGTH, placeholder=" …") for key, value in plain.items()}


def dataset_name(problems: ProblemsConfig) -> str:
    """Name of a set of problems, such as `coins-test` or `openai/gsm8k`."""
    if problems.benchmark in EMBEDDED:
        return f"{problems.benchmark}-{problems.split}"
    if problems.task is not None:
        return problems.task
    paths = dict.fromkeys(source.path for source in problems.sources or problems.protocol.data)
    return ", ".join(paths) or problems.benchmark


def origin_tags(origin: Origin) -> dict[str, str]:
    """Tags that say by whom, by which code and on which device a run is made."""
    recorded = origin.recorded()
    command = [word for word in sys.argv if word]
    tags: dict[str, Any] = {
        "commit": recorded["commit"],
        "uncommitted_changes": recorded["uncommitted_changes"],
        "device": recorded["hardware"],
        "config": recorded["config"],
        "overrides": shlex.join(recorded["overrides"]),
        "mlflow.user": _user(),
        "mlflow.source.name": shlex.join([os.path.basename(command[0]), *command[1:]]) if command else None,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": recorded["commit"],
    }
    return {
        key: str(value).lower() if isinstance(value, bool) else str(value)[:VALUE_LENGTH]
        for key, value in tags.items()
        if value not in (None, "")
    }


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return None


def experiment_tags(config: DistillConfig, family: str | None) -> dict[str, str]:
    """Tags of a whole experiment."""
    problems = [benchmark.test for benchmark in config.benchmarks.values()]
    return _tags(
        family=family,
        recipe=", ".join(config.students),
        teacher=config.teacher,
        dataset=", ".join(dict.fromkeys(dataset_name(each) for each in problems)),
        protocol=", ".join(_protocol(name, benchmark.test) for name, benchmark in config.benchmarks.items()),
    )


def stage_tags(plan: StagePlan, family: str | None) -> dict[str, str]:
    """Tags of a stage."""
    settings: BaseModel = plan.settings()
    problems = getattr(settings, "problems", None) or getattr(settings, "test", None)
    return _tags(
        family=family,
        recipe=plan.student,
        student=plan.student,
        benchmark=plan.benchmark,
        teacher=plan.inputs.get("teacher"),
        dataset=dataset_name(problems) if problems is not None else None,
        protocol=_protocol(plan.benchmark or plan.stage, problems) if problems is not None else None,
    )


def _protocol(name: str, problems: ProblemsConfig) -> str:
    scorers = "+".join(problems.protocol.scorers)
    return f"{name} version {problems.protocol.version}, judged by {scorers}"


def _tags(**found: str | None) -> dict[str, str]:
    return {key: value for key, value in found.items() if value}

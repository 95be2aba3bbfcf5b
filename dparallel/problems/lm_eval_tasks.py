"""Tasks of lm-eval (lm-evaluation-harness): its prompts, stop texts, filters and metrics, our decoding.

lm-eval is optional: `pip install 'dparallel[lm_eval]'`. Tested with 0.4.13.
"""

import difflib
import importlib.util
import re
import zlib
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dparallel.config.base import nearest
from dparallel.config.problems import LM_EVAL, ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.sources import Problem, ProblemsError, json_value, selected

EXAMPLE_SEED = 1234  # lm-eval's default seed of few-shot examples
READERS = {".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet"}


def protocol_of_task(config: ProblemsConfig) -> ProtocolConfig:
    """The protocol of `config` with the stop texts of its task.

    The system text is a part of the problems, since lm-eval joins it with the task's description.

    Raises:
        ProblemsError: lm-eval is missing, or the task is unknown or cannot be used.
    """
    assert config.task is not None
    until = task_settings(config.task).get("generation_kwargs", {}).get("until", [])
    stops = [until] if isinstance(until, str) else until
    return config.protocol.model_copy(
        update={"stops": tuple(dict.fromkeys(filter(None, stops))), "system": None}
    )


def task_problems(config: ProblemsConfig) -> list[Problem]:
    """The selected problems of a task of lm-eval, as its own requests ask them.

    Raises:
        ProblemsError: as `protocol_of_task`; or the data cannot be read or lack a split.
    """
    assert config.task is not None
    task = open_task(config.task, config.num_fewshot, tuple(config.data_files.items()))
    task.set_fewshot_seed(EXAMPLE_SEED)
    given = {"task": config.task, "num_fewshot": config.num_fewshot, "data_files": dict(config.data_files)}
    problems = [
        Problem(
            problem_id=f"{config.task}-{number:05d}",
            source=f"lm_eval {config.task}",
            reference=_reference(task, doc),
            extra={"doc": json_value(f"{config.task}, row {number}", "doc", dict(doc)), LM_EVAL: given},
            **_asked(task, doc, config.protocol),
        )
        for number, doc in enumerate(task.eval_docs, 1)
    ]
    _check_metrics(config, problems[0])
    return selected(problems, config, f"lm_eval {config.task}")


def _check_metrics(config: ProblemsConfig, problem: Problem) -> None:
    """Raise a ProblemsError for a metric that is not 0 or 1 for right, half right and empty responses."""
    right = problem.reference or ""
    for name in (name for name in config.protocol.scorers if name.startswith(f"{LM_EVAL}:")):
        for response in ("", right, right[: len(right) // 2], f"{right} {right}"):
            scorer(name).score([problem], [response])


def _asked(task: Any, doc: dict[str, Any], protocol: ProtocolConfig) -> dict[str, Any]:
    """Prompt, prefill and preceding turns of a problem."""
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        system_instruction=protocol.system,
        apply_chat_template=protocol.chat,
        fewshot_as_multiturn=protocol.examples_as == "turns",
        chat_template=_turns if protocol.chat else None,
        gen_prefix=task.doc_to_prefix(doc),
    )
    if not protocol.chat:
        return {"prompt": context}
    *turns, (role, text) = context
    prefill = ""
    if role == "assistant":
        prefill = text
        *turns, (_, text) = turns
    return {"prompt": text, "prefill": prefill, "turns": tuple(turns)}


def _turns(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[tuple[str, str]]:
    """Takes the place of a chat template: the turns as they are."""
    return [(message["role"], message["content"]) for message in messages]


def _reference(task: Any, doc: dict[str, Any]) -> str | None:
    target = task.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    return None if target is None else str(target)


# Tasks


@cache
def task_settings(name: str) -> dict[str, Any]:
    """The settings in a task's file, without the functions that it names.

    Raises:
        ProblemsError: lm-eval is missing, or the task is unknown or cannot be used.
    """
    entry = _manager(name).task_index[name]
    settings: dict[str, Any] = entry.cfg or {}
    kind = settings.get("output_type", "generate_until")
    if "class" in settings:
        reason = "is written in Python, without settings that can be read"
    elif kind != "generate_until":
        reason = f"is of the type {kind}, and only generate_until can be decoded in parallel"
    elif settings.get("unsafe_code"):
        reason = "runs generated code, which needs a sandbox: use configs/protocols/humaneval_* or mbpp_*"
    elif settings.get("doc_to_image") or settings.get("doc_to_audio"):
        reason = "asks about pictures or sounds"
    elif settings.get("repeats", 1) > 1:
        reason = f"takes {settings['repeats']} responses to every problem, and one is decoded"
    elif wrong := [metric for metric in _metrics(settings) if _aggregation(metric) != "mean"]:
        reason = f"has the metric {_name(wrong[0]['metric'])!r}, which is no share of correct responses"
    else:
        return settings
    raise ProblemsError(f"task={name!r} of lm-eval {reason}; choose another task")


def _metrics(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return settings.get("metric_list") or [{"metric": "exact_match"}]


def _aggregation(metric: dict[str, Any]) -> str:
    """How the values of a metric are aggregated; by default as lm-eval does."""
    if "aggregation" in metric:
        return str(metric["aggregation"])
    from lm_eval.api import metrics, registry

    default = registry.get_metric_aggregation(metric["metric"])
    return "mean" if default is metrics.mean else "another"


def _name(metric: str) -> str:
    """Name of a metric; functions are written as FILE.NAME."""
    return metric.rpartition(".")[2] if "/" in metric else metric


def _manager(name: str) -> Any:
    """A TaskManager that knows the task `name`. Indexing the folder of one task takes no time, all 20 s."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ProblemsError(
            f"benchmark='lm_eval' with task={name!r} needs lm-eval, which is not installed: "
            "pip install 'dparallel[lm_eval]'"
        )
    from lm_eval import tasks

    line = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*(#.*)?$", re.MULTILINE)
    root = Path(tasks.__file__).parent
    for file in sorted(root.rglob("*.yaml")):
        if name in (text := file.read_text(encoding="utf-8")) and line.search(text):
            manager = tasks.TaskManager(include_path=str(file.parent), include_defaults=False)
            if name in manager.all_subtasks:
                return manager
    everything = tasks.TaskManager()
    if name in everything.all_subtasks:
        return everything
    if name in everything.all_tasks:
        members = everything.task_index[name]
        named = members.tags or (members.cfg or {}).get("task", ())
        some = ", ".join(sorted(str(member) for member in named if isinstance(member, str))[:10])
        raise ProblemsError(f"task={name!r} is a group of tasks of lm-eval: name one of them, such as {some}")
    near = difflib.get_close_matches(name, everything.all_subtasks, n=10)
    known = f"similar ones: {', '.join(near)}; " if near else ""
    raise ProblemsError(f"unknown task={name!r} of lm-eval; {known}`lm-eval ls subtasks` lists all")


@cache
def open_task(name: str, num_fewshot: int | None, data_files: tuple[tuple[str, str], ...]) -> Any:
    """A task of lm-eval with its data.

    Args:
        num_fewshot: number of examples; None for the task's own.
        data_files: local files by split, in place of the data set on the Hub.
    """
    settings = task_settings(name)
    count = settings.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    changes: dict[str, Any] = {"task": name, "num_fewshot": count}
    if data_files:
        changes |= _local_data(name, settings, count, dict(data_files))
    import datasets  # imported here because it takes a second

    datasets.disable_progress_bars()
    try:
        whole = {"group": "dparallel", "task": [changes]}  # takes the settings of the task's file
        [task] = _manager(name).load(whole)["tasks"].values()
    except Exception as error:  # a task is a program of its own
        reason = f"{type(error).__name__}: {error}"
        raise ProblemsError(
            f"task={name!r} of lm-eval cannot be loaded ({reason}); offline, give data_files: {{SPLIT: FILE}}"
        ) from error
    return task


def _local_data(name: str, settings: dict[str, Any], count: int, files: dict[str, str]) -> dict[str, Any]:
    """Settings that make a task read local files."""
    examples = settings.get("fewshot_config") or {}
    source = examples.get("split") or settings.get("fewshot_split") or settings.get("training_split")
    asked = settings.get("test_split") or settings.get("validation_split")
    needed = [asked, *([source] if count and not examples.get("samples") else [])]
    if missing := [split for split in needed if split and split not in files]:
        raise ProblemsError(
            f"task={name!r} of lm-eval reads the split {missing[0]!r}"
            f"{' for its examples' if missing[0] == source != asked else ''}, and data_files gives "
            f"{', '.join(files)}: give {missing[0]}: FILE"
        )
    for file in files.values():
        if not Path(file).is_file():
            raise ProblemsError(f"data_files: {file}: no such file (looked in {Path.cwd()})")
    readers = {READERS.get(Path(file).suffix) for file in files.values()}
    [reader, *others] = readers
    if reader is None or others:
        raise ProblemsError(
            f"data_files={files}: give files of one kind, named {', '.join(READERS)}: JSON or Parquet"
        )
    paths = {split: str(Path(file).absolute()) for split, file in files.items()}
    changes: dict[str, Any] = {
        "dataset_path": reader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": paths},
    }
    for setting in ("training_split", "validation_split", "fewshot_split"):
        if settings.get(setting) not in (None, *files):
            changes[setting] = None
    return changes


# Scorers


def scorer(name: str) -> Scorer:
    """The scorer `lm_eval:TASK` or `lm_eval:TASK:METRIC`, which puts a metric first.

    Raises:
        ProblemsError: as `task_settings`; or the metric is unknown.
    """
    _, task, *rest = name.split(":", 2)
    settings = task_settings(task)
    filters = [part["name"] for part in settings.get("filter_list") or [{"name": "none"}]]
    measured = [_name(metric["metric"]) for metric in _metrics(settings)]
    metrics = [f"{metric},{part}" for metric in measured for part in filters]
    if rest and rest[0] not in metrics:
        raise ProblemsError(
            f"metric={rest[0]!r} of task={task!r} is unknown; {nearest(rest[0], metrics)}known: "
            f"{', '.join(metrics)}"
        )
    return Scorer(
        name,
        version=zlib.crc32(f"{version('lm_eval')} {settings}".encode()),
        metrics=tuple(dict.fromkeys([*rest, *metrics])),
        score=partial(judge, tuple(dict.fromkeys([*rest, *metrics]))),
        misfit=_no_task,
        needs_reference=False,
        seconds=60.0,  # the first response of a worker waits for the task and its data
        prepare=partial(_prepare, task),
    )


def _prepare(task: str) -> None:
    task_settings(task)  # imports lm-eval


def _no_task(problem: Problem) -> str | None:
    return None if LM_EVAL in problem.extra else "judges problems of lm-eval alone (benchmark: lm_eval)"


def judge(metrics: Sequence[str], problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    """Verdicts by the filters and metrics of the problems' task."""
    return [_judge(metrics, problem, response) for problem, response in zip(problems, responses, strict=True)]


def _judge(metrics: Sequence[str], problem: Problem, response: str) -> Verdict:
    from lm_eval.api.instance import Instance

    given, doc = problem.extra[LM_EVAL], problem.extra["doc"]
    task = open_task(given["task"], given["num_fewshot"], tuple(given["data_files"].items()))
    asked = Instance("generate_until", doc, ("", {}), 0, (given["task"], 0, 1), [response])
    found: dict[str, Any] = {}
    for ensemble in task._filters:
        ensemble.apply([asked])
        values = task.process_results(doc, [asked.filtered_resps[ensemble.name]])
        found |= {f"{metric},{ensemble.name}": value for metric, value in values.items()}
    return Verdict({metric: _flag(given["task"], metric, found.get(metric)) for metric in metrics})


def _flag(task: str, metric: str, value: Any) -> bool:
    try:
        if float(value) in (0.0, 1.0):
            return bool(float(value))
    except (TypeError, ValueError):
        pass
    raise ProblemsError(
        f"the metric {metric!r} of task={task!r} is {value!r}, neither 0 nor 1: choose another task"
    )

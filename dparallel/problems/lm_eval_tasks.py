"""Tasks of lm-eval (lm-evaluation-harness): its prompts, stop texts, filters and metrics, our decoding.

lm-eval is optional: `pip install 'dparallel[lm_eval]'`. Tested with 0.4.13.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from dparallel.config.base import nearest
from dparallel.config.problems import LM_EVAL, ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.config.sources import kind_of
from dparallel.problems.lm_eval_index import manager, metric_name, metrics, task_settings
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.sources import Problem, ProblemsError, json_value, selected
from dparallel.problems.tables import KINDS, TableError, check_kinds, open_table

EXAMPLE_SEED = 1234  # lm-eval's default seed of few-shot examples
OTHER_SPLITS = ("training_split", "validation_split", "fewshot_split")


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
        ProblemsError: as `protocol_of_task`; or the data cannot be read, lack a split or do not fit the task.
    """
    assert config.task is not None
    task = open_task(config.task, config.num_fewshot, tuple(config.data_files.items()))
    task.set_fewshot_seed(EXAMPLE_SEED)
    given = {"task": config.task, "num_fewshot": config.num_fewshot, "data_files": dict(config.data_files)}
    numbers = selected(range(len(task.eval_docs)), config, f"lm_eval {config.task}")
    chosen, last = set(numbers), max(numbers)
    problems = []
    for number, doc in enumerate(task.eval_docs):
        if number > last:
            break
        with _row_of(config, number):
            asked = _asked(task, doc, config.protocol)  # examples are drawn anew for every row
        if number in chosen:
            problems.append(
                Problem(
                    problem_id=f"{config.task}-{number + 1:05d}",
                    source=f"lm_eval {config.task}",
                    reference=_reference(task, doc),
                    extra={
                        "doc": json_value(f"{config.task}, row {number + 1}", "doc", dict(doc)),
                        LM_EVAL: given,
                    },
                    **asked,
                )
            )
    _check_metrics(config, problems[0])
    return problems


@contextmanager
def _row_of(config: ProblemsConfig, number: int) -> Iterator[None]:
    """Errors of a task, which is a program of its own, name the row."""
    try:
        yield
    except Exception as error:
        raise ProblemsError(
            f"task={config.task!r} of lm-eval cannot ask row {number + 1} of its data "
            f"({type(error).__name__}: {error}): correct the row or leave it out"
        ) from error


def _check_metrics(config: ProblemsConfig, problem: Problem) -> None:
    """Raise a ProblemsError for a metric that is not 0 or 1 for right, half right and empty responses."""
    right = problem.reference or ""
    for name in (name for name in config.protocol.scorers if name.startswith(f"{LM_EVAL}:")):
        for response in ("", right, right[: len(right) // 2], f"{right} {right}"):
            try:
                scorer(name).score([problem], [response])
            except ProblemsError:
                raise
            except Exception as error:
                raise ProblemsError(
                    f"task={config.task!r} of lm-eval cannot judge the response {shorten(response, 40)!r} "
                    f"({type(error).__name__}: {error}): choose another task"
                ) from error


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
        [task] = manager(name).load(whole)["tasks"].values()
    except Exception as error:  # a task is a program of its own
        raise ProblemsError(_not_loaded(name, settings, count, dict(data_files), error)) from error
    return task


def _not_loaded(
    name: str, settings: dict[str, Any], count: int, files: dict[str, str], error: Exception
) -> str:
    reason = f"{type(error).__name__}: {error}"
    named = settings.get("dataset_path")
    if isinstance(error, ImportError):
        return (
            f"task={name!r} of lm-eval needs another package ({reason}): install it, or choose another task"
        )
    if files:
        columns = "; ".join(f"{file} has {', '.join(_columns(file))}" for file in files.values())
        return (
            f"task={name!r} of lm-eval cannot use the columns of data_files ({reason}; {columns}): give "
            f"files with the columns of {named}"
        )
    needed = ", ".join(f"{split}: FILE" for split in _splits(settings, count))
    return (
        f"task={name!r} of lm-eval cannot be loaded ({reason}); offline, give local copies of the splits of "
        f"{named}: data_files: {{{needed}}}"
    )


def _splits(settings: dict[str, Any], count: int) -> list[str]:
    """The splits that a task reads: of its problems, then of its examples."""
    examples = settings.get("fewshot_config") or {}
    source = examples.get("split") or settings.get("fewshot_split") or settings.get("training_split")
    asked = settings.get("test_split") or settings.get("validation_split")
    needed = [asked, *([source] if count and not examples.get("samples") else [])]
    return list(dict.fromkeys(filter(None, needed)))


def _columns(file: str) -> list[str]:
    """The columns of a local file, all of whose rows are read.

    Raises:
        ProblemsError: it is missing, empty or damaged, or no table.
    """
    path = Path(file)
    if not path.is_file():
        raise ProblemsError(f"data_files: {file}: no such file (looked in {Path.cwd()})")
    try:
        check_kinds([path])
        table = open_table(path)
        _, columns = table.read(range(len(table)), ())
    except TableError as error:
        raise ProblemsError(f"data_files: {error}") from error
    if not len(table):
        raise ProblemsError(f"data_files: {file} holds 0 rows: give another file")
    return columns


def _local_data(name: str, settings: dict[str, Any], count: int, files: dict[str, str]) -> dict[str, Any]:
    """Settings that make a task read local files."""
    needed = _splits(settings, count)
    if missing := [split for split in needed if split not in files]:
        whose = " for its examples" if missing[0] != needed[0] else ""
        raise ProblemsError(
            f"task={name!r} of lm-eval reads the split {missing[0]!r}{whose}, and data_files gives "
            f"{', '.join(files)}: give {missing[0]}: FILE"
        )
    usual = ("train", "validation", "test")  # of another task of the same command
    if unknown := [split for split in files if split not in (*usual, *needed)]:
        raise ProblemsError(
            f"data_files gives {unknown[0]}, and task={name!r} of lm-eval reads {', '.join(needed)}: drop it"
        )
    for file in files.values():
        _columns(file)
    readers = {KINDS[kind_of(Path(file))].lower() for file in files.values()}
    if len(readers) > 1:
        raise ProblemsError(
            f"data_files: {', '.join(files.values())}: give files of one kind, JSON or Parquet"
        )
    changes: dict[str, Any] = {
        "dataset_path": readers.pop(),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(Path(file).absolute()) for split, file in files.items()}
        },
    }
    for setting in OTHER_SPLITS:
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
    measured = [metric_name(metric["metric"]) for metric in metrics(settings)]
    known = [f"{metric},{part}" for metric in measured for part in filters]
    if rest and rest[0] not in known:
        raise ProblemsError(
            f"metric={rest[0]!r} of task={task!r} is unknown; {nearest(rest[0], known)}known: "
            f"{', '.join(known)}"
        )
    ordered = tuple(dict.fromkeys([*rest, *known]))
    return Scorer(
        name,
        version=zlib.crc32(f"{version('lm_eval')} {settings}".encode()),
        metrics=ordered,
        score=partial(judge, ordered),
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

"""Tasks of lm-eval (lm-evaluation-harness): its prompts, stop texts, filters and metrics, our decoding.

lm-eval is optional: `pip install 'dparallel[lm_eval]'`. Tested with 0.4.13.
"""

import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from textwrap import shorten
from typing import Any

from dparallel.config.base import nearest
from dparallel.config.problems import LM_EVAL, ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.lm_eval_data import open_task
from dparallel.problems.lm_eval_index import metric_name, metrics, task_settings
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.sources import Problem, ProblemsError, json_value, selected

log = logging.getLogger(__name__)

EXAMPLE_SEED = 1234  # lm-eval's default seed of few-shot examples
PROBED = 50  # problems on which metrics are tried
PROBED_TEXTS = 20  # of a row
PROBED_LENGTH = 200  # characters
PROBE_SECONDS = 3.0
WITHOUT = " without "  # in the name of a scorer, before the metrics that it leaves out


def protocol_of_task(config: ProblemsConfig) -> ProtocolConfig:
    """The protocol of `config` with the stop texts of its task, and its metrics that are 0 or 1.

    Stop texts are those of lm-eval's own requests: for a task that names none, the text between its examples.
    The system text is a part of the problems, since lm-eval joins it with the task's description.

    Raises:
        ProblemsError: as `task_problems`.
    """
    task = _task_of(config)
    until = (task.config.generation_kwargs or {}).get("until") or []
    stops = [until] if isinstance(until, str) else until
    return config.protocol.model_copy(
        update={
            "stops": tuple(dict.fromkeys(filter(None, stops))),
            "system": None,
            "scorers": (_usable_scorer(config, task),),
        }
    )


def task_problems(config: ProblemsConfig) -> list[Problem]:
    """The selected problems of a task of lm-eval, as its own requests ask them.

    Raises:
        ProblemsError: lm-eval is missing; the task is unknown or cannot be used; the data cannot be read,
            lack a split or do not fit the task; or the metric is not 0 or 1 for every response.
    """
    task = _task_of(config)
    task.set_fewshot_seed(EXAMPLE_SEED)
    given = {"task": config.task, "num_fewshot": config.num_fewshot, "data_files": dict(config.data_files)}
    numbers = _rows(config, task)
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
                        "doc": _values_of_row(config.task, number, doc),
                        LM_EVAL: given,
                    },
                    **asked,
                )
            )
    _usable_scorer(config, task)
    return problems


def _task_of(config: ProblemsConfig) -> Any:
    assert config.task is not None
    return open_task(config.task, config.num_fewshot, tuple(config.data_files.items()))


def _rows(config: ProblemsConfig, task: Any) -> list[int]:
    """The numbers of the selected rows."""
    return list(selected(range(len(task.eval_docs)), config, f"lm_eval {config.task}"))


def _values_of_row(task: str | None, number: int, doc: Mapping[str, Any]) -> Any:
    return json_value(f"{task}, row {number + 1}", "doc", dict(doc))


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


# Metrics


def _usable_scorer(config: ProblemsConfig, task: Any) -> str:
    """The name of the task's scorer, which leaves out metrics that are not 0 or 1."""
    rows = _rows(config, task)
    probed = tuple(rows[:: max(1, -(-len(rows) // PROBED))])
    [name] = config.protocol.scorers
    return _binary(name, config.num_fewshot, tuple(config.data_files.items()), probed)


@cache
def _binary(
    name: str, num_fewshot: int | None, data_files: tuple[tuple[str, str], ...], rows: tuple[int, ...]
) -> str:
    """The name of a scorer without the metrics that are neither 0 nor 1 for a response to one of `rows`
    that is empty, right, a part of the right one, or more than it.

    Raises:
        ProblemsError: no metric is left, the metric asked for is left out, or the task cannot judge a probe.
    """
    _, task_name, *asked = name.split(":", 2)
    task, metrics = open_task(task_name, num_fewshot, data_files), scorer(name).metrics
    graded: dict[str, str] = {}
    end = time.monotonic() + PROBE_SECONDS
    for row, doc, response in _probes(task_name, task, rows):
        if time.monotonic() > end or len(graded) == len(metrics):
            break
        try:
            with _judging(task_name, row, response):
                values = _measured(task_name, task, doc, response)
        except ProblemsError:
            if row == rows[0]:  # others would count as wrong
                raise
            continue
        for metric in metrics:
            if flag(values.get(metric)) is None:
                value = shorten(str(values.get(metric)), 40)
                said = f"{metric!r} is {value} for {shorten(response, 40)!r} in row {row + 1}"
                graded.setdefault(metric, said)
    usable = [metric for metric in metrics if metric not in graded]
    if asked and asked[0] in graded:
        remedy = f"give metric: {usable[0]}, or " if usable else ""
        raise ProblemsError(
            f"metric={asked[0]!r} of task={task_name!r} is not 0 or 1 for every response "
            f"({graded[asked[0]]}): {remedy}choose another task"
        )
    if not usable:
        raise ProblemsError(
            f"task={task_name!r} of lm-eval has no metric that is 0 or 1 for every response "
            f"({graded[metrics[0]]}): choose another task"
        )
    if not graded:
        return name
    log.warning(
        "task=%r of lm-eval: left out %s: metrics must be 0 or 1 for every response; the accuracy is %s",
        task_name,
        ", ".join(graded.values()),
        usable[0],
    )
    return f"{name}{WITHOUT}{';'.join(metric for metric in metrics if metric in graded)}"


def _probes(name: str, task: Any, rows: Sequence[int]) -> Iterator[tuple[int, Any, str]]:
    """Rows and responses on which metrics are tried.

    After the targets of all rows, their short texts count as right ones too: a task that computes its metrics
    itself may compare a response with them, and not with the target.
    """
    texts = []
    for row in rows:
        doc = task.eval_docs[row]
        with _judging(name, row, ""):
            right = _reference(task, doc) or ""
        values = _values_of_row(name, row, doc)
        texts.append((row, values))
        for response in dict.fromkeys(["", *_parts(right)]):
            yield row, values, response
    for row, values in texts:
        short = [text for text in _texts(values) if len(text) <= PROBED_LENGTH][:PROBED_TEXTS]
        for response in dict.fromkeys(part for text in short for part in _parts(text)):
            yield row, values, response


def _parts(right: str) -> list[str]:
    """A text, the first half of its words, its first word, half of its characters, and more than it."""
    words = right.split()
    half, first = " ".join(words[: (len(words) + 1) // 2]), " ".join(words[:1])
    return [right, half, first, right[: len(right) // 2], f"{right} or more"]


def _texts(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


@contextmanager
def _judging(task: str, row: int, response: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ProblemsError(
            f"task={task!r} of lm-eval cannot judge the response {shorten(response, 40)!r} to row {row + 1} "
            f"({type(error).__name__}: {error}): choose another task"
        ) from error


def _measured(name: str, task: Any, doc: Any, response: str) -> dict[str, Any]:
    """The values of a task's metrics after each of its filters, as METRIC,FILTER."""
    from lm_eval.api.instance import Instance

    asked = Instance("generate_until", doc, ("", {}), 0, (name, 0, 1), [response])
    found: dict[str, Any] = {}
    for ensemble in task._filters:
        ensemble.apply([asked])
        values = task.process_results(doc, [asked.filtered_resps[ensemble.name]])
        found |= {f"{metric},{ensemble.name}": value for metric, value in values.items()}
    return found


def flag(value: Any) -> bool | None:
    """A metric's value as a verdict; None if it is neither 0 nor 1."""
    try:
        return bool(float(value)) if float(value) in (0.0, 1.0) else None
    except (TypeError, ValueError):
        return None


# Scorers


def scorer(name: str) -> Scorer:
    """The scorer `lm_eval:TASK` or `lm_eval:TASK:METRIC`, which puts a metric first.

    With ` without METRIC;METRIC` at the end, it leaves out these.

    Raises:
        ProblemsError: as `task_settings`; or the metric is unknown.
    """
    whole, _, left_out = name.partition(WITHOUT)
    _, task, *rest = whole.split(":", 2)
    settings = task_settings(task)
    filters = [part["name"] for part in settings.get("filter_list") or [{"name": "none"}]]
    measured = [metric_name(metric["metric"]) for metric in metrics(settings)]
    known = [f"{metric},{part}" for metric in measured for part in filters]
    if rest and rest[0] not in known:
        raise ProblemsError(
            f"metric={rest[0]!r} of task={task!r} is unknown; {nearest(rest[0], known)}known: "
            f"{', '.join(known)}"
        )
    without = left_out.split(";")
    ordered = tuple(metric for metric in dict.fromkeys([*rest, *known]) if metric not in without)
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
    given = problem.extra[LM_EVAL]
    name = given["task"]
    task = open_task(name, given["num_fewshot"], tuple(given["data_files"].items()))
    values = _measured(name, task, problem.extra["doc"], response)
    return verdict_of(name, {metric: values.get(metric) for metric in metrics})


def verdict_of(task: str, values: Mapping[str, Any]) -> Verdict:
    """The verdict of a task's metrics, of which the first is the accuracy.

    A further metric that is neither 0 nor 1 is unknown, with a note.

    Raises:
        ProblemsError: the accuracy is neither 0 nor 1, although it was for all probes.
    """
    flags = {metric: flag(value) for metric, value in values.items()}
    wrong = [metric for metric in flags if flags[metric] is None]
    accuracy, *others = flags
    if accuracy in wrong:
        binary = [metric for metric in others if metric not in wrong]
        remedy = f"give metric: {binary[0]}, or " if binary else ""
        raise ProblemsError(
            f"the metric {accuracy!r} of task={task!r} is {values[accuracy]!r} for a response, neither 0 nor "
            f"1: {remedy}choose another task"
        )
    note = "; ".join(f"the metric {metric!r} is {values[metric]!r}, neither 0 nor 1" for metric in wrong)
    return Verdict(flags, note or None)

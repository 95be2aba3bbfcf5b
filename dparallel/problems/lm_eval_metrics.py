"""Metrics of lm-eval's tasks: what their values are, and the scorer that gives them by the task's own code.

What a metric's values are is not written anywhere, so it is tried on a few responses before anything is
decoded. What was found is a part of the scorer's name, since names are all that other processes get.
"""

import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from textwrap import shorten
from typing import Any

from dparallel.config.base import nearest
from dparallel.config.problems import LM_EVAL
from dparallel.problems.lm_eval_data import open_task
from dparallel.problems.lm_eval_index import metric_name, metrics, task_settings
from dparallel.problems.scorer import Measure, Response, Scorer, Verdict
from dparallel.problems.sources import Problem, ProblemsError, json_value

log = logging.getLogger(__name__)

PROBED = 4  # rows on which metrics are tried
PROBED_TEXTS = 5  # of the first one
PROBED_LENGTH = 200  # characters
ROUNDING = 1e-9  # by which a value may exceed its best one
PARTS = (" | of 100: ", " | without a best value: ", " | without: ")  # of a name, followed by metrics
# Best values of lm-eval's aggregations of all responses; those of functions of tasks are tried.
BEST: dict[str, float | None] = {
    "bleu": 100.0,
    "chrf": 100.0,
    "chrf++": 100.0,
    "f1": 1.0,
    "ter": None,
    "matthews_corrcoef": None,
    "perplexity": None,
    "weighted_perplexity": None,
    "bits_per_byte": None,
    "brier_score": None,
}


@dataclass(frozen=True)
class Name:
    """A scorer's name: `lm_eval:TASK` or `lm_eval:TASK:METRIC`, then what was found out about metrics.

    Attributes:
        metric: the metric that was asked for as the accuracy.
        hundred: metrics whose best value is 100.
        free: metrics without a best value.
        without: metrics that are left out.
    """

    task: str
    metric: str | None = None
    hundred: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @classmethod
    def parsed(cls, name: str) -> "Name":
        """The parts of a name."""
        lists = []
        for part in reversed(PARTS):
            name, _, listed = name.partition(part)
            lists.append(tuple(filter(None, listed.split(";"))))
        _, task, *metric = name.split(":", 2)
        return cls(task, metric[0] if metric else None, *reversed(lists))

    def __str__(self) -> str:
        lists = zip(PARTS, (self.hundred, self.free, self.without), strict=True)
        found = "".join(f"{part}{';'.join(listed)}" for part, listed in lists if listed)
        return ":".join(filter(None, [LM_EVAL, self.task, self.metric])) + found

    def measure(self, metric: str, settings: Mapping[str, Any]) -> Measure:
        """What the values of a metric (METRIC,FILTER) with these settings are."""
        aggregation = aggregation_of(settings)
        full: float | None = BEST.get(aggregation, 1.0)
        if metric in self.hundred:
            full = 100.0
        if metric in self.free:
            full = None
        lower = not higher_is_better(settings)
        if aggregation == "mean":
            return Measure("share" if full else "number", full, lower_is_better=lower)
        whole = partial(aggregate, self.task, metric_name(settings["metric"]))
        return Measure("item", full, whole, lower)


def aggregation_of(metric: Mapping[str, Any]) -> str:
    """How the values of a metric are aggregated, as lm-eval does; a function by its file and name."""
    if "aggregation" in metric:
        return str(metric["aggregation"])
    from lm_eval.api import registry

    default = registry.get_metric_aggregation(metric["metric"])
    named = (name for name, function in registry.AGGREGATION_REGISTRY.items() if function is default)
    return next(named, f"of {metric_name(metric['metric'])}")


def higher_is_better(metric: Mapping[str, Any]) -> bool:
    """Whether more of a metric is better; yes, where neither the task nor lm-eval says."""
    if "higher_is_better" in metric:
        return bool(metric["higher_is_better"])
    from lm_eval.api import registry

    return registry.is_higher_better(metric["metric"]) is not False


def aggregate(task: str, metric: str, items: list[Any]) -> float:
    """The number of all items of a metric, by lm-eval's aggregation."""
    return float(_aggregation(task, metric)(items))


@cache
def _aggregation(task: str, metric: str) -> Callable[[list[Any]], float]:
    from lm_eval.api import registry
    from lm_eval.tasks._yaml_loader import _import_fun_from_str

    [found] = [each for each in metrics(task_settings(task)) if metric_name(each["metric"]) == metric]
    name = aggregation_of(found)
    function = _import_fun_from_str(name) if "/" in name else registry.get_aggregation(name)
    if function is None:
        raise ValueError(f"lm-eval knows no aggregation {name!r}")
    return function


# Scorers


def scorer(name: str) -> Scorer:
    """The scorer of a `Name`, whose accuracy is the first metric that can be one.

    Raises:
        ProblemsError: as `task_settings`; or the metric is unknown, or cannot be the accuracy.
    """
    parts = Name.parsed(name)
    settings = task_settings(parts.task)
    measures = {key: parts.measure(key, metric) for key, metric in named_metrics(settings).items()}
    if parts.metric is not None and parts.metric not in measures:
        raise ProblemsError(
            f"metric={parts.metric!r} of task={parts.task!r} is unknown; "
            f"{nearest(parts.metric, list(measures))}known: {', '.join(measures)}"
        )
    kept = {key: measure for key, measure in measures.items() if key not in parts.without}
    usable = [key for key, measure in kept.items() if measure.full and not measure.lower_is_better]
    first = parts.metric or next(iter(usable), None)
    if first not in usable:
        raise ProblemsError(_no_accuracy(parts, kept, usable))
    ordered = tuple(dict.fromkeys([first, *kept]))
    return Scorer(
        name,
        version=zlib.crc32(f"{version('lm_eval')} {settings}".encode()),
        metrics=ordered,
        score=partial(judge, ordered, name),
        misfit=_no_task,
        needs_reference=False,
        seconds=60.0,  # the first response of a worker waits for the task and its data
        prepare=partial(_prepare, parts.task),
        measures=kept,
        repeats=settings.get("repeats") or 1,
    )


def named_metrics(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The settings of a task's metrics after each of its filters, by METRIC,FILTER."""
    filters = [part["name"] for part in settings.get("filter_list") or [{"name": "none"}]]
    return {
        f"{metric_name(metric['metric'])},{part}": metric
        for metric in metrics(dict(settings))
        for part in filters
    }


def _no_accuracy(parts: Name, measures: Mapping[str, Measure], usable: Sequence[str]) -> str:
    """Why the metric that was asked for, or every metric, cannot be the accuracy."""

    def reason(metric: str) -> str:
        if metric not in measures:
            return f"{metric!r} cannot be computed"
        return (
            f"of {metric!r} less is better"
            if measures[metric].lower_is_better
            else (f"{metric!r} has no best value for the responses that were tried")
        )

    remedy = f"give metric: {usable[0]}, or choose another task" if usable else "choose another task"
    if parts.metric is not None:
        said = (
            f"metric={parts.metric!r} of task={parts.task!r} cannot be the accuracy ({reason(parts.metric)})"
        )
        return f"{said}: {remedy}"
    reasons = "; ".join(map(reason, [*measures, *parts.without]))
    return f"task={parts.task!r} of lm-eval has no metric that can be the accuracy ({reasons}): {remedy}"


def _prepare(task: str) -> None:
    task_settings(task)  # imports lm-eval


def _no_task(problem: Problem) -> str | None:
    return None if LM_EVAL in problem.extra else "judges problems of lm-eval alone (benchmark: lm_eval)"


def judge(
    metrics: Sequence[str], name: str, problems: Sequence[Problem], responses: Sequence[Response]
) -> list[Verdict]:
    """Verdicts by the filters and metrics of the problems' task."""
    measures = scorer(name).measures
    ordered = {metric: measures[metric] for metric in metrics}
    return [_judge(ordered, problem, said) for problem, said in zip(problems, responses, strict=True)]


def _judge(measures: Mapping[str, Measure], problem: Problem, response: Response) -> Verdict:
    given = problem.extra[LM_EVAL]
    name = given["task"]
    task = open_task(name, given["num_fewshot"], tuple(given["data_files"].items()))
    return verdict_of(name, measures, measured(name, task, problem.extra["doc"], response))


def measured(name: str, task: Any, doc: Any, response: Response) -> dict[str, Any]:
    """The values of a task's metrics after each of its filters, as METRIC,FILTER.

    Args:
        response: all responses to the row, or one that counts as all of them.
    """
    from lm_eval.api.instance import Instance

    repeats = task.config.repeats or 1
    said = [response] * repeats if isinstance(response, str) else list(response)
    asked = Instance("generate_until", doc, ("", {}), 0, (name, 0, repeats), said)
    found: dict[str, Any] = {}
    for ensemble in task._filters:
        ensemble.apply([asked])
        values = task.process_results(doc, [asked.filtered_resps[ensemble.name]])
        found |= {f"{metric},{ensemble.name}": value for metric, value in values.items()}
    return found


def verdict_of(task: str, measures: Mapping[str, Measure], values: Mapping[str, Any]) -> Verdict:
    """The verdict of a task's values. A metric that the task does not give for a row is unknown.

    So is a further metric whose value is of another kind than on the responses that were tried, with a note.

    Raises:
        ProblemsError: the accuracy is of another kind.
    """
    found: dict[str, Any] = {}
    wrong = []
    for metric, measure in measures.items():
        value = plain(measure, values.get(metric))
        if (needed := measure.misfit(value)) is not None:
            wrong.append(f"the metric {metric!r} is {shorten(repr(value), 80)}, not {needed}")
            if not found:
                others = [name for name in measures if name != metric and measures[name].full]
                remedy = f"give metric: {others[0]}, or " if others else ""
                raise ProblemsError(f"task={task!r}: {wrong[0]}, for a response: {remedy}choose another task")
            value = None
        found[metric] = value
    return Verdict(found, "; ".join(wrong) or None)


def plain(measure: Measure, value: Any) -> Any:
    """A value of lm-eval as a verdict: 0 and 1 as truth values, numbers of numpy and torch as numbers."""
    if value is None:
        return None
    if measure.kind == "item":
        try:
            return json.loads(json.dumps(value, default=_plain_array))
        except (TypeError, ValueError):
            return value  # a misfit
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    if measure.full is not None and measure.full < number <= measure.full + ROUNDING:
        number = measure.full
    return bool(number) if measure.full == 1.0 and number in (0.0, 1.0) else number


def _plain_array(value: Any) -> Any:
    """Arrays and numbers of numpy and torch, sets."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


# What the values of metrics are


@dataclass
class _Tried:
    """What a metric gave for the responses that were tried.

    Attributes:
        values: of all responses.
        columns: of the responses of the same kind to each row: empty ones, right ones and so on.
    """

    values: list[Any] = field(default_factory=list)
    columns: dict[int, list[Any]] = field(default_factory=dict)


@cache
def usable_scorer(
    name: str, num_fewshot: int | None, data_files: tuple[tuple[str, str], ...], rows: tuple[int, ...]
) -> str:
    """The name of a scorer with what was found about its metrics on responses to some of `rows`.

    Raises:
        ProblemsError: no metric can be the accuracy, the one asked for cannot, or the task cannot judge.
    """
    parts = Name.parsed(name)
    task = open_task(parts.task, num_fewshot, data_files)
    probed = rows[:: max(1, -(-len(rows) // PROBED))]
    keys = named_metrics(task_settings(parts.task))
    tried = {key: _Tried() for key in keys}
    for row, column, doc, response in _probes(parts.task, task, probed):
        try:
            with judging(parts.task, row, response):
                values = measured(parts.task, task, doc, response)
        except ProblemsError:
            if row == probed[0]:  # others would count as wrong
                raise
            continue
        for key, found in tried.items():
            if (value := values.get(key)) is not None:
                found.values.append(value)
                found.columns.setdefault(column, []).append(value)
    hundred, free, left_out = [], [], dict[str, str]()
    for key, found in tried.items():
        measure = parts.measure(key, keys[key])
        try:
            best = _best(measure, found)
        except Exception as error:  # of a program of its own
            left_out[key] = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            continue
        if best == measure.full:
            continue
        if best == 100:
            hundred.append(key)
        else:
            free.append(key)
    usable = Name(parts.task, parts.metric, tuple(hundred), tuple(free), tuple(left_out))
    accuracy = scorer(str(usable)).metrics[0]
    for key, reason in left_out.items():
        log.warning("task=%r of lm-eval: %s is left out (%s)", parts.task, key, shorten(reason, 200))
    if parts.metric is None and accuracy != next(iter(keys)):
        log.warning("task=%r of lm-eval: the accuracy is %s", parts.task, accuracy)
    return str(usable)


RIGHT = 1  # column of responses that are right


def _best(measure: Measure, tried: _Tried) -> float | None:
    """The best value of a metric: 1, or 100 if right responses have that; None if there is none.

    Raises:
        ValueError: its values are no numbers, or change when they are stored.
    """
    if not tried.values:
        return None
    right = tried.columns.get(RIGHT, [])
    if measure.whole is None:
        numbers, of_right = [float(value) for value in tried.values], list(map(float, right))
    else:
        numbers = [_whole(measure, column) for column in tried.columns.values()]
        of_right = [_whole(measure, right)]
    if measure.full != 1.0:  # known
        return measure.full
    numbers = [number for number in numbers if math.isfinite(number)]
    if not numbers or min(numbers) < 0:
        return None
    if max(numbers) <= 1 + ROUNDING:
        return 1.0
    return 100.0 if max(numbers) <= 100 + ROUNDING and max(of_right, default=0) >= 100 - 1e-6 else None


def _whole(measure: Measure, items: list[Any]) -> float:
    """The number of items, which must be that of the items as they are stored."""
    assert measure.whole is not None
    number, stored = measure.whole(items), measure.whole([plain(measure, item) for item in items])
    if number != stored and not (math.isnan(number) and math.isnan(stored)):
        raise ValueError(f"its values cannot be stored: {number} becomes {stored}")
    return number


def _probes(name: str, task: Any, rows: Sequence[int]) -> Iterator[tuple[int, int, Any, str]]:
    """Row, number of the kind of response, the row's values, and a response on which metrics are tried.

    Of the first row, its short texts count as right ones too: a task that computes its metrics itself may
    compare a response with them, and not with the target.
    """
    for row in rows:
        doc = task.eval_docs[row]
        with judging(name, row, ""):
            right = reference_of(task, doc) or ""
        values = json_value(f"{name}, row {row + 1}", "doc", dict(doc))
        for column, response in enumerate(["", *_parts(right)]):
            yield row, column, values, response
        if row == rows[0]:
            texts = [text for text in _texts(values) if len(text) <= PROBED_LENGTH][:PROBED_TEXTS]
            for text in dict.fromkeys(texts):
                for part in dict.fromkeys(_parts(text)[:2]):
                    yield row, -1, values, part


def _parts(right: str) -> list[str]:
    """A text, the first half of its words, its first word, and more than it."""
    words = right.split()
    return [right, " ".join(words[: (len(words) + 1) // 2]), " ".join(words[:1]), f"{right} or more"]


def _texts(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def reference_of(task: Any, doc: dict[str, Any]) -> str | None:
    """The target of a row as a text; the first one of several."""
    target = task.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    return None if target is None else str(target)


@contextmanager
def judging(task: str, row: int, response: str) -> Iterator[None]:
    """Errors of a task, which is a program of its own, name the response that was tried."""
    try:
        yield
    except Exception as error:
        install = "install what it names, or " if isinstance(error, ImportError) else ""
        raise ProblemsError(
            f"task={task!r} of lm-eval cannot judge the response {shorten(response, 40)!r} to row {row + 1} "
            f"({type(error).__name__}: {error}): {install}choose another task"
        ) from error

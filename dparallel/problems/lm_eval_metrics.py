"""Metrics of lm-eval's tasks, and the scorer that gives them by the task's own code.

The scorer's name holds what `lm_eval_probing` found about the metrics.
"""

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from textwrap import shorten
from typing import Any

from dparallel.config.base import nearest
from dparallel.config.problems import LM_EVAL
from dparallel.problems.lm_eval_data import open_task
from dparallel.problems.lm_eval_index import lm_eval_module, metric_name, metrics, task_settings
from dparallel.problems.scorer import Measure, Response, Scorer, Verdict
from dparallel.problems.sources import Problem, ProblemsError

log = logging.getLogger(__name__)

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
    registry = _registry()
    default = registry.get_metric_aggregation(metric["metric"])
    named = (name for name, function in registry.AGGREGATION_REGISTRY.items() if function is default)
    return next(named, f"of {metric_name(metric['metric'])}")


def higher_is_better(metric: Mapping[str, Any]) -> bool:
    """Whether more of a metric is better; yes, where neither the task nor lm-eval says."""
    if "higher_is_better" in metric:
        return bool(metric["higher_is_better"])
    registry = _registry()
    return bool(registry.is_higher_better(metric["metric"]) is not False)


def _registry() -> Any:
    lm_eval_module("api.metrics")  # imported by the registry when it is first asked
    return lm_eval_module("api.registry")


def aggregate(task: str, metric: str, items: list[Any]) -> float:
    """The number of all items of a metric, by lm-eval's aggregation."""
    return float(_aggregation(task, metric)(items))


@cache
def _aggregation(task: str, metric: str) -> Callable[[list[Any]], float]:
    registry = _registry()
    [found] = [each for each in metrics(task_settings(task)) if metric_name(each["metric"]) == metric]
    name = aggregation_of(found)
    own = lm_eval_module("tasks._yaml_loader")._import_fun_from_str
    function: Callable[[list[Any]], float] | None = (
        own(name) if "/" in name else registry.get_aggregation(name)
    )
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
        version=zlib.crc32(f"{_version()} {settings}".encode()),
        metrics=ordered,
        score=partial(judge, ordered, name),
        misfit=_no_task,
        needs_reference=False,
        seconds=60.0,  # the first response of a worker waits for the task and its data
        prepare=partial(_prepare, parts.task),
        measures=kept,
        repeats=settings.get("repeats") or 1,
    )


def _version() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:  # a copy of its folder
        raise ProblemsError(
            "lm-eval's version is unknown, since pip did not install it: pip install 'dparallel[lm-eval]'"
        ) from error


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
    instance = lm_eval_module("api.instance").Instance
    repeats = task.config.repeats or 1
    said = [response] * repeats if isinstance(response, str) else list(response)
    asked = instance("generate_until", doc, ("", {}), 0, (name, 0, repeats), said)
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

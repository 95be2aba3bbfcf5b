"""What the values of a metric of lm-eval's tasks are: written nowhere, so tried on a few responses.

This happens before anything is decoded. What is found becomes a part of the scorer's name, since names are
all that other processes get.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from textwrap import shorten
from typing import Any

from dparallel.problems.lm_eval_data import open_task
from dparallel.problems.lm_eval_index import task_settings
from dparallel.problems.lm_eval_metrics import (
    ROUNDING,
    Name,
    judging,
    measured,
    named_metrics,
    plain,
    reference_of,
    scorer,
)
from dparallel.problems.scorer import Measure
from dparallel.problems.sources import ProblemsError, json_value

log = logging.getLogger(__name__)

PROBED = 4  # rows on which metrics are tried
PROBED_TEXTS = 5  # of the first one
PROBED_LENGTH = 200  # characters
RIGHT = 1  # column of responses that are right


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

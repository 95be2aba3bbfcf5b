"""Scorers whose verdicts are shares, numbers, or items that are judged together."""

from collections.abc import Sequence
from typing import Any

import pytest

from dparallel.problems.judging import judged
from dparallel.problems.scorer import FLAG, Measure, Scorer, ScorerError, Verdict
from dparallel.problems.sources import Problem

SHARE, NUMBER = Measure("share"), Measure("number", full=None, lower_is_better=True)
ITEM = Measure("item", full=None, whole=len)
PROBLEM = Problem(problem_id="p", source="s", prompt="q", reference="the red fox")


def f1(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    """F1 of the words; their number; and both texts."""
    return [
        _judged(problem.reference or "", response)
        for problem, response in zip(problems, responses, strict=True)
    ]


def _judged(reference: str, response: str) -> Verdict:
    right, said = set(reference.split()), set(response.split())
    if "fail" in said:
        raise ValueError("no response")
    return Verdict(
        {
            "f1": 2 * len(right & said) / len(right | said | {""}) if said != right else 1.0,
            "words": len(said),
            "texts": [reference, response],
        }
    )


def scorer(**changes: Any) -> Scorer:
    measures = {"f1": SHARE, "words": NUMBER, "texts": ITEM}
    settings = {"in_process": True, "measures": measures, **changes}
    return Scorer("f1", 1, ("f1", "words", "texts"), f1, **settings)


@pytest.mark.parametrize("in_process", [True, False])
def test_verdicts_of_all_kinds_pass_through_and_a_failure_has_the_worst_share(in_process: bool) -> None:
    responses = ["the red fox", "fox", "fail", ""]
    found = dict(judged(scorer(in_process=in_process), [PROBLEM] * 4, responses))
    assert found[0].metrics == {"f1": 1.0, "words": 3, "texts": ["the red fox", "the red fox"]}
    assert found[1].metrics == {"f1": 0.5, "words": 1, "texts": ["the red fox", "fox"]}
    assert found[2].metrics == {"f1": False, "words": None, "texts": None}, "0, and left out of the others"
    assert found[2].note == "ValueError: no response"
    assert found[3].metrics["f1"] == 0.0


@pytest.mark.parametrize(
    ("measure", "right", "wrong", "needed"),
    [
        (FLAG, [True, False, None], [1, 0.5, "True"], "True or False"),
        (SHARE, [True, 0, 0.25, 1, None], [1.01, -0.1, float("nan"), "1", [1]], "a number"),
        (Measure("share", full=100), [0, 55.5, 100], [101, float("inf")], "a number"),
        (NUMBER, [-3, 1e9, 0.5, None], [True, float("inf"), "1"], "a number"),
        (ITEM, [[1, "a"], {"a": None}, "x", None], [{1, 2}, object()], "a JSON value"),
    ],
)
def test_a_verdict_is_of_the_kind_that_its_scorer_states(
    measure: Measure, right: list[Any], wrong: list[Any], needed: str
) -> None:
    assert [measure.misfit(value) for value in right] == [None] * len(right)
    assert all((measure.misfit(value) or "").startswith(needed) for value in wrong)
    one = Scorer("one", 1, ("first", "m"), f1, in_process=True, measures={"m": measure})
    with pytest.raises(ScorerError, match=f"for the metric 'm': give {needed}.*, or None where it cannot"):
        one.checked([Verdict({"first": True, "m": wrong[0]})], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mean"}, "kind='mean' of a metric: give one of flag, share, number, item"),
        ({"kind": "item"}, "the kind 'item' needs whole"),
        ({"kind": "share", "whole": len}, "others are averaged and have none"),
        ({"kind": "number"}, "kind='number' of a metric with full=1.0: give full=None, or 'share'"),
        ({"kind": "share", "full": None}, "with full=None: give a positive number"),
        ({"kind": "share", "full": 0}, "with full=0: give a positive number"),
    ],
)
def test_measures_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        Measure(**settings)


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"f2": SHARE}, "measures of f2; its metrics are f1, words, texts"),
        ({"f1": NUMBER}, "its first metric, 'f1', is the accuracy: put one first that has a best value"),
        ({"f1": Measure("share", lower_is_better=True)}, "and of which more is better"),
    ],
)
def test_measures_that_do_not_fit_the_metrics_are_named(measures: dict[str, Measure], message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        scorer(measures=measures)


def test_only_the_best_value_is_right() -> None:
    assert [SHARE.is_right(value) for value in (1, 1.0, True, 0.99, 0, False, None)] == [
        True,
        True,
        True,
        False,
        False,
        False,
        None,
    ]
    assert [Measure("share", full=100).is_right(value) for value in (100, 1)] == [True, False]
    assert ITEM.is_right([1]) is None

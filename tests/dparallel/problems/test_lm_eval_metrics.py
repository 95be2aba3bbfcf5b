"""Metrics of lm-eval's tasks: its own evaluation is the reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.problems import ProblemsConfig
from dparallel.problems.judging import score
from dparallel.problems.lm_eval_metrics import Name, verdict_of
from dparallel.problems.registry import load_problems, protocol_of
from dparallel.problems.scorer import FLAG, Measure
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import ProblemsError
from dparallel.problems.stops import cut
from tests.dparallel.problems.lm_eval_made import HAS_LM_EVAL, MARKS, config, needs_lm_eval, own_task

if HAS_LM_EVAL:
    pytestmark = MARKS


@needs_lm_eval
def test_verdicts_are_those_of_lm_evals_filters_and_metrics(files: dict[str, str]) -> None:
    responses = [
        "#### 2000",
        "so $2,000.",
        "2,000.00",
        "",
        "The answer is 2000. No, 3.",
        "#### 2,000",
        "-2000",
        "... #### 2000.",
    ]
    asked = config("gsm8k", num_fewshot=0, data_files=files)
    problem, rules = load_problems(asked)[0], protocol_of(asked)
    found = score([problem] * len(responses), responses, rules)
    task = own_task("gsm8k", 0, files)
    task.build_all_requests(limit=1)
    [request] = task.instances
    for response, verdict in zip(responses, found, strict=True):
        request.resps = [response]
        task.apply_filters()
        expected = {
            f"{metric},{name}": bool(value)
            for name, filtered in request.filtered_resps.items()
            for metric, value in task.process_results(request.doc, [filtered]).items()
        }
        assert verdict.metrics == expected, response
    assert {verdict.metrics["exact_match,strict-match"] for verdict in found} == {True, False}


EXACT = "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"


@needs_lm_eval
@pytest.mark.parametrize(
    ("yaml", "stops"),
    [
        ("", ("\n\n",)),
        ("generation_kwargs: {do_sample: false}\n", ("\n\n",)),
        ("generation_kwargs: {until: END}\n", ("END",)),
        ("generation_kwargs: {until: [END, '.']}\n", ("END", ".")),
        ("generation_kwargs: {until: []}\n", ()),
        ('fewshot_delimiter: "\\n---\\n"\n', ("\n---\n",)),
        ('fewshot_delimiter: "\\n---\\n"\ngeneration_kwargs: {temperature: 0}\n', ("\n---\n",)),
    ],
)
def test_stops_and_verdicts_are_lm_evals_also_where_a_task_names_no_stop(
    yaml: str, stops: tuple[str, ...], own: Callable[..., ProblemsConfig], tmp_path: Path
) -> None:
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
    from lm_eval.tasks import TaskManager

    asked = own(EXACT + yaml, ["2", "4"])
    version = scorers_of(asked.protocol)[0].version
    problems, rules = load_problems(asked), protocol_of(asked)
    [scorer] = scorers_of(rules)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": dict(asked.data_files)}}
    [task] = manager.load({"group": "g", "task": [{"task": "own", **data}]})["tasks"].values()
    task.build_all_requests()
    for request in task.instances:
        until = request.args[1]["until"]
        assert rules.stops == stops == tuple([until] if isinstance(until, str) else until)
    for reply in ("2\n\nNext question: 3+3?", "2ENDLESS", "2.", "2\n---\nmore", "2", "3"):
        for request in task.instances:
            until = handle_stop_sequences(request.args[1]["until"], eos=None)
            request.resps = [postprocess_generated_text(reply, until, None)]
        task.apply_filters()
        first = task.instances[0]
        expected = task.process_results(first.doc, [first.filtered_resps["none"]])["exact_match"]
        [verdict] = scorer.score(problems[:1], [cut(reply, rules.stops)])
        assert verdict.metrics == {"exact_match,none": bool(expected)}, reply
    assert scorer.version == version, "loading a task leaves the key of its verdicts as it is"


GRADED = """
def f1(doc, results):
    right, said = set(doc["answer"].split()), set(results[0].split())
    both = len(right & said)
    exact = float(doc["answer"] == results[0])
    f1 = 2 * both / (len(right) + len(said)) if both else 0.0
    return {"exact": exact, "f1": f1, "percent": 100 * exact,
            "length": len(results[0]), "pair": (len(said), results[0]), "odd": {1: 2}, "sorted": [1]}

def words(items):
    return sum(count for count, _ in items) / 100

def by_key(items):
    return sum(item[1] for item in items)
"""
RESULTS = "process_results: !function own_code.f1\n"


def means(*names: str, better: bool = True, aggregation: str = "mean") -> str:
    return "".join(
        f"  - {{metric: {name}, aggregation: {aggregation}, higher_is_better: {str(better).lower()}}}\n"
        for name in names
    )


@needs_lm_eval
def test_graded_metrics_are_shares_of_their_best_value(
    own: Callable[..., ProblemsConfig], caplog: pytest.LogCaptureFixture
) -> None:
    yaml = means("f1", "exact", "percent", "length") + means("length", better=False).replace("length", "gone")
    asked = own(yaml + RESULTS, ["a", "b", "the red fox"], GRADED)
    problems, rules = load_problems(asked), protocol_of(asked)
    assert rules.scorers == (
        "lm_eval:own | of 100: percent,none | without a best value: length,none;gone,none",
    )
    assert accuracy_metric(rules) == "f1,none"
    [scorer] = scorers_of(rules)
    assert scorer.measures["length,none"] == Measure("number", full=None)
    assert scorer.measures["gone,none"].lower_is_better
    found = scorer.checked(scorer.score([problems[-1]] * 2, ["the fox", "the red fox"]), 2)
    assert [list(verdict.metrics.values()) for verdict in found] == [
        [0.8, False, 0.0, 7.0, None],
        [True, True, 100.0, 11.0, None],
    ]
    chosen = own(yaml + RESULTS, ["a", "b"], GRADED, metric="exact,none")
    assert accuracy_metric(protocol_of(chosen)) == "exact,none"
    caplog.clear()
    first = own(means("length", "exact") + RESULTS, ["aa", "bb"], GRADED)
    assert accuracy_metric(protocol_of(first)) == "exact,none"
    assert "task='own' of lm-eval: the accuracy is exact,none" in caplog.text


@needs_lm_eval
def test_metrics_of_all_responses_are_aggregated_by_the_task(
    own: Callable[..., ProblemsConfig], caplog: pytest.LogCaptureFixture
) -> None:
    yaml = means("exact") + means("pair", aggregation="!function own_code.words")
    yaml += means("odd", aggregation="!function own_code.by_key") + means("sorted")
    asked = own(yaml + RESULTS, ["a", "the red fox"], GRADED)
    problems, rules = load_problems(asked), protocol_of(asked)
    [scorer] = scorers_of(rules)
    assert scorer.metrics == ("exact,none", "pair,none")
    assert "odd,none is left out (KeyError: 1)" in caplog.text, "as JSON, the key 1 is a text"
    assert "sorted,none is left out (TypeError: " in caplog.text
    [verdict] = scorer.score(problems[1:], ["the fox"])
    assert verdict.metrics["pair,none"] == [2, "the fox"]
    whole = scorer.measures["pair,none"].whole
    assert whole is not None
    assert whole([[2, "a"], [3, "b"]]) == 0.05


@needs_lm_eval
@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (
            means("length", "exact"),
            {"metric": "length,none"},
            "metric='length,none' of task='own' cannot be the accuracy .'length,none' has no best value .*: "
            "give metric: exact,none, or choose another task",
        ),
        (
            means("f1", better=False) + means("exact"),
            {"metric": "f1,none"},
            "cannot be the accuracy .of 'f1,none' less is better.: give metric: exact,none",
        ),
        (
            means("f1", better=False) + means("length", "sorted"),
            {},
            "task='own' of lm-eval has no metric that can be the accuracy .of 'f1,none' less is better; "
            "'length,none' has no best .*; 'sorted,none' cannot be computed.: choose another task",
        ),
    ],
)
def test_a_task_without_a_metric_that_can_be_the_accuracy_is_refused(
    metrics: str, settings: dict[str, Any], message: str, own: Callable[..., ProblemsConfig]
) -> None:
    with pytest.raises(ProblemsError, match=message):
        load_problems(own(metrics + RESULTS, ["aa", "the red fox"], GRADED, **settings))


@needs_lm_eval
def test_a_task_that_cannot_judge_is_refused(own: Callable[..., ProblemsConfig]) -> None:
    broken = "def f1(doc, results):\n    raise KeyError('span')\n"
    with pytest.raises(ProblemsError, match="cannot judge the response '' to row 1 .KeyError: 'span'."):
        load_problems(own(means("exact") + RESULTS, ["a", "b"], broken))
    lacking = "def f1(doc, results):\n    import no_such_judge\n"
    with pytest.raises(ProblemsError, match="no_such_judge'.: install what it names, or choose another"):
        load_problems(own(means("exact") + RESULTS, ["a", "b"], lacking))


@needs_lm_eval
def test_a_value_that_turns_out_to_be_of_another_kind_is_named(own: Callable[..., ProblemsConfig]) -> None:
    code = (
        "def f1(doc, results):\n"
        "    return {name: 7 if 'odd' in results[0] else 1 for name in ('exact', 'f1')}\n"
    )
    asked = own(means("exact", "f1") + RESULTS, ["a"], code)
    [problem], [scorer] = load_problems(asked), scorers_of(protocol_of(asked))
    with pytest.raises(
        ProblemsError, match=r"'exact,none' is 7.0, not a number from 0 to 1, .*: give metric: f1"
    ):
        scorer.score([problem], ["odd"])
    verdict = verdict_of("a", {"f1,none": FLAG, "em,none": Measure("share")}, {"f1,none": 1, "em,none": 2})
    assert verdict.metrics == {"f1,none": True, "em,none": None}
    assert verdict.note == "the metric 'em,none' is 2.0, not a number from 0 to 1"


@needs_lm_eval
def test_repeats_are_judged_together_and_one_response_counts_as_all(
    own: Callable[..., ProblemsConfig],
) -> None:
    filters = """repeats: 3
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: majority, filter: [{function: majority_vote}, {function: take_first}]}
"""
    asked = own(EXACT + filters, ["2", "4"])
    problems, [scorer] = load_problems(asked), scorers_of(protocol_of(asked))
    assert scorer.repeats == 3
    found = scorer.score([problems[0]] * 3, [["1", "2", "2"], ["2", "3", "3"], "2"])
    assert [list(verdict.metrics.values()) for verdict in found] == [
        [False, True],
        [True, False],
        [True, True],
    ]


def test_the_name_of_a_scorer_holds_what_was_found() -> None:
    for name in (
        Name("own"),
        Name("own", "exact_match,maj@8"),
        Name("own", "a,none", ("b,none", "c,none"), (), ("d,none",)),
        Name("own", None, (), ("b,none",)),
    ):
        assert Name.parsed(str(name)) == name

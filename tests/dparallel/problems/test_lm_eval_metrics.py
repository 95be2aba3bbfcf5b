"""Metrics of lm-eval's tasks: its own evaluation is the reference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.problems import ProblemsConfig
from dparallel.problems import lm_eval_tasks
from dparallel.problems.judging import score
from dparallel.problems.registry import load_problems, protocol_of
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.problems.stops import cut
from tests.dparallel.problems.lm_eval_made import HAS_LM_EVAL, MARKS, config, needs_lm_eval, own_task
from tests.dparallel.problems.rows import DATA

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
    return {"exact": exact, "f1": 2 * both / (len(right) + len(said)) if both else 0.0, "contains": exact}
"""
MEANS = "".join(
    f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in ("f1", "exact")
)
RESULTS = "process_results: !function own_code.f1\n"


@needs_lm_eval
@pytest.mark.parametrize("answers", [["a", "b", "the red fox"], ["a"] * 3])
def test_graded_metrics_are_left_out_before_anything_is_decoded(
    answers: list[str], own: Callable[..., ProblemsConfig], caplog: pytest.LogCaptureFixture
) -> None:
    asked = own(MEANS + RESULTS, answers, GRADED)
    problems, rules = load_problems(asked), protocol_of(asked)
    assert "left out 'f1,none' is 0." in caplog.text
    assert "the accuracy is exact,none" in caplog.text
    assert rules.scorers == ("lm_eval:own without f1,none",)
    assert accuracy_metric(rules) == "exact,none"
    [scorer] = scorers_of(rules)
    verdicts = scorer.score(problems[-1:] * 2, ["the fox", answers[-1]])
    assert [verdict.metrics for verdict in verdicts] == [{"exact,none": False}, {"exact,none": True}]
    chosen = own(MEANS + RESULTS, answers, GRADED, metric="exact,none")
    load_problems(chosen)
    assert [scorer.metrics for scorer in scorers_of(protocol_of(chosen))] == [("exact,none",)]


@needs_lm_eval
@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (
            MEANS,
            {"metric": "f1,none"},
            "metric='f1,none' of task='own' is not 0 or 1 for every .*: give metric: exact,none, or choose",
        ),
        (
            MEANS.splitlines(True)[0],
            {},
            r"task='own' of lm-eval has no metric that is 0 or 1 .*'f1,none' is 0\.\d+ for '.*' in row \d",
        ),
    ],
)
def test_a_task_without_a_metric_that_is_0_or_1_is_refused(
    metrics: str, settings: dict[str, Any], message: str, own: Callable[..., ProblemsConfig]
) -> None:
    with pytest.raises(ProblemsError, match=message):
        load_problems(own(metrics + RESULTS, ["a", "the red fox"], GRADED, **settings))


@needs_lm_eval
def test_metrics_are_tried_on_the_selected_rows_and_for_a_bounded_time(
    own: Callable[..., ProblemsConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def f1(doc, results):\n    return {'exact': 0.5 if doc['answer'] == 'odd' else 0.0}\n"
    yaml = MEANS.splitlines(True)[1] + RESULTS
    answers = ["a"] * 40 + ["odd"] + ["a"] * 9
    with pytest.raises(ProblemsError, match="'exact,none' is 0.5 for '' in row 41"):
        load_problems(own(yaml, answers, code))
    assert len(load_problems(own(yaml, answers, code, rows="[:40]"))) == 40
    monkeypatch.setattr(lm_eval_tasks, "PROBE_SECONDS", 0.0)
    assert len(load_problems(own(yaml, answers, code))) == 50
    broken = "def f1(doc, results):\n    raise KeyError('span')\n"
    monkeypatch.setattr(lm_eval_tasks, "PROBE_SECONDS", 3.0)
    with pytest.raises(ProblemsError, match="cannot judge the response '' to row 1 .KeyError: 'span'."):
        load_problems(own(yaml, answers, broken))


@needs_lm_eval
def test_metrics_that_do_not_compare_with_the_target_are_tried_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target of drop is the names of its answer's columns; its metrics compare with the texts in them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    empty = {"number": "", "date": {"day": "", "month": "", "year": ""}, "worker_id": "", "hit_id": ""}
    row = {
        "section_id": "s",
        "query_id": "q",
        "passage": "A fox and a dog.",
        "question": "Who?",
        "answer": {**empty, "spans": ["the red fox"]},
        "validated_answers": {name: [] for name in ("number", "date", "spans", "worker_id", "hit_id")},
    }
    (tmp_path / "drop.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    asked = config("drop", num_fewshot=0, data_files={"validation": str(tmp_path / "drop.jsonl")})
    [problem], rules = load_problems(asked), protocol_of(asked)
    assert rules.scorers == ("lm_eval:drop without f1,none",)
    verdicts = score([problem] * 3, ["the red fox", "red", ""], rules)
    assert [verdict.metrics["em,none"] for verdict in verdicts] == [True, False, False]


def test_a_value_that_turns_out_graded_names_its_metric() -> None:
    assert [lm_eval_tasks.flag(value) for value in (1, 0.0, True)] == [True, False, True]
    for value in (0.5, None, (1, 2), "x", float("nan")):
        assert lm_eval_tasks.flag(value) is None
        verdict = lm_eval_tasks.verdict_of("a", {"em,none": 1, "f1,none": value})
        assert verdict.metrics == {"em,none": True, "f1,none": None}
        assert verdict.note == f"the metric 'f1,none' is {value!r}, neither 0 nor 1"
        with pytest.raises(
            ProblemsError,
            match="the metric 'f1,none' of task='a' is .*neither 0 nor 1: give metric: em,none, or choose",
        ):
            lm_eval_tasks.verdict_of("a", {"f1,none": value, "em,none": 1})
        with pytest.raises(ProblemsError, match="neither 0 nor 1: choose another task"):
            lm_eval_tasks.verdict_of("a", {"f1,none": value})


def answers_of(problem: Problem) -> list[str]:
    """Right, wrong and doubtful responses to a problem."""
    reference = problem.reference or ""
    answer = reference.rpartition("#### ")[2] or reference
    return [
        reference,
        f"The answer is {answer}.",
        f"The answer is {answer}",
        f"#### {answer}\n#### 5",
        rf"so $\boxed{{{answer}}}$",
        f"Final Answer: The final answer is ${answer}$. I hope it is correct.",
        f"${answer}.00, that is 7",
        "",
        "-" * 300,
        "1,000,000 \\frac{",
    ]


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "shots", "rows"),
    [("gsm8k_cot_zeroshot", 0, "gsm8k"), ("gsm8k", 2, "gsm8k"), ("minerva_math500", 0, "math500")],
)
def test_verdicts_are_those_of_lm_evals_own_evaluation(
    name: str, shots: int, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts for the same rows: lm-eval's evaluation of a model that says them, and our judging."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = (DATA / f"{rows}.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    data = {}
    for split, copies in {"test": 10, "train": 1}.items():  # each row once for every response
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(line + "\n" for line in lines for _ in range(copies)), encoding="utf-8")
        data[split] = str(file)
    asked = config(name, num_fewshot=shots, data_files=data)
    problems, protocol = load_problems(asked), protocol_of(asked)
    responses = [answers_of(problem)[number % 10] for number, problem in enumerate(problems)]

    class Says(TemplateLM):
        eot_token_id = 0

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(string.encode())

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            assert [request.args[0] for request in requests] == [problem.prompt for problem in problems]
            return responses

    found = simple_evaluate(
        Says(), tasks=[own_task(name, shots, data)], log_samples=True, bootstrap_iters=0, num_fewshot=shots
    )
    verdicts = score(problems, responses, protocol)
    metrics = {metric for verdict in verdicts for metric in verdict.metrics}
    assert metrics == {key for key in found["results"][name] if "," in key and "stderr" not in key}
    for metric in metrics:
        measured, _, part = metric.partition(",")
        samples = [sample for sample in found["samples"][name] if sample["filter"] == part]
        theirs = {sample["doc_id"]: bool(sample[measured]) for sample in samples}
        ours = [verdict.metrics[metric] for verdict in verdicts]
        assert ours == [theirs[number] for number in range(len(problems))], metric
        assert found["results"][name][metric] == pytest.approx(sum(map(bool, ours)) / len(ours))
        assert set(ours) == {True, False}, metric

"""Metrics of lm-eval's tasks: its own evaluation is the reference."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.store import SAMPLES
from dparallel.problems.judging import score
from dparallel.problems.lm_eval_metrics import Name, plain, verdict_of
from dparallel.problems.registry import load_problems, protocol_of
from dparallel.problems.scorer import FLAG, Measure
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.problems.stops import cut
from tests.dparallel.problems.lm_eval_made import HAS_LM_EVAL, MARKS, ROWS, config, needs_lm_eval, own_task
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


def evaluated(
    name: str, shots: int, data: dict[str, str], prompts: list[str], responses: list[str], iterations: int = 0
) -> dict[str, Any]:
    """lm-eval's evaluation of a model that is asked `prompts` and says `responses`."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM

    class Says(TemplateLM):
        eot_token_id = 0

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(string.encode())

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            assert [request.args[0] for request in requests] == prompts
            return responses

    task = own_task(name, shots, data)
    found: dict[str, Any] = simple_evaluate(
        Says(), tasks=[task], log_samples=True, bootstrap_iters=iterations, num_fewshot=shots
    )
    return found


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "shots", "rows"),
    [("gsm8k_cot_zeroshot", 0, "gsm8k"), ("gsm8k", 2, "gsm8k"), ("minerva_math500", 0, "math500")],
)
def test_verdicts_are_those_of_lm_evals_own_evaluation(
    name: str, shots: int, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts for the same rows: lm-eval's evaluation of a model that says them, and our judging."""
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

    found = evaluated(name, shots, data, [problem.prompt for problem in problems], responses)
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


SPANS = {"number": "", "date": {"day": "", "month": "", "year": ""}, "worker_id": "", "hit_id": ""}
INSTRUCTIONS: list[tuple[list[str], list[dict[str, Any]]]] = [
    (["change_case:english_lowercase", "punctuation:no_comma"], [{}, {}]),
    (["punctuation:no_comma"], [{}]),
    (["keywords:existence", "punctuation:no_comma", "startend:quotation"], [{"keywords": ["fox"]}, {}, {}]),
]
TEXTS = ["The red fox runs home quickly.", "I have read a book, in the garden.", "Two cats and a mouse."]
TASKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "drop": (
        "validation",
        [
            {
                "section_id": "s",
                "query_id": f"q{number}",
                "passage": "A fox and a dog.",
                "question": f"Who is {number}?",
                "answer": {**SPANS, "spans": [text]},
                "validated_answers": {
                    name: [] for name in ("number", "date", "spans", "worker_id", "hit_id")
                },
            }
            for number, text in enumerate(TEXTS)
        ],
    ),
    "wmt16-de-en": (
        "test",
        [{"translation": {"de": f"Satz {number}", "en": text}} for number, text in enumerate(TEXTS)],
    ),
    "ifeval": (
        "train",
        [
            {"key": number, "prompt": f"Write {number}.", "instruction_id_list": ids, "kwargs": arguments}
            for number, (ids, arguments) in enumerate(INSTRUCTIONS)
        ],
    ),
    "gsm8k_cot_self_consistency": ("test", ROWS[:3]),
}
SAMPLE = {
    "nfe": 1,
    "num_tokens": 1,
    "seconds": 1.0,
    "seconds_alone": 1.0,
    "batch_size": 1,
    "hardware": "A",
    "measured_at": None,
}


@needs_lm_eval
@pytest.mark.parametrize("name", TASKS)
def test_numbers_and_standard_errors_are_lm_evals(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, then the numbers of all rows, graded, aggregated or voted for."""
    if name == "ifeval":
        pytest.importorskip("langdetect")
        pytest.importorskip("immutabledict")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    split, rows = TASKS[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {split: str(tmp_path / "rows.jsonl")}
    asked = config(name, num_fewshot=0, data_files=data)
    problems, [scorer] = load_problems(asked), scorers_of(protocol_of(asked))
    draws = random.Random(1)
    said = [["the red fox runs", "i read books in the garden", "", TEXTS[0]]] * len(problems)
    if "gsm8k" in name:
        said = [[f"The answer is {value}." for value in (2000 * n, 2000 * n, 5, 7)] for n in (1, 2, 3)]
    responses = [[draws.choice(texts) for _ in range(scorer.repeats)] for texts in said]
    prompts = [problem.prompt for problem in problems for _ in range(scorer.repeats)]
    texts = [text for several in responses for text in several]
    splits = dict.fromkeys(("train", "validation", "test"), data[split])
    theirs = evaluated(name, 0, splits, prompts, texts, iterations=100)
    verdicts = scorer.checked(scorer.score(problems, responses), len(problems))
    values = {metric: [verdict.metrics[metric] for verdict in verdicts] for metric in scorer.metrics}
    samples = pa.Table.from_pylist([SAMPLE], schema=SAMPLES)
    ours = add_up(DecodingConfig(gen_length=8, block_length=8), samples, values, measures=scorer.measures)
    results = theirs["results"][name]
    for metric in scorer.metrics:
        measured, _, part = metric.partition(",")
        rowwise = {row["doc_id"]: row[measured] for row in theirs["samples"][name] if row["filter"] == part}
        expected = [plain(scorer.measure(metric), rowwise[number]) for number in range(len(problems))]
        assert values[metric] == expected, metric
        best = scorer.measure(metric).full or 1.0
        number = ours.metrics[metric] * best if metric in ours.metrics else ours.scores[metric]
        assert number == pytest.approx(results[metric]), metric
        stderr = results[f"{measured}_stderr,{part}"]
        if stderr == "N/A":
            assert metric in ours.pooled, "lm-eval has no standard error of a task's own aggregation"
        elif ours.kind(metric) == "correct":  # ours is binomial, as in papers
            count = len(problems)
            assert ours.errors[metric] == pytest.approx(stderr * math.sqrt((count - 1) / count)), metric
        else:
            found = ours.errors[metric] * best if metric in ours.metrics else ours.stderrs[metric]
            assert found == pytest.approx(stderr), metric
    if name == "gsm8k_cot_self_consistency":
        assert values["exact_match,maj@64"] != values["exact_match,score-first"], "the votes differ"

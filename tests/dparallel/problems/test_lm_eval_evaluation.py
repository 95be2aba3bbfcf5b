"""Verdicts, numbers and standard errors of whole evaluations are lm-eval's own."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.store import SAMPLES
from dparallel.problems.judging import score
from dparallel.problems.lm_eval_metrics import plain
from dparallel.problems.registry import load_problems, protocol_of
from dparallel.problems.scoring import scorers_of
from dparallel.problems.sources import Problem
from tests.dparallel.problems.lm_eval_made import HAS_LM_EVAL, MARKS, ROWS, config, needs_lm_eval, own_task
from tests.dparallel.problems.rows import DATA

if HAS_LM_EVAL:
    pytestmark = MARKS


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

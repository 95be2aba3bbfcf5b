"""Finished benchmark stages with verdicts, texts and times given by hand, written by the stage's own code."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import MEASUREMENTS, BenchmarkConfig
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.report import Results, table
from dparallel.evaluation.selection import Row
from dparallel.evaluation.store import SAMPLES, Keys, Store
from dparallel.problems.scorer import FLAG, Measure
from dparallel.stages.manifest import Stage, digest
from dparallel.tiny.tokenizer import build_tokenizer

SHAPE = {"gen_length": 12, "block_length": 6}
REFERENCE = DecodingConfig(**SHAPE, rule="steps", steps=12)
TOKENIZER = build_tokenizer()
VERDICTS = {"1": True, "0": False, "-": None, **{str(tenths): tenths / 10 for tenths in range(2, 10)}}
WORDS = ["Tom", "has", "7", "coins", "and", "buys", "2", "answer", "9"]


def config(prompt: str = "{prompt}", **changes: Any) -> BenchmarkConfig:
    """Settings with a teacher's and a student's sweep by entropy at the threshold 0.5."""
    protocol = {"prompt": prompt, "scorers": ["exact"]}
    problems = {"benchmark": "dataset", "protocol": protocol}
    settings = {
        "test": {**problems, "sources": [{"path": "sums.jsonl"}]},
        "validation": {**problems, "sources": [{"path": "others.jsonl"}]},
        "reference": REFERENCE.model_dump(),
        "sweeps": {"entropy": {"decoding": SHAPE, "thresholds": [0.5]}},
        "teacher_sweeps": ["entropy"],
        "student_sweeps": ["entropy"],
        "max_loss": 0.5,
    }
    return BenchmarkConfig.model_validate({**settings, **changes})


def samples(
    verdicts: str,
    steps: int,
    first_confidence: float,
    seconds: float,
    hardware: str,
    day: int,
    batch_size: int,
) -> tuple[pa.Table, list[str]]:
    """Samples with a response of nine tokens and three of padding each; and their texts."""
    tokens = TOKENIZER.encode(" ".join(WORDS))
    assert len(tokens) == 9
    ids = [*tokens, *[TOKENIZER.eos_token_id] * 3]
    commit_step = [place * steps // 12 for place in range(12)]
    confidence = [first_confidence, *[0.5] * 9, 0.0, 0.0]
    rows = [
        {
            "row": place,
            "prompt_ids": tokens[:4],
            "response_ids": ids,
            "text": f"{'right' if verdict == '1' else 'wrong'} answer {place}",
            "commit_step": commit_step,
            "confidence": [min(value + 0.01 * place, 1) if value else 0.0 for value in confidence],
            "nfe": steps,
            "num_tokens": 10,
            "seconds": seconds,
            "seconds_alone": seconds,
            "batch_size": batch_size,
            "hardware": hardware,
            "measured_at": datetime(2026, 11, day, tzinfo=UTC),
        }
        for place, verdict in enumerate(verdicts)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES), [str(row["text"]) for row in rows]


def finished_benchmark(
    runs: Path,
    teacher: Path,
    *,
    experiment: str = "sums",
    key: str = "0123456789",
    reference: str = "11110",
    swept: str = "11010",
    student: str = "11001",
    student_steps: int = 3,
    merged: Path | None = None,
    seconds: float = 0.5,
    hardware: str = "a machine",
    batch_size: int = 4,
    day: int = 25,
    reused: int = 0,
    sandbox: str = "",
    with_models: bool = True,
    first_problem: int = 0,
    prompt: str = "What is {0} + 1?",
    responses: dict[int, str] | None = None,
    metric: str = "exact",
    judges: str = "",
    settings: BenchmarkConfig | None = None,
) -> Path:
    """A finished stage with the rows teacher (one token per step, entropy) and student (entropy).

    Args:
        teacher: folder of the teacher, and of the student unless it is `merged`.
        reference, swept, student: a 1 for every problem that is solved, in the order of these rows; 2 to 9
            for values of 0.2 to 0.9.
        student_steps: forward passes of the student.
        seconds: of each sample of the reference; the others take a half and a quarter.
        day: of November 2026, on which all samples were measured.
        reused: number of samples of each row that an earlier run had measured.
        sandbox: in which the code of responses was judged.
        with_models: record the folders of the models.
        first_problem: number of the first problem.
        responses: texts of the student's responses, by place, other than those made up.
        metric: the accuracy.
        judges: digest of what determines verdicts.
    """
    settings = settings or config()
    graded = not set(reference + swept + student) <= set("10-")
    kind, measure = (pa.float64(), Measure("share")) if graded else (pa.bool_(), FLAG)
    store = Store(runs / MEASUREMENTS)
    split = {}
    for name in ("validation", "test"):
        rows = []
        for model, method, verdicts, steps, share in (
            ("teacher", "one_token_per_step", reference, 12, 1),
            ("teacher", "entropy", swept, 6, 2),
            ("student/fast", "entropy", student, student_steps, 4),
        ):
            found, texts = samples(verdicts, steps, 0.9, seconds / share, hardware, day, batch_size)
            for place, text in (responses or {}).items():
                texts[place] = text if model == "student/fast" else texts[place]
            judged = [
                {
                    "row": place,
                    "problem_id": f"sums-{first_problem + place}",
                    "prompt": prompt.format(first_problem + place),
                    "reference": f"{first_problem + place + 1}",
                    "response": texts[place],
                    metric: VERDICTS[verdict],
                    "note": None if verdict == "1" else "not a <number>",
                }
                for place, verdict in enumerate(verdicts)
            ]
            columns = [(column, pa.string()) for column in ("problem_id", "prompt", "reference", "response")]
            schema = pa.schema([("row", pa.int32()), *columns, (metric, kind), ("note", pa.string())])
            sample_key = digest([experiment, key, name, model, method])[:16]
            verdict_key = digest(sample_key)[:16]
            store.put_samples(sample_key, range(len(found)), found)
            store.put_verdicts(verdict_key, range(len(found)), pa.Table.from_pylist(judged, schema=schema))
            decoding = REFERENCE if method == "one_token_per_step" else DecodingConfig(**SHAPE, threshold=0.5)
            flags = {metric: [row[metric] for row in judged]}
            measured = add_up(decoding, found, flags, reused, sandbox, {metric: measure})
            rows.append(
                Row(
                    model,
                    method,
                    name,
                    measured,
                    Keys(sample_key, (verdict_key,)),
                    operating_point=method == "entropy",
                )
            )
        split[name] = rows
    points = split["validation"][1:]
    results = Results.of(settings, split["validation"], split["test"], points, points[-1].case)
    stage = Stage(
        "benchmark",
        settings,
        {"teacher": teacher, "student/fast": merged or teacher},
        runs / experiment / f"benchmark-{key}",
    )
    (stage.folder / "results.json").write_text(json.dumps(results.as_json()), encoding="utf-8")
    (stage.folder / "table.md").write_text(table(results), encoding="utf-8")
    folders = {"teacher": str(teacher), "student/fast": str(merged or teacher)}
    measurements = store.digests(row.keys for row in results.rows if row.keys)
    recorded = {"models": folders} if with_models else {}
    details = {**results.summary(), **recorded, "judges": judges, "measurements": measurements}
    stage.finish(["results.json", "table.md"], metrics=results.as_metrics(), details=details)
    return stage.folder


def unfinished(folder: Path) -> Path:
    """The folder without its manifest, as an interrupted stage leaves it."""
    (folder / "manifest.json").unlink()
    return folder

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding.generate import generate
from dparallel.evaluation import measure
from dparallel.evaluation.measure import (
    LATENCY_SAMPLES,
    SAMPLES,
    Measurement,
    ProblemSet,
    Request,
    Slice,
    Timing,
    add_up,
    measure_slice,
    read_slice,
    store,
    stored,
    write_slice,
)
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.prompts import encode_problems, finish
from dparallel.problems.registry import load_problems
from dparallel.problems.sources import Problem
from dparallel.stages.manifest import StageError
from tests.dparallel.evaluation.oracle import dataset, own_answers

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)
COINS = ProblemsConfig(benchmark="coins", split="test", count=10)


def request(problems: ProblemsConfig = COINS, batch_size: int = 2) -> Request:
    return Request("model", ProblemSet.load(problems), DECODING, batch_size)


def made(checkpoint: Path, asked: Request) -> tuple[Measurement, pa.Table]:
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    return add_up(asked, [measure_slice(model, tokenizer, asked, rows) for rows in asked.slices])


def test_a_measurement_is_what_decoding_gives(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # The references are the model's own answers, 14 of 70 spoilt.
    problems = own_answers(tiny_checkpoint, tmp_path / "p.jsonl", DECODING, count=70, spoilt=14)
    asked = request(problems)
    assert len(asked.slices) == 2
    found, samples = made(tiny_checkpoint, asked)

    assert found.samples == 70
    assert found.accuracy == 0.8
    assert found.accuracy_stderr == pytest.approx((0.8 * 0.2 / 70) ** 0.5)
    assert found.answer_accuracy is None
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    prompts = encode_problems(load_problems(problems), problems.protocol, tokenizer, model, DECODING)
    generations = generate(model, prompts, DECODING)
    tokens, nfe = sum(each.num_tokens for each in generations), sum(each.nfe for each in generations)
    assert found.nfe == pytest.approx(nfe / 70)
    assert found.tpf == pytest.approx(tokens / nfe)
    assert (found.decoding, found.batch_size) == (DECODING, 2)

    assert samples.schema == SAMPLES
    assert samples["response"].to_pylist() == [
        finish(each.tokens, tokenizer, model.config.end_token_ids) for each in generations
    ]
    assert samples["solution"].to_pylist() == [False] * 14 + [True] * 56


def test_speed_is_of_the_batches_and_latency_of_single_prompts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that strikes at every forward: batches of 5 share theirs, single prompts do not."""
    monkeypatch.setattr(measure, "SLICE_BATCHES", 1)
    monkeypatch.setattr(measure, "SLICE_PROBLEMS", 5)
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    monkeypatch.setattr("dparallel.evaluation.measure.time.perf_counter", lambda: float(len(rows)))
    asked = request(batch_size=5)
    assert asked.slices == [range(5), range(5, 10)]
    slices = [measure_slice(model, tokenizer, asked, each) for each in asked.slices]
    found, samples = add_up(asked, slices)

    assert [timing.alone for timing, _ in slices] == [5, 3]
    nfe = samples["nfe"].to_pylist()[:LATENCY_SAMPLES]
    assert found.latency == sum(nfe) / LATENCY_SAMPLES
    warm_ups = 2 * 2  # of each slice: its batch and one row alone, a forward each
    batched = len(rows) - sum(nfe) - warm_ups
    assert sum(samples["num_tokens"].to_pylist()) / found.tps == pytest.approx(batched)
    assert batched < sum(samples["nfe"].to_pylist()) / 2, "batches share forwards"


@pytest.mark.parametrize(
    ("total", "batch_size", "compiled", "sizes"),
    [
        (1319, 64, False, {219: 1, 220: 5}),  # at most 4 batches of 64
        (1319, 8, False, {62: 4, 63: 17}),  # at most 64 problems, for 4 batches of 8 are few
        (1319, 64, True, {1319: 1}),
        (64, 1, False, {64: 1}),
        (65, 1, False, {32: 1, 33: 1}),
    ],
)
def test_slices_are_even_and_cover_all_problems(
    total: int, batch_size: int, compiled: bool, sizes: dict[int, int]
) -> None:
    problems = [Problem(str(each), "s", "p", "r") for each in range(total)]
    decoding = DECODING.model_copy(update={"compile": compiled})
    slices = Request("model", ProblemSet(COINS, problems, "digest"), decoding, batch_size).slices
    assert [row for rows in slices for row in rows] == list(range(total))
    lengths = [len(rows) for rows in slices]
    assert {length: lengths.count(length) for length in lengths} == sizes


def slice_of(rows: list[tuple[bool, int, int]], **timing: Any) -> Slice:
    """Samples by (solution, nfe, num_tokens)."""
    samples = [
        {"problem_id": "p", "solution": solution, "answer": True, "nfe": nfe, "num_tokens": tokens}
        for solution, nfe, tokens in rows
    ]
    return Timing(**timing), pa.Table.from_pylist(samples, schema=SAMPLES)


def test_slices_add_up_by_hand() -> None:
    """Unequal slices, so that a mean of the slices' means would be something else."""
    big = slice_of(
        [(True, 2, 10), (True, 4, 10), (False, 6, 12)], seconds=3, alone=3, seconds_alone=6, hardware="B"
    )
    small = slice_of([(False, 12, 8)], seconds=1, alone=1, seconds_alone=4, hardware="A")
    found, samples = add_up(request(), [big, small])
    assert (found.samples, found.accuracy, found.answer_accuracy) == (4, 0.5, 1.0)
    assert found.accuracy_stderr == 0.25
    assert (found.nfe, found.tpf, found.tps) == (24 / 4, 40 / 24, 40 / 4)
    assert found.latency == 10 / 4
    assert found.hardware == "A + B", "times of two kinds of machine say so"
    assert samples["nfe"].to_pylist() == [2, 4, 6, 12]
    assert add_up(request(), [small, small])[0].hardware == "A"


def test_coins_have_an_answer_score_too(tiny_checkpoint: Path) -> None:
    found, samples = made(tiny_checkpoint, request())
    assert (found.accuracy, found.answer_accuracy) == (0.0, 0.0)  # a random model
    assert samples["answer"].to_pylist() == [False] * 10


def test_a_problem_without_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"problem p-00001 .*has no reference"):
        ProblemSet.load(dataset(tmp_path / "p.jsonl"))


def test_a_request_is_known_by_all_that_it_is_made_from_but_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Tom", "reference": "1"}\n', encoding="utf-8")
    first = request(dataset(path))
    name = first.name
    monkeypatch.setattr(measure, "hardware", lambda: "another machine")
    assert request(dataset(path)).name == name
    others = [
        replace(first, made_by="another model"),
        replace(first, batch_size=3),
        replace(first, decoding=DECODING.model_copy(update={"threshold": 0.1})),
        request(COINS),
        request(COINS.model_copy(update={"count": 2})),
    ]
    path.write_text('{"prompt": "Tom", "reference": "2"}\n', encoding="utf-8")  # same path, new content
    others.append(request(dataset(path)))
    assert len({each.name for each in [first, *others]}) == 7
    long = replace(first, problems=replace(first.problems, problems=first.problems.problems * 65))
    names = {long.name}
    monkeypatch.setattr(measure, "SLICE_PROBLEMS", 100)
    names.add(replace(long).name)
    assert len(names) == 2, "how problems are cut is part of TPS"


def test_what_is_stored_is_found_and_half_of_it_is_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = request()
    assert stored(tmp_path, asked) is None
    found, samples = made(tiny_checkpoint, asked)
    store(tmp_path, asked, found, samples)
    assert stored(tmp_path, asked) == found
    assert pq.read_table(tmp_path / f"{asked.name}.parquet").equals(samples)
    for suffix in ("json", "parquet"):
        part = tmp_path / f"{asked.name}.{suffix}"
        content = part.read_bytes()
        part.unlink()
        assert stored(tmp_path, asked) is None
        part.write_bytes(content)
    assert stored(tmp_path, asked) == found


def test_a_damaged_stored_measurement_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = request()
    store(tmp_path, asked, *made(tiny_checkpoint, asked))
    record = tmp_path / f"{asked.name}.json"
    text = record.read_text(encoding="utf-8")
    record.write_text(text[:50], encoding="utf-8")
    with pytest.raises(StageError, match=f"{asked.name}.json is damaged"):
        stored(tmp_path, asked)
    record.write_text(text.replace('"model"', '"mole"'), encoding="utf-8")
    with pytest.raises(StageError, match=f"{asked.name}.json was measured from something else"):
        stored(tmp_path, asked)


def test_a_slice_survives_the_round_trip(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked, path = request(), tmp_path / "folder" / "slice.parquet"
    assert read_slice(path, asked, range(10)) is None
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    timing, samples = measure_slice(model, tokenizer, asked, range(10))
    write_slice(path, asked, (timing, samples))
    found = read_slice(path, asked, range(10))
    assert found is not None
    assert found[0] == timing
    assert found[1].equals(samples, check_metadata=True)
    assert [file.name for file in path.parent.iterdir()] == ["slice.parquet"]


def truncate(path: Path, asked: Request, table: pa.Table) -> None:
    path.write_bytes(path.read_bytes()[:200])


def forget(path: Path, asked: Request, table: pa.Table) -> None:
    pq.write_table(table.replace_schema_metadata(None), path)


def another_request(path: Path, asked: Request, table: pa.Table) -> None:
    other = replace(asked, batch_size=3)
    timing = Timing(seconds=1, alone=1, seconds_alone=1, hardware="h")
    write_slice(path, other, (timing, table))


def other_problems(path: Path, asked: Request, table: pa.Table) -> None:
    timing = Timing(seconds=1, alone=1, seconds_alone=1, hardware="h")
    write_slice(path, asked, (timing, table.slice(1)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "slice.parquet is damaged"),
        (forget, "slice.parquet is damaged"),
        (another_request, "slice.parquet was measured from something else"),
        (other_problems, "slice.parquet was measured from something else"),
    ],
)
def test_a_file_that_is_not_the_slice_is_named(tmp_path: Path, spoil: Callable, message: str) -> None:
    asked, path = request(), tmp_path / "slice.parquet"
    rows = [{"problem_id": problem.problem_id} for problem in asked.problems.problems]
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    write_slice(path, asked, (Timing(seconds=1, alone=1, seconds_alone=1, hardware="h"), table))
    assert read_slice(path, asked, range(10))
    spoil(path, asked, table)
    with pytest.raises(StageError, match=message):
        read_slice(path, asked, range(10))

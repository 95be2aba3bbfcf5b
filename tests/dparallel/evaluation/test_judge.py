"""Samples to verdicts: in slices, in this process or in others, going on after an interruption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, Sweep
from dparallel.config.problems import ProtocolConfig
from dparallel.evaluation import judge
from dparallel.evaluation.bench import Bench, Unit, judged_slices
from dparallel.evaluation.cases import Case
from dparallel.evaluation.judge import judge_here, verdicts_of
from dparallel.evaluation.sharing import have_units_made, make_here, make_units
from dparallel.evaluation.store import SAMPLES
from dparallel.models import loader
from dparallel.models.checkpoints import load_tokenizer
from dparallel.problems.judging import judged
from dparallel.problems.scoring import SCORERS
from dparallel.stages.manifest import StageError
from tests.dparallel.evaluation.oracle import dataset
from tests.dparallel.problems import hostile

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)
CASE = Case("teacher", "entropy", DECODING)
# What the scorer does with each problem: see hostile.act.
ASKED = ["2", "hang", "2", "die 3", "2", "raise", "2", "2", "2", "2"]
NOTES = [
    None,
    "timed out after 1 s",
    None,
    "the process that judged it ended (exit code 3)",
    None,
    "AssertionError: 1 == 2",
    *[None] * 4,
]


@pytest.fixture(autouse=True)
def hostile_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_VERDICTS", 4)
    scorer = replace(hostile.IN_PROCESSES, score=hostile.by_reference)
    monkeypatch.setitem(SCORERS, "hostile", scorer)


@pytest.fixture
def bench(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Ten samples of the teacher are stored; no model is loaded to judge them."""
    monkeypatch.setattr(loader, "load_model", lambda path: pytest.fail("a model was loaded"))
    for split in ("validation", "test"):
        lines = [{"prompt": f"{split} {row}", "reference": text} for row, text in enumerate(ASKED)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    protocol = ProtocolConfig(scorers=("exact", "hostile"))
    validation, test = (
        dataset(tmp_path / f"{split}.jsonl").model_copy(update={"protocol": protocol})
        for split in ("validation", "test")
    )
    config = BenchmarkConfig(
        test=test,
        validation=validation,
        reference=DECODING,
        sweeps={"entropy": Sweep(decoding=DECODING, thresholds=(1.5,))},
        teacher_sweeps=("entropy",),
        student_sweeps=("entropy",),
    )
    bench = Bench(config, {"teacher": str(tiny_checkpoint)}, tmp_path / "store")
    tokenizer = load_tokenizer(tiny_checkpoint)
    answers = [tokenizer.encode("2") if row % 2 else tokenizer.encode("7") for row in range(10)]
    samples = [{"row": row, "response_ids": answer} for row, answer in enumerate(answers)]
    key = bench.samples_key("teacher", "test", DECODING)
    bench.store.put_samples(key, range(10), pa.Table.from_pylist(samples, schema=SAMPLES))
    return bench


def stored(bench: Bench, scorer: str) -> pa.Table:
    key = bench.verdicts_key("teacher", "test", DECODING, scorer)
    table = bench.store.verdicts(key)
    assert table is not None
    return table


def check_stored(bench: Bench) -> None:
    assert not bench.unjudged([CASE], "test")
    table = stored(bench, "hostile")
    assert table["row"].to_pylist() == list(range(10))
    assert table["note"].to_pylist() == NOTES
    assert table["right"].to_pylist() == [note is None for note in NOTES]
    assert table["reference"].to_pylist() == ASKED
    assert stored(bench, "exact")["exact"].to_pylist() == [
        ASKED[row] == table["response"][row].as_py() for row in range(10)
    ]
    by_key = verdicts_of(bench, "teacher", "test", DECODING)
    assert [list(flags) for flags in by_key.values()] == [["exact"], ["right"]]


def test_verdicts_are_stored_in_slices_with_the_reason(bench: Bench) -> None:
    with pytest.raises(StageError, match="verdicts .* are missing although they were given"):
        verdicts_of(bench, "teacher", "test", DECODING)
    units = bench.unjudged([CASE, CASE], "test")
    assert [(unit.scorer, unit.slice) for unit in units] == [
        ("exact", (0, 10)),
        ("hostile", (0, 3)),
        ("hostile", (3, 6)),
        ("hostile", (6, 10)),
    ]
    assert units[1].label.startswith("verdicts of hostile on test, teacher, ")
    make_here(bench, units)
    check_stored(bench)


def test_judging_that_was_killed_goes_on_from_its_slices(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes after the second slice has been stored."""
    put, finished = bench.store.put_verdicts, list[range]()

    def interrupted(key: str, rows: range, table: pa.Table) -> None:
        put(key, rows, table)
        finished.append(rows)
        if len(finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(bench.store, "put_verdicts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_here(bench, bench.unjudged([CASE], "test"))
    asked = list[int]()

    def counted(scorer: Any, problems: Any, responses: Any) -> Any:
        asked.append(len(problems))
        return judged(scorer, problems, responses)

    monkeypatch.setattr(judge, "judged", counted)
    make_here(bench, bench.unjudged([CASE], "test"))
    assert asked == [10 - len(finished[1])], "the scorer of texts had judged all"
    check_stored(bench)


def test_others_judge_what_takes_long_and_text_scorers_judge_here(bench: Bench) -> None:
    rounds = list[list[dict[str, Any]]]()

    def worker(units: list[dict[str, Any]]) -> list[str]:
        """Another process, which dies in the first round when it has done the first unit."""
        rounds.append(json.loads(json.dumps(units)))
        mine = units[:1] if len(rounds) == 1 else units
        make_units(bench.config, dict(bench.inputs), bench.store.folder, mine)
        return ["part 1: Crashed"] if len(rounds) == 1 else []

    have_units_made(bench, worker, bench.unjudged([CASE], "test"))
    assert [[tuple(unit["slice"]) for unit in units] for units in rounds] == [
        [(0, 3), (3, 6), (6, 10)],
        [(3, 6), (6, 10)],
    ]
    assert {unit["scorer"] for units in rounds for unit in units} == {"hostile"}
    check_stored(bench)


def test_what_another_process_has_judged_is_not_judged_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = bench.unjudged([CASE], "test")
    judge_here(bench, units)
    monkeypatch.setattr(judge, "judged", lambda *_: pytest.fail("judged again"))
    judge_here(bench, units)


@pytest.mark.parametrize(
    "changes", [{"kind": "verdicts"}, {"kind": "verdicts", "scorer": "coins"}, {"scorer": "exact"}]
)
def test_a_unit_of_another_scorer_is_refused(bench: Bench, changes: dict[str, Any]) -> None:
    unit = Unit(model="teacher", split="test", decoding=DECODING, slice=(0, 3))
    with pytest.raises(UserError, match="the scorers of its protocol are exact, hostile"):
        bench.units([{**unit.model_dump(mode="json"), **changes}])


def test_slices_of_verdicts_are_even() -> None:
    parts = judged_slices(9, SCORERS["hostile"])
    assert parts == [range(0, 3), range(3, 6), range(6, 9)]
    assert judged_slices(9, SCORERS["exact"]) == [range(0, 9)]

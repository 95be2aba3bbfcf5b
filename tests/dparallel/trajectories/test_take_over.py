"""A recording whose judging or references changed is judged anew; no model is loaded for it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.problems import ProblemsConfig, ProtocolConfig, SourceConfig
from dparallel.models.checkpoints import load_model
from dparallel.problems.scorer import Scorer, Verdict
from dparallel.problems.scoring import SCORERS
from dparallel.problems.sources import Problem
from dparallel.stages import code
from dparallel.stages.manifest import Manifest
from dparallel.trajectories import record, store
from dparallel.trajectories.record import record_shards, run_stage
from tests.dparallel.problems import hostile

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)
PROMPTS = ["Tom 7", "Ann 3 pens", "Sam 5 coins", "Lee 2", "Mia 8 pens"]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each model loaded from now on."""
    paths: list[str] = []

    def counted(path: str) -> Any:
        paths.append(path)
        return load_model(path)

    monkeypatch.setattr(record, "load_model", counted)
    return paths


def problems(folder: Path, references: Sequence[str], **protocol: Any) -> ProblemsConfig:
    """Three shards of two, two and one problems; the file differs in its references and tests."""
    file = folder / f"{abs(hash(tuple(references)))}.jsonl"
    lines = [
        {"prompt": prompt, "reference": reference, "tests": f"{reference} tests"}
        for prompt, reference in zip(PROMPTS, references, strict=False)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = SourceConfig(path=str(file), prompt="{prompt}")
    return ProblemsConfig(benchmark="dataset", sources=(source,), protocol=ProtocolConfig(**protocol))


def config(asked: ProblemsConfig, **changes: Any) -> TrajectoriesConfig:
    return TrajectoriesConfig(**{"problems": asked, "decoding": DECODING, "shard_size": 2, **changes})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> ProblemsConfig:
    return problems(tmp_path_factory.mktemp("problems"), ["a", "b", "c", "d", "e"])


@pytest.fixture(scope="module")
def first(asked: ProblemsConfig, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "trajectories-1"
    run(config(asked), tiny_checkpoint, folder)
    return folder


@pytest.fixture
def recorded(first: Path, tmp_path: Path) -> Path:
    """The folder of an experiment with one finished recording."""
    shutil.copytree(first, tmp_path / "experiment" / "trajectories-1")
    return tmp_path / "experiment"


def run(settings: TrajectoriesConfig, checkpoint: Path, folder: Path, *more: Any) -> Manifest:
    return run_stage(settings, {"teacher": str(checkpoint)}, folder, *more)


def check_like_a_new_one(settings: TrajectoriesConfig, checkpoint: Path, made: Path) -> list[dict[str, Any]]:
    """The files are, byte for byte, those of a recording by itself; returns their rows."""
    new = made.parents[1] / "another_experiment" / made.name
    run(settings, checkpoint, new)
    for shard in sorted(new.glob("*.parquet")):
        assert (made / shard.name).read_bytes() == shard.read_bytes(), shard.name
    return store.load(made).to_pylist()


def lenient(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    return [Verdict({"exact": problem.reference != "c"}) for problem in problems]


def test_a_mended_scorer_judges_again_and_loads_no_model(
    recorded: Path, asked, tiny_checkpoint: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORERS, "exact", replace(SCORERS["exact"], version=99, score=lenient))
    monkeypatch.setitem(code.SCORERS, "exact", ("problems/coins.py",))
    asked_of: list[list[int]] = []
    manifest = run(config(asked), tiny_checkpoint, recorded / "trajectories-2", asked_of.append)
    assert loaded == []
    assert asked_of == [], "no other process is asked either"
    assert "rows_per_second" not in manifest.metrics
    rows = check_like_a_new_one(config(asked), tiny_checkpoint, recorded / "trajectories-2")
    assert [row["correct"] for row in rows] == [True, True, False, True, True]
    assert {row["correct"] for row in store.load(recorded / "trajectories-1").to_pylist()} == {False}


@pytest.mark.slow
def test_a_corrected_reference_or_test_only_judges_again(
    recorded: Path, tiny_checkpoint: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """References are the third row's own answer, and tests that only the scorer reads."""
    right = store.load(recorded / "trajectories-1")["response"].to_pylist()[2]
    corrected = config(problems(tmp_path, ["a", "b", right, "d", "e"]))
    run(corrected, tiny_checkpoint, recorded / "trajectories-2")
    scorer = Scorer("tests", 1, ("passed",), by_tests, needs_reference=False)
    monkeypatch.setitem(SCORERS, "tests", scorer)
    other = problems(tmp_path, ["a", "b", "c", "d", "f"], scorers=("tests", "exact"), extra=("tests",))
    tested = config(other)
    run(tested, tiny_checkpoint, recorded / "trajectories-3")
    assert loaded == []
    rows = check_like_a_new_one(corrected, tiny_checkpoint, recorded / "trajectories-2")
    assert [row["correct"] for row in rows] == [False, False, True, False, False]
    rows = check_like_a_new_one(tested, tiny_checkpoint, recorded / "trajectories-3")
    assert [row["correct"] for row in rows] == [False] * 4 + [True]


def by_tests(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    return [Verdict({"passed": problem.extra["tests"] == "f tests"}) for problem in problems]


@pytest.mark.slow
def test_a_scorer_in_worker_processes_judges_recordings(
    recorded: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = replace(hostile.IN_PROCESSES, score=hostile.by_reference)
    monkeypatch.setitem(SCORERS, "hostile", scorer)
    settings = config(problems(tmp_path, ["a", "raise", "c", "die 1", "e"], scorers=("hostile",)))
    run(settings, tiny_checkpoint, recorded / "trajectories-2")
    rows = store.load(recorded / "trajectories-2").to_pylist()
    assert [row["correct"] for row in rows] == [True, False, True, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"decoding": DECODING.model_copy(update={"threshold": 0.1})},
        {"stops": ("7",)},
        {"prompt": "Now {prompt}"},
        {"code": "another version"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_response_is_decoded_anew(
    recorded: Path,
    asked: ProblemsConfig,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    settings = config(asked)
    if "decoding" in change:
        settings = config(asked, **change)
    elif "stops" in change:
        settings = config(problems(tmp_path, ["a", "b", "c", "d", "e"], stops=change["stops"]))
    elif "prompt" in change:
        source = asked.sources[0].model_copy(update=change)
        settings = config(asked.model_copy(update={"sources": (source,)}))
    else:
        monkeypatch.setattr(record, "code_digest", lambda modules: change["code"])

    def loads(path: str) -> None:
        raise InterruptedError

    monkeypatch.setattr(record, "load_model", loads)
    with pytest.raises(InterruptedError):
        run(settings, tiny_checkpoint, recorded / "trajectories-2")
    assert not list((recorded / "trajectories-2").glob("*.parquet")), "all shards, not some"


def test_stop_texts_that_do_not_end_decoding_only_end_responses(
    asked: ProblemsConfig, tiny_checkpoint: Path, tmp_path: Path, loaded: list[str]
) -> None:
    whole = DECODING.model_copy(update={"stop_at_eos": False})
    run(config(asked, decoding=whole), tiny_checkpoint, tmp_path / "experiment" / "trajectories-1")
    loaded.clear()
    cut = config(problems(tmp_path, ["a", "b", "c", "d", "e"], stops=(" ",)), decoding=whole)
    run(cut, tiny_checkpoint, tmp_path / "experiment" / "trajectories-2")
    assert loaded == []
    rows = check_like_a_new_one(cut, tiny_checkpoint, tmp_path / "experiment" / "trajectories-2")
    assert not any(" " in row["response"] for row in rows)


def test_whole_shards_of_an_unfinished_or_shorter_recording_count_and_damaged_ones_do_not(
    recorded: Path,
    asked: ProblemsConfig,
    tiny_checkpoint: Path,
    tmp_path: Path,
    loaded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first shard is damaged, the last one longer in the new recording."""
    earlier = recorded / "trajectories-1"
    (earlier / "manifest.json").unlink()
    damaged = bytearray((earlier / "part-00000.parquet").read_bytes())
    damaged[60] ^= 1
    (earlier / "part-00000.parquet").write_bytes(damaged)
    PROMPTS.append("Zoe 4")
    try:
        longer = config(problems(tmp_path, ["a", "b", "c", "d", "e", "f"]))
    finally:
        PROMPTS.pop()
    rounds: list[list[int]] = []

    def worker(shards: list[int]) -> list[str]:
        rounds.append(shards)
        record_shards(longer, {"teacher": str(tiny_checkpoint)}, recorded / "trajectories-2", shards)
        return []

    run(longer, tiny_checkpoint, recorded / "trajectories-2", worker)
    assert rounds == [[0, 2]]
    assert len(loaded) == 1
    assert "trajectories-1/part-00000.parquet is passed over" in caplog.text
    check_like_a_new_one(longer, tiny_checkpoint, recorded / "trajectories-2")


def test_shards_of_earlier_versions_and_other_files_are_passed_over(
    recorded: Path, asked: ProblemsConfig, tiny_checkpoint: Path, loaded: list[str]
) -> None:
    earlier = recorded / "trajectories-1"
    for shard in sorted(earlier.glob("*.parquet")):
        table, metadata = store.read_shard(shard)
        shard.unlink()
        rows = table.to_pylist()
        store.write_shard(shard, rows, metadata.model_copy(update={"recording": None}))
    (recorded / "trajectories-0").mkdir()
    (recorded / "trajectories-0" / "part-00000.parquet").write_text("not parquet", encoding="utf-8")
    (recorded / "trajectories-3" / "part-00001.parquet").mkdir(parents=True)
    run(config(asked), tiny_checkpoint, recorded / "trajectories-2")
    assert loaded == [str(tiny_checkpoint)]
    tables = [store.read_shard(shard)[0] for shard in sorted(earlier.glob("*.parquet"))]
    assert sum(map(len, tables)) == len(PROMPTS), "they can be read and trained on"

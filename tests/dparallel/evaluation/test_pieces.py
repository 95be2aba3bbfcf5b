"""The benchmark's measurements made by several processes, some of which die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, Sweep
from dparallel.evaluation import measure, pieces
from dparallel.evaluation.pieces import Piece, have_pieces_made
from dparallel.evaluation.stage import make_pieces, run_stage
from dparallel.models.checkpoints import load_model
from dparallel.stages.manifest import StageError, verify
from dparallel.stages.sharing import NAMED, ROUNDS
from tests.dparallel.evaluation.oracle import disturbed, own_answers

SHAPE: dict[str, Any] = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
REFERENCE = DecodingConfig(**SHAPE, rule="steps", steps=12)
TWO_SLICES = 66  # problems, at a batch size of 8
WORKER = """
import json, sys
from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.stage import make_pieces
asked = json.loads(sys.argv[1])
make_pieces(BenchmarkConfig.model_validate(asked["config"]), asked["inputs"], asked["out"], asked["names"])
"""


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkConfig:
    folder = tmp_path_factory.mktemp("problems")
    validation, test = (
        own_answers(
            tiny_checkpoint, folder / f"{split}.jsonl", REFERENCE, count=TWO_SLICES, spoilt=3, split=split
        )
        for split in ("validation", "test")
    )
    return BenchmarkConfig(
        test=test,
        validation=validation,
        reference=REFERENCE,
        fixed={"few_step": DecodingConfig(**SHAPE, rule="steps", steps=6)},
        sweeps={
            "entropy": Sweep(decoding=DecodingConfig(**SHAPE), thresholds=(0.0, 1.0, 10.0)),
            "confidence": Sweep(
                decoding=DecodingConfig(**SHAPE, rule="confidence", threshold=0.9), thresholds=(0.9,)
            ),
        },
        teacher_sweeps=("entropy",),
        student_sweeps=("entropy", "confidence"),
        max_loss=0.2,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    student = disturbed(tiny_checkpoint, tmp_path_factory.mktemp("students") / "student")
    return {"teacher": str(tiny_checkpoint), "student/other": str(student)}


@pytest.fixture(scope="module")
def local(
    settings: BenchmarkConfig, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run by one process."""
    folder = tmp_path_factory.mktemp("local") / "benchmark"
    run_stage(settings, inputs, folder)
    return folder


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def untimed(folder: Path) -> list[dict]:
    timed = ("tps", "latency", "hardware")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(folder)]


def worker_process(
    settings: BenchmarkConfig, inputs: dict[str, str], out: Path, names: list[str]
) -> subprocess.Popen:
    config = settings.model_dump(mode="json")
    asked = {"config": config, "inputs": inputs, "out": str(out), "names": names}
    return subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(asked)])


def test_what_a_killed_worker_left_is_redone_and_the_results_are_those_of_one_process(
    settings, inputs, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes share the first round, one is killed; later rounds have a worker in this process."""
    out, asked, working = tmp_path / "shared", [], False

    def guarded(path: str) -> Any:
        assert working, "who only waits for workers loads no model"
        return load_model(path)

    monkeypatch.setattr(pieces, "load_model", guarded)

    def workers(missing: list[str]) -> list[str]:
        nonlocal working
        asked.append(missing)
        if len(asked) > 1:
            working = True
            make_pieces(settings, inputs, out, missing)
            working = False
            return []
        doomed, other = missing[::2], missing[1::2]
        processes = [worker_process(settings, inputs, out, names) for names in (doomed, other)]
        deadline = time.monotonic() + 120
        while sum((out / "pieces" / name).is_file() for name in doomed) < 2:
            assert processes[0].poll() is None, "the worker ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(processes[0].pid, signal.SIGKILL)
        assert [process.wait(timeout=120) for process in processes] == [-signal.SIGKILL, 0]
        return ["part 1 of 2: Crashed"]

    manifest = run_stage(settings, inputs, out, workers)
    validation, redone, test, *slower = asked
    assert len(validation) == 2 * (1 + 1 + 3 + 4)  # slices of the reference, few-step, and the sweeps
    assert set(redone) < set(validation[::2]), "the other worker's pieces are there"
    assert 0 < len(redone) <= len(validation) // 2 - 2, "so are the first of the killed one"
    assert {name.rpartition("-")[2] for name in test} == {
        *("00000.parquet", "00001.parquet", "certainty.json")
    }
    assert all(len(each) == 2 for each in slower), "one measurement at a time"

    assert untimed(out) == untimed(local)
    whole = verify(local)
    assert manifest.files.keys() == whole.files.keys()
    samples = [name for name in manifest.files if name.endswith(".parquet")]
    assert {name: manifest.files[name] for name in (*samples, "certainty.png")} == {
        name: whole.files[name] for name in (*samples, "certainty.png")
    }
    assert not (out / "pieces").exists()
    asked.clear()
    assert run_stage(settings, inputs, out, workers) == manifest
    assert not asked, "a finished stage asks nobody"
    make_pieces(settings, inputs, out, validation)  # a worker that comes late
    assert not (out / "pieces").exists()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The slices that are decoded from now on."""
    decoded: list[range] = []

    def spy(model: Any, tokenizer: Any, request: measure.Request, rows: range) -> measure.Slice:
        decoded.append(rows)
        return measure.measure_slice(model, tokenizer, request, rows)

    monkeypatch.setattr(pieces, "measure_slice", spy)
    return decoded


def test_pieces_that_stay_missing_are_named_and_a_run_on_another_machine_makes_these_alone(
    settings, inputs, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out", []

    def dies(missing: list[str]) -> list[str]:
        """The worker of the first slices is lost at once, time after time."""
        asked.append(missing)
        make_pieces(settings, inputs, out, [name for name in missing if not name.endswith("-00000.parquet")])
        return [f"part 1: Crashed in round {len(asked)}"]

    with monkeypatch.context() as there:
        there.setattr(measure, "hardware", lambda: "their GPU")
        with pytest.raises(
            StageError, match="9 of 18 pieces are still missing: validation, teacher"
        ) as error:
            run_stage(settings, inputs, out, dies)
    assert [len(each) for each in asked] == [18, *[9] * (ROUNDS - 1)]
    assert asked[0][:9] == asked[1], "first slices, which take longest, are dealt out first"
    assert "problems 1 to 33 of 66" in str(error.value)
    assert f"and {9 - NAMED} more; part 1: Crashed in round 3" in str(error.value)
    assert not (out / "manifest.json").exists()

    monkeypatch.setattr(measure, "hardware", lambda: "our CPU")
    decoded = counted(monkeypatch)
    manifest = run_stage(settings, inputs, out)
    assert decoded[:9] == [range(33)] * 9
    assert {each["hardware"] for each in rows(out) if each["split"] == "validation"} == {
        "our CPU + their GPU"
    }
    assert {each["hardware"] for each in rows(out) if each["split"] == "test"} == {"our CPU"}
    assert untimed(out) == untimed(local)
    assert manifest.details["hardware"] == ["our CPU", "our CPU + their GPU"]
    notes = (out / "table.md").read_text(encoding="utf-8")
    assert "Times: our CPU; our CPU + their GPU; TPS" in notes
    assert "times are of different hardware" in notes
    assert "different hardware" not in (local / "table.md").read_text(encoding="utf-8")


def test_a_run_that_was_killed_goes_on_from_its_slices(
    settings, inputs, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    out, decoded = tmp_path / "out", counted(monkeypatch)
    with monkeypatch.context() as killed:
        killed.setattr("dparallel.evaluation.stage._plot_certainty", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stage(settings, inputs, out)
    records = sorted((out / "measurements").glob("*.json"))
    assert len(decoded) == len(list((out / "pieces").glob("*.parquet"))) == 2 * len(records)
    whole, half, whole_too = (each.stem for each in records[:3])
    for gone in (
        f"measurements/{whole}.json",
        f"measurements/{half}.json",
        f"pieces/{half}-00001.parquet",
        f"pieces/{whole_too}-00001.parquet",  # its measurement is there
    ):
        (out / gone).unlink()
    decoded.clear()
    run_stage(settings, inputs, out)
    assert decoded == [range(33, 66)]
    assert untimed(out) == untimed(local)


def test_workers_of_another_folder_are_not_asked_again(settings, inputs, tmp_path: Path) -> None:
    asked = []

    def elsewhere(missing: list[str]) -> list[str]:
        asked.append(missing)
        make_pieces(settings, inputs, tmp_path / "another", missing[:1])
        return []

    with pytest.raises(StageError, match="do all workers share this folder"):
        run_stage(settings, inputs, tmp_path / "out", elsewhere)
    assert len(asked) == 1


def test_a_damaged_slice_is_refused_before_any_work(settings, inputs, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", []

    def one_piece(missing: list[str]) -> list[str]:
        asked.append(missing)
        make_pieces(settings, inputs, out, missing[:1])
        return []

    with pytest.raises(StageError, match="17 of 18"):
        run_stage(settings, inputs, out, one_piece)
    (slice_file,) = (out / "pieces").iterdir()
    slice_file.write_bytes(slice_file.read_bytes()[:100])
    with pytest.raises(StageError, match=f"{slice_file.name} is damaged: delete it"):
        run_stage(settings, inputs, out, one_piece)
    assert len(asked) == 1


def test_a_piece_that_nobody_asks_for_is_refused(settings, inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no piece 'cafe-00000.parquet' among the"):
        make_pieces(settings, inputs, tmp_path / "out", ["cafe-00000.parquet"])
    assert not (tmp_path / "out" / "pieces").exists()


def piece(folder: Path, model: str, index: int, make: Callable | None = None) -> Piece:
    return Piece(model, index, f"{model} {index}", folder / f"{model}-{index}", make or (lambda *_: ""))


def test_missing_pieces_are_asked_for_until_all_are_there(tmp_path: Path) -> None:
    every = [piece(tmp_path, model, index) for model in "ab" for index in range(2)]
    asked = []

    def elsewhere(names: list[str]) -> list[str]:
        asked.append(names)
        for name in names[1:]:
            (tmp_path / name).touch()
        if len(names) == 1:
            (tmp_path / names[0]).touch()
        return ["one was lost"]

    have_pieces_made(every, elsewhere)
    assert asked == [["a-0", "b-0", "a-1", "b-1"], ["a-0"]]
    have_pieces_made([], elsewhere)
    assert len(asked) == 2


def test_models_are_loaded_once_and_what_is_there_is_left_alone(tmp_path: Path) -> None:
    loaded, made = [], []

    def work(name: str) -> Callable[..., str]:
        def make(*_: Any) -> str:
            made.append(name)
            return ""

        return make

    every = [piece(tmp_path, model, index, work(f"{model}{index}")) for index in range(3) for model in "ba"]
    every[4].path.touch()  # b 2

    def load(model: str) -> tuple:
        loaded.append(model)
        return None, None

    pieces.make_here(every, load)
    assert made == ["b0", "b1", "a0", "a1", "a2"]
    assert loaded == ["b"] * 2 + ["a"] * 3

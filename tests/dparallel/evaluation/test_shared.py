"""The benchmark's samples decoded by several processes, some of which are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, Sweep
from dparallel.evaluation import decode
from dparallel.evaluation.sharing import make_units
from dparallel.evaluation.stage import run_stage
from dparallel.models import loader
from dparallel.models.checkpoints import load_model
from dparallel.stages.lease import LEASE, LeaseHeldError
from dparallel.stages.manifest import StageError, verify
from dparallel.stages.sharing import NAMED, ROUNDS
from tests.dparallel.evaluation.oracle import disturbed, own_answers

SHAPE: dict[str, Any] = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
REFERENCE = DecodingConfig(**SHAPE, rule="steps", steps=12)
PROBLEMS, SLICE = 12, 6
WORKER = """
import json, sys
from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.sharing import make_units
asked = json.loads(sys.argv[1])
config = BenchmarkConfig.model_validate(asked["config"])
make_units(config, asked["inputs"], asked["store"], asked["units"])
"""
Units = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_BATCHES", 1)
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_PROBLEMS", SLICE)


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkConfig:
    folder = tmp_path_factory.mktemp("problems")
    validation, test = (
        own_answers(tiny_checkpoint, folder / f"{split}.jsonl", REFERENCE, PROBLEMS, spoilt=1, split=split)
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
        batch_size=SLICE,
    )


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    student = disturbed(tiny_checkpoint, tmp_path_factory.mktemp("students") / "student")
    return {"teacher": str(tiny_checkpoint), "student/other": str(student)}


@pytest.fixture(scope="module")
def local(
    settings: BenchmarkConfig, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run by one process, in complete slices."""
    folder = tmp_path_factory.mktemp("local")
    run_stage(settings, inputs, folder / "benchmark", folder / "store")
    return folder / "benchmark"


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def untimed(folder: Path) -> list[dict[str, Any]]:
    timed = ("tps", "latency", "hardware", "measured_on", "reused")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(folder)]


def worker_process(
    settings: BenchmarkConfig, inputs: dict[str, str], store: Path, units: Units
) -> subprocess.Popen:
    config = settings.model_dump(mode="json")
    asked = {"config": config, "inputs": inputs, "store": str(store), "units": units}
    return subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(asked)])


@pytest.mark.slow
def test_what_a_killed_worker_left_is_redone_and_the_results_are_those_of_one_process(
    settings, inputs, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round's worker is a process that is killed; later rounds have a worker in this process."""
    out, store, asked, working = tmp_path / "shared", tmp_path / "store", list[Units](), False

    def guarded(path: str) -> Any:
        assert working, "a process that only waits for workers loads no model"
        return load_model(path)

    monkeypatch.setattr(loader, "load_model", guarded)

    def workers(missing: Units) -> list[str]:
        nonlocal working
        asked.append(missing)
        if len(asked) > 1:
            working = True
            make_units(settings, inputs, store, missing)
            working = False
            return []
        process = worker_process(settings, inputs, store, missing)
        deadline = time.monotonic() + 120
        while len(list(store.glob("samples/*/*.parquet"))) < 2:
            assert process.poll() is None, "the worker ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=120) == -signal.SIGKILL
        return ["part 1 of 1: Crashed"]

    manifest = run_stage(settings, inputs, out, store, workers)
    validation, redone, test, *slower = asked
    assert len(validation) == 2 * (1 + 1 + 3 + 4)  # slices of the reference, few-step, and the sweeps
    assert [unit["slice"] for unit in validation] == [[0, 6]] * 9 + [[6, 12]] * 9, "first slices first"
    assert 0 < len(redone) <= len(validation) - 2, "what it decoded before is there"
    assert [unit for unit in test if unit["kind"] == "certainty"], "asked for along with the test problems"
    assert all(len(units) == 2 for units in slower), "one measurement at a time"

    assert untimed(out) == untimed(local)
    whole = verify(local)
    assert manifest.files["certainty.png"] == whole.files["certainty.png"]
    verdicts, whole_verdicts = (
        {name: digest for name, digest in each.details["measurements"].items() if name.startswith("verdicts")}
        for each in (manifest, whole)
    )
    assert verdicts == whole_verdicts, "the same texts, judged the same, whatever the slices"
    asked.clear()
    assert run_stage(settings, inputs, out, store, workers) == manifest
    assert not asked, "a finished stage asks for nothing"


@pytest.mark.slow
def test_units_that_stay_missing_are_named_and_a_run_on_another_machine_decodes_these_alone(
    settings, inputs, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, store, asked = tmp_path / "out", tmp_path / "store", list[Units]()

    def dies(missing: Units) -> list[str]:
        """The worker of the first slices is lost immediately, every time."""
        asked.append(missing)
        make_units(settings, inputs, store, [unit for unit in missing if unit["slice"][0] > 0])
        return [f"part 1: Crashed in round {len(asked)}"]

    with monkeypatch.context() as there:
        there.setattr(decode, "hardware", lambda: "their GPU")
        with pytest.raises(StageError, match="9 of 18 units are still missing: validation, teacher") as error:
            run_stage(settings, inputs, out, store, dies)
    assert [len(units) for units in asked] == [18, *[9] * (ROUNDS - 1)]
    assert asked[0][:9] == asked[1], "first slices, which take longest, are dealt out first"
    assert "problems 1 to 6" in str(error.value)
    assert f"and {9 - NAMED} more; part 1: Crashed in round 3" in str(error.value)
    assert not (out / "manifest.json").exists()

    monkeypatch.setattr(decode, "hardware", lambda: "our CPU")
    manifest = run_stage(settings, inputs, out, store)
    assert {row["hardware"] for row in rows(out) if row["split"] == "validation"} == {"our CPU + their GPU"}
    assert {row["hardware"] for row in rows(out) if row["split"] == "test"} == {"our CPU"}
    assert untimed(out) == untimed(local)
    assert manifest.details["hardware"] == ["our CPU", "our CPU + their GPU"]
    notes = (out / "table.md").read_text(encoding="utf-8")
    assert len(re.findall(r"\| our CPU +\|\n", notes)) > 2, "every test row says so"
    assert "different hardware" not in notes, "the rows of the table are of one machine"


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_slices(
    settings, inputs, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    out, store, decoded = tmp_path / "out", tmp_path / "store", list[int]()

    def counted(model: Any, tokenizer: Any, prompts: Any, *arguments: Any) -> Any:
        decoded.append(len(prompts))
        return sample(model, tokenizer, prompts, *arguments)

    sample = decode.sample
    monkeypatch.setattr(decode, "sample", counted)
    with monkeypatch.context() as killed:
        killed.setattr("dparallel.evaluation.stage.write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stage(settings, inputs, out, store)
    slices = sorted(store.glob("samples/*/*.parquet"))
    assert len(decoded) == len(slices)
    for gone in (slices[0], slices[3]):
        gone.unlink()
    decoded.clear()
    run_stage(settings, inputs, out, store)
    assert decoded == [SLICE] * 2
    assert untimed(out) == untimed(local)


def test_workers_of_another_folder_are_not_asked_again(settings, inputs, tmp_path: Path) -> None:
    asked = []

    def delegate(missing: Units) -> list[str]:
        asked.append(missing)
        make_units(settings, inputs, tmp_path / "another", missing[:1])
        return []

    with pytest.raises(StageError, match="do all workers share this folder"):
        run_stage(settings, inputs, tmp_path / "out", tmp_path / "store", delegate)
    assert len(asked) == 1


def test_a_damaged_slice_is_refused_before_any_work(settings, inputs, tmp_path: Path) -> None:
    out, store, asked = tmp_path / "out", tmp_path / "store", []

    def one_unit(missing: Units) -> list[str]:
        asked.append(missing)
        make_units(settings, inputs, store, missing[:1])
        return []

    with pytest.raises(StageError, match="17 of 18"):
        run_stage(settings, inputs, out, store, one_unit)
    (file,) = store.glob("samples/*/*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StageError, match=f"{file.name} is damaged: delete it"):
        run_stage(settings, inputs, out, store, one_unit)
    assert len(asked) == 1


@pytest.mark.slow
def test_a_second_run_is_refused_while_parts_decode_for_the_first(settings, inputs, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"

    def by_parts(missing: Units) -> list[str]:
        with pytest.raises(LeaseHeldError, match=f"{out} is in use by process"):
            run_stage(settings, inputs, out, store)
        make_units(settings, inputs, store, missing)
        return []

    first = run_stage(settings, inputs, out, store, by_parts)
    assert run_stage(settings, inputs, out, store) == first
    assert not (out / LEASE).exists()

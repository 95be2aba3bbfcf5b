"""`dparallel eval` on the four benchmarks: real rows, a random model of bytes, the real sandbox."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dparallel.cli.main import main
from dparallel.completion import complete
from dparallel.config.decoding import DecodingConfig, beside
from dparallel.config.experiment import BenchmarkConfig
from dparallel.config.files import load_config
from dparallel.config.protocol import ProtocolConfig
from dparallel.evaluation.bench import Bench
from dparallel.evaluation.cases import cases
from dparallel.evaluation.store import Store
from dparallel.models import loader
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.scoring import scorers_of
from dparallel.stages.manifest import fingerprint
from dparallel.tiny.byte_level import QWEN, save_checkpoint
from tests.conftest import ROOT
from tests.dparallel.cli.eval_made import command
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP

DECODING = {"gen_length": 8, "block_length": 8, "rule": "entropy", "threshold": 10.0}
HELD = {"gsm8k": 8, "math500": 8, "humaneval": 6, "mbpp": 5}  # of the first 8 problems
TIMES = ("seconds", "seconds_alone", "measured_at")
TODAY = r"\d{4}-\d\d-\d\d( to \d{4}-\d\d-\d\d)?"


def measured(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The objects that `--json` prints, and stderr."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def plumbing(
    benchmark: str, model: str, checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One benchmark from its file to the verdicts."""
    protocol = load_config(ProtocolConfig, ROOT / "configs" / "protocols" / f"{benchmark}_{model}.yaml")
    [row], err = measured(capsys, command(checkpoint, data, f"{benchmark}_{model}"))
    assert (row["protocol"], row["version"]) == (f"{benchmark}_{model}", protocol.version)
    assert (row["samples"], row["nfe"]) == (HELD[benchmark], 1.0)
    assert {name: row["decoding"][name] for name in DECODING} == DECODING
    assert list(row["metrics"]) == [metric for scorer in scorers_of(protocol) for metric in scorer.metrics]
    assert {found["judged"] for found in row["metrics"].values()} == {HELD[benchmark]}
    for found in row["metrics"].values():
        assert (found["share"], found["stderr"], found["interval"][0]) == (0.0, 0.0, 0.0)
        assert found["interval"][1] == pytest.approx(3.841459 / (HELD[benchmark] + 3.841459), abs=1e-6)
    assert row["batch_sizes"] == [HELD[benchmark]], "not the 64 that are allowed"
    assert row["limit"] == 8
    assert row["data"][0].startswith(str(data))
    assert row["overridden"]["gen_length"] == {"protocol": protocol.decoding.gen_length, "used": 8}
    assert row["fingerprint"] == fingerprint(checkpoint)
    [samples] = Path(row["files"]["samples"]).glob("*.parquet")
    assert pq.read_table(samples).num_rows == HELD[benchmark]
    assert list(row["files"]["verdicts"]) == list(protocol.scorers)
    for folder in row["files"]["verdicts"].values():
        [verdicts] = Path(folder).glob("*.parquet")
        notes = pq.read_table(verdicts)["note"].to_pylist()
        if benchmark in ("humaneval", "mbpp"):  # programs and tests ran in the sandbox
            assert all(
                note.startswith(("the candidate raised ", "the tests raised ", "wrong at ")) for note in notes
            )
    assert f"{HELD[benchmark]}/{HELD[benchmark]} prompts" in err


BENCHMARKS = [
    "gsm8k",
    pytest.param("math500", marks=pytest.mark.slow),
    pytest.param("humaneval", marks=BUBBLEWRAP),
    pytest.param("mbpp", marks=[BUBBLEWRAP, pytest.mark.slow]),
]  # prompts with examples are thousands of bytes long


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_is_measured_from_its_file_to_the_verdicts(
    benchmark: str, checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plumbing(benchmark, "llada", checkpoint, data, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_is_measured_as_dream_is_asked(
    benchmark: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "dream", QWEN)
    plumbing(benchmark, "dream", tmp_path / "dream", data, capsys)


def test_the_row_of_a_model_that_answers(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table for people; a protocol of the user's own, given as a file."""
    questions = [f"Tom {n} coins" for n in range(4)]
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    said = complete(model, tokenizer, questions, DecodingConfig(**DECODING, cache="prefix"))
    lines = [
        json.dumps({"question": question, "answer": answer.text or "nothing"}) + "\n"
        for question, answer in zip(questions, said, strict=True)
    ]
    (tmp_path / "own.jsonl").write_text("".join(lines), encoding="utf-8")
    protocol = {
        "version": 3,
        "prompt": "{question}",
        "data": [{"path": "owner/own", "reference": "answer"}],
        "decoding": {**DECODING, "cache": "prefix"},
    }
    (tmp_path / "own.json").write_text(json.dumps(protocol), encoding="utf-8")
    arguments = ["eval", "--model", str(tiny_checkpoint), "--protocol", "own.json", "--path", "own.jsonl"]
    [found], err = measured(capsys, arguments)
    exact = found["metrics"]["exact"]
    assert exact["share"] in (0.25, 0.5, 0.75), "some responses are empty, and some are not"
    assert exact["stderr"] == pytest.approx(math.sqrt(exact["share"] * (1 - exact["share"]) / 4))
    assert err.startswith("own: 4 of 4 responses to decode\n")
    assert main(arguments) == 0
    lines = (out := capsys.readouterr().out).splitlines()
    assert lines[0] == f"{tiny_checkpoint} ({fingerprint(tiny_checkpoint)[:12]})"
    heads, cells = ([cell.strip() for cell in lines[place].strip("|").split("|")] for place in (2, 4))
    row = dict(zip(heads, cells, strict=True))
    low, high = (f"{end * 100:.1f}" for end in exact["interval"])
    assert {name: row[name] for name in ("protocol", "version", "accuracy %", "n")} == {
        "protocol": "own",
        "version": "3",
        "accuracy %": f"exact {exact['share'] * 100:.1f} ± {exact['stderr'] * 100:.1f} [{low}, {high}]",
        "n": "4",
    }
    assert re.fullmatch(rf"{TODAY} \(reused\)", row["measured"]), "the first command decoded them"
    assert "  protocol   version 3 (own.json)" in lines
    assert f"  model      {tiny_checkpoint}, fingerprint {fingerprint(tiny_checkpoint)}" in lines
    assert "  data       own.jsonl; 4 problems" in lines
    assert any(line.startswith("  device     ") and line.endswith("; batch size 4") for line in lines)
    assert "gen_length 8, block_length 8, rule entropy, threshold 10.0, cache prefix" in out
    folders = [line.split()[1] for line in lines if line.strip().startswith(("samples ", "verdicts "))]
    assert len(folders) == 2
    assert all(list(Path(folder).glob("*.parquet")) for folder in folders)


def test_a_second_run_and_the_benchmark_stage_decode_and_judge_nothing(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [first], _ = measured(capsys, command(checkpoint, data, "gsm8k_llada"))
    monkeypatch.setattr(loader, "load_model", lambda path: pytest.fail("nothing is left to decode"))
    [again], err = measured(capsys, command(checkpoint, data, "gsm8k_llada"))
    assert (first.pop("reused"), again.pop("reused")) == (0, 8)
    assert again == first
    assert "gsm8k_llada: 0 of 8 responses to decode; 8 are in runs/measurements" in err
    assert "judging" not in err

    # Nor does the benchmark of an experiment in the same folder of runs that measures the same model.
    protocol = load_config(ProtocolConfig, ROOT / "configs" / "protocols" / "gsm8k_llada.yaml")
    sweep = {"decoding": {"gen_length": 8, "block_length": 8}, "thresholds": [10.0]}
    config = BenchmarkConfig.model_validate(
        {
            "test": {"benchmark": "dataset", "protocol": protocol, "path": str(data), "count": 8},
            "reference": {**DECODING, "rule": "steps", "steps": 8, "threshold": None},
            "sweeps": {"entropy": sweep},
            "teacher_sweeps": ["entropy"],
            "student_sweeps": ["entropy"],
            "batch_size": 4,
        }
    )
    inputs = {"teacher": str(checkpoint), "student/same": str(checkpoint)}
    bench, asked = Bench(config, inputs, Path("runs", "measurements")), cases(config, inputs)
    assert len(asked.sweeps) == 2
    assert not bench.missing(asked.sweeps, "test")
    assert not bench.unjudged(asked.sweeps, "test")
    assert bench.missing([asked.reference], "test"), "another decoding"


def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_BATCHES", 1)
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_PROBLEMS", 4)


def untimed(folder: str) -> list[dict[str, Any]]:
    rows = pq.read_table(folder).sort_by("row").to_pylist()
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def same_but_for_times(one: dict[str, Any], other: dict[str, Any]) -> bool:
    timed = ("tps", "latency", "files", "measured_on", "reused")
    return all(one[name] == other[name] for name in one if name not in timed)


def test_after_ctrl_c_the_same_command_continues(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    arguments = [*command(checkpoint, data, "gsm8k_llada"), "--batch-size", "4"]
    [whole], _ = measured(capsys, [*arguments, "--runs", "undisturbed"])
    put = Store.put_samples

    def put_and_interrupt(*given: Any) -> None:
        put(*given)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_samples", put_and_interrupt)
        assert main(arguments) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == (
        "Interrupted; gsm8k_llada: 4 of 8 responses are kept in runs/measurements; run the same command "
        "again to continue."
    )
    [row], err = measured(capsys, arguments)
    assert "gsm8k_llada: 4 of 8 responses to decode; 4 are in runs/measurements" in err
    assert same_but_for_times(row, whole)
    assert untimed(row["files"]["samples"]) == untimed(whole["files"]["samples"])


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_same_command_continues(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The problems are so many that they make two slices."""
    text = (data / "gsm8k_test.jsonl").read_text(encoding="utf-8")
    (tmp_path / "gsm8k_test.jsonl").write_text(text * 12, encoding="utf-8")
    arguments = command(checkpoint, tmp_path, "gsm8k_llada")
    arguments[arguments.index("--limit") + 1] = "128"
    arguments += ["--batch-size", "8"]
    [whole], _ = measured(capsys, [*arguments, "--runs", "undisturbed"])
    process = subprocess.Popen([sys.executable, "-m", "dparallel", *arguments])
    deadline = time.monotonic() + 300
    while not list(Path("runs").glob("measurements/samples/*/*.parquet")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    [row], err = measured(capsys, arguments)
    assert "gsm8k_llada: 64 of 128 responses to decode; 64 are in runs/measurements" in err
    assert same_but_for_times(row, whole)
    assert untimed(row["files"]["samples"]) == untimed(whole["files"]["samples"])
    for name, folder in row["files"]["verdicts"].items():
        [kept], [other] = (
            [file.read_bytes() for file in Path(each).iterdir()]
            for each in (folder, whole["files"]["verdicts"][name])
        )
        assert kept == other, name


def test_the_embedded_task_is_measured_without_files(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--model", str(tiny_checkpoint), "--protocol", "coins", "--limit", "16"]
    [found], _ = measured(capsys, [*arguments, "--set", "seed=3"])
    assert (found["protocol"], found["samples"], found["limit"]) == ("coins", 16, 16)
    assert found["data"] == ["generated: coins, split test, seed 3"]
    assert (found["protocol_file"], found["overridden"]) == (None, {})
    assert list(found["metrics"]) == ["solution", "answer"]
    assert main([*arguments, "--set", "seed=3", "--threshold", "2"]) == 0
    out = capsys.readouterr().out
    assert "  data       generated: coins, split test, seed 3; 16 problems; limit 16\n" in out
    assert "threshold 2.0 (default: 0.5)" in out, "the task names no threshold"
    assert "the first 25" not in out


def test_flags_change_the_protocols_decoding() -> None:
    published = DecodingConfig(
        gen_length=64, block_length=32, rule="stability", threshold=0.9, cache="prefix"
    )
    kept = beside(published.model_dump(), {"rule": "entropy"})
    assert (kept["gen_length"], kept["cache"]) == (64, "prefix")
    assert not {"rule", "threshold", "stability_threshold", "steps"} & {k for k, v in kept.items() if v}
    assert DecodingConfig(**kept, rule="entropy") == DecodingConfig(
        gen_length=64, block_length=32, rule="entropy", cache="prefix"
    )
    whole = DecodingConfig(gen_length=64, rule="dream_entropy", steps=64)
    assert (
        DecodingConfig(**beside(whole.model_dump(), {"gen_length": 128}), gen_length=128).block_length == 128
    )
    blocks = DecodingConfig(mode="multi_block", cache="prefix", refresh_every=4)
    assert DecodingConfig(
        **beside(blocks.model_dump(), {"mode": "pipelined"}), mode="pipelined"
    ) == DecodingConfig(mode="pipelined")
    assert (
        DecodingConfig(**beside(blocks.model_dump(), {"cache": "none"}), cache="none").refresh_every is None
    )

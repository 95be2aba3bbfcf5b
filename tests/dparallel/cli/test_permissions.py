"""Files and folders that this user may not read: one line that names them, with the remedy."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import flows.distill
from dparallel.cli.main import main
from flows.command import main as run_flow
from tests.conftest import ROOT

OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root reads and writes everything
VERSION = 0x20080522  # of the structures below


class Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class Rights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """This thread is refused what a file's mode refuses; root gives up the rights by which it is not."""
    if os.geteuid() != 0:
        yield
        return
    libc, header, rights = ctypes.CDLL(None), Header(VERSION, 0), (Rights * 2)()
    if libc.capget(ctypes.byref(header), rights) != 0:
        pytest.skip("the system has no capabilities")
    before = rights[0].effective
    rights[0].effective = before & ~OVERRIDES
    assert libc.capset(ctypes.byref(header), rights) == 0
    try:
        yield
    finally:
        rights[0].effective = before
        assert libc.capset(ctypes.byref(header), rights) == 0


@contextmanager
def hidden(path: str) -> Iterator[None]:
    mode = os.stat(path).st_mode
    os.chmod(path, 0)
    try:
        with as_an_ordinary_user():
            yield
    finally:
        os.chmod(path, mode)


MODEL = ["--model", "model", "--gen-length", "12", "--block-length", "12"]
PLAN = ["plan", "my.yaml", "--rate", "1000"]
SOURCES = "trajectories.problems={{benchmark: dataset, sources: [{{path: {}}}]}}"
CASES = [
    ("runs", ["runs"]),
    ("runs", ["clean"]),
    ("runs", ["compare", "sums", "other"]),
    ("runs", PLAN),
    ("runs/sums", ["runs"]),
    ("runs/sums", ["clean", "sums"]),
    ("runs/sums", ["compare", "sums", "other"]),
    ("runs/sums/benchmark-c-0123456789", ["runs"]),
    ("runs/sums/benchmark-c-0123456789", ["compare", "sums", "other"]),
    ("model", ["generate", *MODEL, "--prompt", "Tom"]),
    ("model/config.json", ["generate", *MODEL, "--prompt", "Tom"]),
    ("model/model.safetensors", ["generate", *MODEL, "--prompt", "Tom"]),
    ("model/tokenizer.json", ["generate", *MODEL, "--prompt", "Tom"]),
    ("model", PLAN),
    ("data", [*PLAN, "--set", SOURCES.format("data")]),
    ("data", [*PLAN, "--set", SOURCES.format("data/rows.jsonl")]),
    ("data", [*PLAN, "--set", SOURCES.format("data/*.jsonl")]),
    ("data/rows.jsonl", [*PLAN, "--set", SOURCES.format("data")]),
    ("data", ["generate", "--model", "data/model", "--prompt", "Tom"]),
    ("data", ["generate", *MODEL, "--prompts", "data/rows.jsonl"]),
    ("data", ["generate", *MODEL, "--prompts", "rows.jsonl", "--out", "data/out.jsonl"]),
    ("data", ["generate", *MODEL, "--prompt", "Tom", "--trace", "data/trace.html"]),
    ("data", ["compare", "data", "other"]),
    ("data", ["compare", "data/sums", "other"]),
    ("data", ["runs", "--runs", "data/runs"]),
    ("data", ["init", "data/new.yaml"]),
    ("data", ["plan", "data/new.yaml"]),
    ("data", ["eval", "--model", "model", "--protocol", "gsm8k_llada", "--path", "data"]),
    ("my.yaml", PLAN),
]


@pytest.fixture(scope="module")
def place(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("runs/sums/benchmark-c-0123456789", "data", "model"):
        (folder / name).mkdir(parents=True)
    for name in ("data/rows.jsonl", "rows.jsonl"):
        (folder / name).write_text('{"prompt": "Tom", "reference": "1"}\n', encoding="utf-8")
    for file in tiny_checkpoint.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    settings = (ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    (folder / "my.yaml").write_text(settings.replace("../teachers/tiny", "model"), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("path", "arguments"), CASES, ids=lambda part: str(part)[:60])
def test_what_may_not_be_read_is_one_line(
    path: str,
    arguments: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    with hidden(path):
        assert main(arguments) == 2
    [*_, said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"dparallel {arguments[0]}: error: ")
    assert "ermission denied" in said
    assert path in said or "data" in said
    assert any(remedy in said for remedy in ("check ", "make it", "name another", "give a readable"))


def test_a_flow_says_it_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["distill", "--config", "my.yaml"])
    with hidden("model"), pytest.raises(SystemExit) as stopped:
        run_flow(flows.distill.distill, flows.distill.plan, flows.distill.run)
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "model/" in line
    assert "(Permission denied): check" in line

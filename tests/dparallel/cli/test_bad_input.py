"""What a user gets wrong about problems and protocols: one line, exit code 2, at once, before any decoding.

The same mistakes in the config of an experiment (`dparallel plan` makes the checks of a run), in
`dparallel eval`, and in a task of lm-eval, where it is installed.
"""

import importlib.util
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dparallel.cli.main import main
from dparallel.problems.sandbox import confinement
from dparallel.problems.sandbox.run import check_sandbox
from dparallel.tiny.byte_level import LLADA, save_checkpoint
from tests.conftest import ROOT

SECONDS = 5.0  # without the imports
DECODING = {"gen_length": 24, "block_length": 12, "rule": "steps", "steps": 24}
PROTOCOL = {"prompt": "Question: {question}", "chat": True, "scorers": ["flexible_extract"]}
DATA = {"path": "someone/sums", "split": "test", "reference": "answer"}
NEEDS_LM_EVAL = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is missing")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two byte-level checkpoints, of which `base` has no chat template."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder / "chat", LLADA)
    shutil.copytree(folder / "chat", folder / "base")
    (folder / "base" / "chat_template.jinja").unlink()
    settings = folder / "base" / "tokenizer_config.json"
    stated = json.loads(settings.read_text(encoding="utf-8"))
    stated.pop("chat_template", None)
    settings.write_text(json.dumps(stated), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, a protocol and an experiment without mistakes."""
    for name, start in {"train": 0, "test": 50}.items():
        rows = [
            {"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"}
            for number in range(start, start + 8)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    problems = {"benchmark": "dataset", "protocol": PROTOCOL}
    sources = {name: [{"path": f"{name}.jsonl", "reference": "answer"}] for name in ("train", "test")}
    experiment = {
        "name": "own",
        "teacher": "chat",
        "trajectories": {"problems": {**problems, "sources": sources["train"]}, "decoding": DECODING},
        "training": {"optimizer": {"learning_rate": 1e-4}, "epochs": 1},
        "students": {"certainty_forcing": str(ROOT / "configs" / "recipes" / "certainty_forcing.yaml")},
        "benchmarks": {
            "own": {
                "test": {**problems, "sources": sources["test"]},
                "reference": DECODING,
                "sweeps": {
                    "entropy": {
                        "decoding": {**DECODING, "rule": "entropy", "steps": None, "threshold": 0.5},
                        "thresholds": [0.5],
                    }
                },
                "teacher_sweeps": ["entropy"],
                "student_sweeps": ["entropy"],
            }
        },
    }
    (tmp_path / "own.json").write_text(json.dumps(experiment), encoding="utf-8")
    protocol = {**PROTOCOL, "data": [DATA], "decoding": DECODING}
    (tmp_path / "asked.json").write_text(json.dumps(protocol), encoding="utf-8")
    return tmp_path


def experiment(*changes: str, teacher: Path) -> list[str]:
    return ["plan", "own.json", "--rate", "1000", "--set", f"teacher={teacher}", *changes]


def evaluation(*changes: str, teacher: Path) -> list[str]:
    where = ["--path", "test.jsonl"]
    given = ["--set", *changes] if changes else []
    return ["eval", "--model", str(teacher), "--protocol", "asked.json", *where, *given]


def task(*changes: str, teacher: Path) -> list[str]:
    given = ["data_files.test=test.jsonl", "num_fewshot=0", *changes]
    protocol = [word for word in changes if word.startswith("lm_eval:")] or ["lm_eval:gsm8k"]
    given = [word for word in given if not word.startswith("lm_eval:")]
    return ["eval", "--model", str(teacher), "--protocol", *protocol, *SHAPE, "--set", *given]


SHAPE = ["--gen-length", "24", "--block-length", "12", "--rule", "steps", "--steps", "24"]


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a refused command prints."""
    began = time.process_time()
    assert main(arguments) == 2
    assert time.process_time() - began < SECONDS
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith(f"dparallel {arguments[0]}: error: ")
    assert not list(folder.glob("runs/**/*.parquet")), "nothing was decoded"
    return line


TEST = "benchmarks.own.test."
NO_COLUMN = "test.jsonl: no column '{}'; its columns: question, answer"
MISTAKES: dict[str, tuple[Any, list[str], str]] = {
    "column of an experiment": (
        experiment,
        [f"{TEST}protocol.prompt=Ask {{query}}"],
        NO_COLUMN.format("query"),
    ),
    "column": (evaluation, ["protocol.prompt=Ask {query}"], NO_COLUMN.format("query")),
    "reference of an experiment": (
        experiment,
        [f"{TEST}sources.0.reference=solution"],
        NO_COLUMN.format("solution"),
    ),
    "reference": (evaluation, ["protocol.data.0.reference=solution"], NO_COLUMN.format("solution")),
    "extra": (evaluation, ["protocol.extra=[tests]"], NO_COLUMN.format("tests")),
    "scorer of an experiment": (
        experiment,
        [f"{TEST}protocol.scorers=[flexible]"],
        "unknown scorer 'flexible'; ",
    ),
    "scorer": (evaluation, ["protocol.scorers=[exakt]"], "known: exact, flexible_extract, strict_match, "),
    "no room in an experiment": (
        experiment,
        ["benchmarks.own.test.protocol.system=" + "long " * 4000],
        "shorten the prompt or ",
    ),
    "no room": (evaluation, ["protocol.system=" + "long " * 4000], "shorten the prompt or "),
    "stop of an experiment": (experiment, [f"{TEST}protocol.stops=['']"], "stops holds an empty text"),
    "stop": (evaluation, ["protocol.stops=['']"], "stops holds an empty text"),
    "benchmark": (experiment, [f"{TEST}benchmark=gsm8k"], "known: coins, ledger, dataset, lm_eval"),
}
TASKS: dict[str, tuple[Any, list[str], str]] = {
    "task": (
        task,
        ["lm_eval:gsm8k_cott"],
        "unknown task='gsm8k_cott' of lm-eval; did you mean 'gsm8k_cot' or",
    ),
    "metric": (task, ["metric=acc"], "known: exact_match,strict-match, exact_match,flexible-extract"),
    "column of a task": (task, ["lm_eval:minerva_math500"], "has question, answer"),
    "no room in a task": (task, ["protocol.system=" + "long " * 4000], "shorten the prompt or "),
    "stop of a task": (task, ["protocol.stops=['']"], "stops"),
    "code": (task, ["lm_eval:humaneval"], "runs generated code without a sandbox: take our"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_decoding(
    mistake: str, checkpoints: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, changes, message = MISTAKES[mistake]
    assert message in refused(command(*changes, teacher=checkpoints / "chat"), folder, capsys)


@NEEDS_LM_EVAL
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", TASKS)
def test_a_mistake_about_a_task_of_lm_eval_is_one_line(
    mistake: str,
    checkpoints: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval import tasks

    assert tasks  # imported before the clock runs
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    command, changes, message = TASKS[mistake]
    assert message in refused(command(*changes, teacher=checkpoints / "chat"), folder, capsys)


@pytest.mark.parametrize(
    "command", [experiment, evaluation, pytest.param(task, marks=[NEEDS_LM_EVAL, pytest.mark.slow])]
)
@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_without_the_template_that_is_asked_for(
    command: Any, checkpoints: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["protocol.chat=true"] if command is task else []
    line = refused(command(*changes, teacher=checkpoints / "base"), folder, capsys)
    assert "has no chat template" in line
    assert "give protocol.chat_template: FILE to these problems, or protocol.chat: false" in line


@pytest.mark.parametrize("command", [experiment, evaluation])
def test_a_machine_without_the_sandbox_that_a_scorer_needs(
    command: Any,
    checkpoints: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tests = [{"question": "f", "answer": "def f(): pass", "test_list": ["assert f() is None"]}]
    (folder / "test.jsonl").write_text(json.dumps(tests[0]) + "\n", encoding="utf-8")
    prefix = TEST if command is experiment else ""
    changes = [f"{prefix}protocol.scorers=[mbpp]", f"{prefix}protocol.extra=[test_list]"]
    check_sandbox.cache_clear()
    confinement._bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", str(folder))
    line = refused(command(*changes, teacher=checkpoints / "chat"), folder, capsys)
    assert "generated code runs in bubblewrap, whose command bwrap is not on " in line


@pytest.mark.slow
def test_rows_that_changed_since_they_were_measured_are_refused_until_the_user_agrees(
    checkpoints: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored samples belong to the rows that they were decoded from, never to others of the same file."""

    def agreed() -> int:
        assert main(command) == 2
        line = capsys.readouterr().err
        assert "responses to decode" not in line
        assert "test.jsonl: changed since its problems were measured" in line
        record = re.search(r"or delete (\S+) to measure", line)
        assert record is not None
        Path(record[1]).unlink()
        return main(command)

    command = [*evaluation(teacher=checkpoints / "chat"), *SHAPE]
    assert main(command) == 0
    assert "8 of 8 responses to decode" in capsys.readouterr().err
    rows = (folder / "test.jsonl").read_text(encoding="utf-8")
    (folder / "test.jsonl").write_text(rows.replace("50 + 1", "80 + 1"), encoding="utf-8")
    assert agreed() == 0
    assert "8 of 8 responses to decode" in capsys.readouterr().err
    (folder / "test.jsonl").write_text(rows.replace("#### 51", "#### 81"), encoding="utf-8")
    assert agreed() == 0
    err = capsys.readouterr().err
    assert "0 of 8 responses to decode" in err, "prompts are as at first"
    assert "judging" in err, "references are not"

"""Ctrl-C in the first moments of the command, in real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dparallel.stages.starting import is_command
from tests.conftest import ROOT

SCRIPT = "import sys\nfrom dparallel.cli.main import main\nsys.exit(main())\n"  # as pip writes it


@pytest.mark.parametrize("script", [False, True])
def test_ctrl_c_while_modules_are_imported_is_one_line(script: bool, tmp_path: Path) -> None:
    command = ["-m", "dparallel"]
    if script:
        (tmp_path / "dparallel").write_text(SCRIPT, encoding="utf-8")
        command = [str(tmp_path / "dparallel")]
    process = subprocess.Popen(
        [sys.executable, *command, "plan", "configs/tiny.yaml"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (130, 1), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("given", "whole", "expected"),
    [
        (["-m", "eval"], ["python", "-X", "utf8", "-m", "dparallel", "eval"], True),
        (["-m"], ["python", "-m", "dparallel.distillation"], False),
        (["/bin/dparallel"], ["python", "/bin/dparallel"], True),
        (["/bin/dparallel"], ["python", "-c", "spawn_main()"], False),  # a worker of the command
        (["train.py"], ["python", "train.py"], False),
        ([], ["embedded"], False),
    ],
)
def test_only_the_command_handles_ctrl_c(given: list[str], whole: list[str], expected: bool) -> None:
    assert is_command(given, whole) is expected

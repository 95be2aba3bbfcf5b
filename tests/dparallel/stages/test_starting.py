"""Ctrl-C in the first moments of the command, in real processes."""

import os
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


COMMAND = "import sys; sys.argv, sys.orig_argv = ['/dparallel'], ['python', '/dparallel']; import dparallel"


@pytest.mark.parametrize(
    ("begin", "given", "expected"),
    [
        (COMMAND, {}, "1000 False"),
        (COMMAND, {"GOMP_SPINCOUNT": "7"}, "7 False"),
        ("import sys, dparallel.stages.starting", {}, "None False"),
        ("import sys, flows.interruption, dparallel.stages.starting", {}, "None False"),
        pytest.param("import sys, flows.environment", {}, "1000 True", marks=pytest.mark.slow),
    ],
    ids=["command", "chosen", "library", "before flows", "flows"],
)
def test_threads_that_wait_leave_their_cores_to_others(
    begin: str, given: dict[str, str], expected: str
) -> None:
    """In commands and flows, before torch is imported; a program's own threads stay as they are."""
    code = f"{begin}; import os; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout.split("\n")[0] == expected, done.stderr

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.environment import SETTINGS

import httpx
import pytest

from dparallel.config.base import ConfigError
from flows.logs import Terminal, ThinOut, is_not_told_at_the_end

ROOT = Path(__file__).parents[2]


def record(
    text: str, name: str = "dparallel.trajectories.record", level: int = logging.INFO, **more: str | None
) -> logging.LogRecord:
    made = logging.LogRecord(name, level, "", 0, text, None, None)
    made.__dict__.update(more)
    return made


def test_progress_passes_now_and_then_and_all_else_always() -> None:
    thin = ThinOut(seconds=3600)
    assert thin.filter(record("64 of 1,500 responses, 0:20 left"))
    assert not thin.filter(record("step 20 of 150: loss 0.4, 0:51 left"))
    assert thin.filter(record("Finished in state Completed()", "prefect.task_runs"))
    assert thin.filter(record("1 step is left", level=logging.WARNING))


def test_progress_passes_again_after_a_while() -> None:
    thin = ThinOut(seconds=0)
    assert all(thin.filter(record(f"{seconds} s left")) for seconds in (3, 2, 1))


@pytest.mark.parametrize(
    ("error", "printed"),
    [(ConfigError("x=1"), False), (httpx.ConnectError("refused"), False), (ValueError("a bug"), True)],
)
def test_tracebacks_of_errors_that_the_last_line_tells_are_not_printed(
    error: Exception, printed: bool
) -> None:
    failed = record("Encountered exception during execution", "prefect.flow_runs", logging.ERROR)
    assert is_not_told_at_the_end(failed)
    failed.exc_info = (type(error), error, None)
    assert is_not_told_at_the_end(failed) is printed


RECORDS = [
    record("Beginning flow run 'a' for flow 'distill'", "prefect.flow_runs"),
    record("training published", "dparallel.stage", stage="training published"),
    record("step 1 of 9: loss 0.4, 0:51 left"),
    record("step 2 of 9: loss 0.4, 0:50 left"),
    record("a batch of 8 does not fit", level=logging.WARNING),
    record("training published: done in 0:52 (9 train steps)", "dparallel.stage", stage=None),
    record("Finished in state Failed('x')", "prefect.flow_runs", logging.ERROR),
]


def shown(terminal: Terminal) -> list[str]:
    """What is in the file that a terminal writes to, without times."""
    for each in RECORDS:
        terminal.emit(each)
    stream = terminal._stream
    assert isinstance(stream, io.StringIO)
    return [line.partition(" ")[2] for line in stream.getvalue().splitlines()]


def test_a_file_gets_a_line_for_each_stage_and_little_progress() -> None:
    assert shown(Terminal(io.StringIO())) == [
        "training published: step 1 of 9: loss 0.4, 0:51 left",
        "warning: a batch of 8 does not fit",
        "training published: done in 0:52 (9 train steps)",
    ]


def test_verbose_shows_everything() -> None:
    assert len(shown(Terminal(io.StringIO(), everything=True))) == len(RECORDS)


def test_nothing_is_shown_after_an_interruption_but_how_to_go_on() -> None:
    terminal = Terminal(io.StringIO())
    terminal.mute()
    assert shown(terminal) == []
    terminal.say("interrupted")
    assert shown(terminal) == ["interrupted"]


@pytest.mark.slow
def test_a_terminal_has_one_line_of_progress_that_is_written_over() -> None:
    code = (
        "import sys\nimport flows.environment\nfrom flows.logs import Terminal\n"
        "from tests.flows.test_logs import RECORDS\n"
        "terminal = Terminal(sys.stderr)\nfor each in RECORDS: terminal.emit(each)"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # how a pseudo-terminal ends
            pass
    os.close(ours)
    assert process.returncode == 0
    lines = [line.split("\r\x1b[K")[-1] for line in written.decode().split("\r\n")]
    assert lines == [
        "warning: a batch of 8 does not fit",
        "training published: done in 0:52 (9 train steps)",
        "",
    ]
    assert written.count(b"left") == 2


def test_local_runs_and_the_prefect_command_have_the_same_settings() -> None:
    def flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}_{key.upper()}")
            else:
                yield f"{prefix}_{key.upper()}", str(value).lower()

    settings = dict(flat(tomllib.loads((ROOT / "prefect.toml").read_text(encoding="utf-8")), "PREFECT"))
    shared = {name: value for name, value in SETTINGS.items() if name.startswith("PREFECT_")}
    assert {name: settings.get(name) for name in shared} == shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["distill", "trajectories", "training", "merging", "benchmark", "teacher"],
)
def test_prefect_reads_the_settings_of_local_runs(module: str, tmp_path: Path) -> None:
    """Also from a folder without `prefect.toml`."""
    if module != "distill":  # the others differ in their imports alone, which are read instead
        lines = (ROOT / "flows" / f"{module}.py").read_text(encoding="utf-8").splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        first = next(line for line in imports if line.split()[1].split(".")[0] not in sys.stdlib_module_names)
        assert first == "from flows.environment import flow"
        return
    code = (
        f"import flows.{module}\nfrom prefect.settings import get_current_settings\n"
        "settings = get_current_settings()\n"
        "assert settings.server.analytics_enabled is False\n"
        "assert settings.server.ephemeral.startup_timeout_seconds == 120\n"
        "assert settings.logging.to_api.when_missing_flow == 'ignore'\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_terminal_that_is_closed_ends_the_output_only() -> None:
    """As when the session that started a run is closed."""
    closed = io.StringIO()
    terminal = Terminal(closed)
    closed.close()
    terminal.say("goes on")
    terminal.handle(record("an error", level=logging.ERROR))

    reader, writer = pty.openpty()
    stream = os.fdopen(writer, "w", encoding="utf-8")
    terminal = Terminal(stream)
    os.close(reader)  # writing is now an OSError
    terminal.say("goes on")
    terminal.handle(record("an error", level=logging.ERROR))
    with contextlib.suppress(OSError):
        stream.close()

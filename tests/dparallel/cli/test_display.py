"""Progress over many prompts."""

import io

import pytest

from dparallel.cli import display


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [(0.0, ["20/20"]), (1.0, ["20/20"]), (10.0, [f"{done}/20" for done in range(2, 21, 2)])],
)
def test_without_a_terminal_progress_is_a_line_in_20_seconds(
    seconds: float, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with display.progress(stream, 20) as count:
        for _ in range(20):
            now += seconds
            count()
    assert stream.getvalue().splitlines() == [f"{line} prompts" for line in lines]

import logging
from collections.abc import Iterator

import pytest

from dparallel.stages.progress import Progress, duration

log = logging.getLogger("tests.progress")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ratios(clock: Clock, progress: Progress, seconds: list[float], done: int = 0) -> Iterator[float]:
    """After every piece of work, the estimate relative to the time that the rest really takes."""
    for place, piece in enumerate(seconds, 1):
        clock.now += piece
        left = progress.seconds_left(done + place)
        if rest := sum(seconds[place:]):
            yield left / rest


def test_the_estimate_at_a_constant_rate_is_exact(clock: Clock) -> None:
    assert list(ratios(clock, Progress(log, 10, clock=clock), [2.0] * 10)) == pytest.approx([1.0] * 9)


def test_a_slow_start_is_soon_forgotten(clock: Clock) -> None:
    """As when a compiler works first: within a factor of 2 after a tenth, where the mean would give 3."""
    found = list(ratios(clock, Progress(log, 150, clock=clock), [20.0] + [1.0] * 149))
    assert all(0.5 < ratio < 2 for ratio in found[40:])
    mean = (20.0 + 39.0) / 40
    assert found[40] < mean


def test_work_that_was_done_before_is_no_part_of_the_rate(clock: Clock) -> None:
    found = list(ratios(clock, Progress(log, 1000, done=900, clock=clock), [1.0] * 100, done=900))
    assert found == pytest.approx([1.0] * 99)


def test_a_changed_speed_shows(clock: Clock) -> None:
    found = list(ratios(clock, Progress(log, 100, clock=clock), [1.0] * 30 + [4.0] * 70))
    assert all(0.5 < ratio < 2 for ratio in found[45:])


def test_messages_are_rare_and_the_last_one_comes(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(log, 40, clock=clock)
    for done in range(1, 41):
        clock.now += 0.26
        progress.tell(done, f"{done} of 40")
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "4 of 40, 0:09 left"
    assert said[-1] == "40 of 40, 0:00 left"
    assert len(said) == 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (36061, "10:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

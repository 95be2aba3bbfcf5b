"""The clock is set back by an hour while a stage runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.failures.conftest import Place
from tests.failures.experiment import STAGES
from tests.failures.table import Row

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
# Under libfaketime, torch's launcher fails in a sleep of fractions of a second.
OWN_CLOCK = """
import os, pathlib, time

file, seconds, nanoseconds = pathlib.Path(os.environ["CLOCK"]), time.time, time.time_ns
time.time = lambda: seconds() + float(file.read_text())
time.time_ns = lambda: nanoseconds() + int(float(file.read_text()) * 1e9)
"""


def faked(place: Place, stage: str) -> dict[str, str]:
    """Variables for programs whose time is shifted by what the file `clock` says."""
    clock = place.folder / "clock"
    clock.write_text("+0", encoding="utf-8")
    if stage == "training":
        (place.folder / "own" / "sitecustomize.py").parent.mkdir()
        (place.folder / "own" / "sitecustomize.py").write_text(OWN_CLOCK, encoding="utf-8")
        return {"CLOCK": str(clock), "PYTHONPATH": f"{place.folder / 'own'}:{ROOT}"}
    if not LIBRARIES:
        pytest.skip("needs libfaketime (apt-get install faketime)")
    return {
        "LD_PRELOAD": str(LIBRARIES[-1]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_clock_goes_backwards(
    before: Callable[[str], Place], shown: Callable[[Row], None], stage: str
) -> None:
    place = replace(before(stage), zygote=None)  # the time is shifted from the start of a program on
    with place.start(stage, **faked(place, stage)) as run:
        place.wait_for_the_middle(run, stage)
        (place.folder / "clock").write_text("-3600", encoding="utf-8")
        assert run.code() == 0, run.said
        assert run.leaves_no_process()
        said = run.said
    assert "taken over" not in said
    place.is_undisturbed()
    assert place.statuses()[stage] == "FINISHED"
    shown(Row("the clock goes back by an hour", stage, "the stage is finished", rerun="not needed"))

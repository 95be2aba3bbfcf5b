"""The clock is set back by an hour while a stage runs."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.failures.conftest import Place
from tests.failures.experiment import STAGES
from tests.failures.table import Row
from tests.failures.test_signals import wait_for_the_middle

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


@pytest.mark.skipif(not LIBRARIES, reason="needs libfaketime (apt-get install faketime)")
@pytest.mark.parametrize("stage", STAGES)
def test_the_clock_goes_backwards(
    before: Callable[[str], Place], shown: Callable[[Row], None], stage: str
) -> None:
    place = replace(before(stage), zygote=None)  # the library is loaded when a program starts
    clock = place.folder / "clock"
    clock.write_text("+0", encoding="utf-8")
    faked = {
        "LD_PRELOAD": str(LIBRARIES[-1]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with place.start(stage, **faked) as run:
        wait_for_the_middle(place, run, stage)
        clock.write_text("-1h", encoding="utf-8")
        assert run.code() == 0, run.said
        assert run.leaves_no_process()
        said = run.said
    assert "taken over" not in said
    place.is_undisturbed()
    assert place.statuses()[stage] == "FINISHED"
    assert os.environ.get("LD_PRELOAD") is None
    shown(Row("the clock goes back by an hour", stage, "the stage is finished", rerun="not needed"))

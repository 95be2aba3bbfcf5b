"""Progress bars in Prefect's UI, from the library's messages of progress."""

import logging
import time
from types import SimpleNamespace
from typing import Any

from flows.environment import flow

import pytest
from prefect import get_client, runtime
from prefect.client.schemas.objects import Artifact

from flows.progress import ProgressBars, percent_of

LOG = logging.getLogger("made_for_this_test")  # outside of the library, whose messages have bars already


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("step 40 of 200: loss 0.1234, 0:12 left", 20.0),
        ("1,500 of 6,000 responses, 1:00:12 left", 25.0),
        ("24 of 24 responses, 0:00 left", 100.0),
        ("0 of 0 responses, 0:00 left", None),
        ("loading, 0:12 left", None),
    ],
)
def test_percent(message: str, expected: float | None) -> None:
    assert percent_of(message) == expected


def artifacts_of(run_id: Any) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    return [artifact for artifact in found if str(artifact.flow_run_id) == str(run_id)]


def shown(run_id: Any, percent: float) -> list[Artifact]:
    """The artifacts of a run, once one of them has this percentage."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = artifacts_of(run_id)
        if any(artifact.data == percent for artifact in found):
            return found
        time.sleep(0.1)
    raise AssertionError(artifacts_of(run_id))


@pytest.fixture
def bars():
    bars = ProgressBars(seconds=0.05)
    LOG.addHandler(bars)
    LOG.setLevel(logging.INFO)
    yield bars
    LOG.removeHandler(bars)


def test_each_stage_of_a_run_has_one_bar_that_moves(prefect_server: None, bars: ProgressBars) -> None:
    @flow("distill")
    def distill(config: str, overrides: list[str]) -> Any:
        run_id = runtime.flow_run.id
        LOG.info("trajectories", extra={"stage": "trajectories"})
        LOG.info("reading problems")
        LOG.info("6 of 24 responses, 0:12 left")
        shown(run_id, 25.0)
        LOG.info("24 of 24 responses, 0:00 left")
        shown(run_id, 100.0)
        LOG.info("training fast", extra={"stage": "training fast"})
        LOG.info("step 3 of 4: loss 0.5, 0:01 left")
        return run_id

    run_id = distill("configs/tiny.yaml", ["name=sums"])
    found = sorted(shown(run_id, 75.0), key=lambda artifact: str(artifact.key))
    assert [(each.key, each.type, each.data) for each in found] == [
        ("sums-training-fast-progress", "progress", 75.0),
        ("sums-trajectories-progress", "progress", 100.0),
    ]
    assert found[0].description == "training fast: step 3 of 4: loss 0.5, 0:01 left"


def test_a_server_that_is_away_slows_and_ends_nothing(
    prefect_server: None, bars: ProgressBars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("flows.progress.get_client", away)

    @flow("distill")
    def distill(config: str) -> float:
        begun = time.monotonic()
        for step in range(1, 1001):
            LOG.info("step %d of 1000: loss 0.5, 0:01 left", step)
        return time.monotonic() - begun

    assert distill("configs/tiny.yaml") < 5


def test_messages_outside_of_a_run_are_ignored(bars: ProgressBars) -> None:
    LOG.info("6 of 24 responses, 0:12 left")
    assert bars._thread is None


def test_the_last_message_of_a_stage_is_shown_though_the_next_one_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = SimpleNamespace(id="a run", parameters={"config": "configs/tiny.yaml"}, flow_name="distill")
    monkeypatch.setattr("flows.progress.runtime", SimpleNamespace(flow_run=run))
    sent: list[tuple[str, float]] = []
    bars = ProgressBars(seconds=60)
    monkeypatch.setattr(bars, "_send", lambda run_id, key, percent, message: sent.append((key, percent)))
    log = logging.getLogger("made_for_two_stages")
    log.setLevel(logging.INFO)
    log.addHandler(bars)
    log.info("merging", extra={"stage": "merging"})
    log.info("6 of 24 layers, 0:12 left")
    end = time.monotonic() + 10
    while not sent and time.monotonic() < end:
        time.sleep(0.01)
    log.info("24 of 24 layers, 0:00 left")
    log.info("training", extra={"stage": "training"})
    log.info("1 of 4 steps, 0:01 left")
    while ("tiny-merging-progress", 100.0) not in sent and time.monotonic() < end:
        time.sleep(0.01)
    assert sent[:2] == [("tiny-merging-progress", 25.0), ("tiny-merging-progress", 100.0)]

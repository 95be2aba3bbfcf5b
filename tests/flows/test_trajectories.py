"""Trajectories on a work pool, with a thread in place of its workers."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import get_client
from prefect.automations import Automation
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.schemas.automations import EventTrigger
from prefect.settings import get_current_settings

import flows.trajectories
from dparallel.problems import prompts
from dparallel.stages.manifest import StageError, read_manifest
from flows.command import main
from flows.dispatch import dispatch_all
from flows.trajectories import shards, trajectories

pytestmark = pytest.mark.usefixtures("prefect_server", "local_store")

FOUR_SHARDS = ["trajectories.shard_size=6"]  # of 24 problems


@pytest.fixture(scope="module", autouse=True)
def part(prefect_server: None) -> None:
    shards.to_deployment(name="record-part").apply()


@pytest.fixture(autouse=True)
def polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.dispatch.dispatch_all", partial(dispatch_all, poll_seconds=0.1))


def parts(config_file: Path) -> list[FlowRun]:
    """The dispatched runs for a config, the oldest first."""
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs() if run.deployment_id is not None]
    mine = [run for run in runs if str(config_file) in str(run.parameters.get("config"))]
    return sorted(mine, key=lambda run: (run.created, run.name))


@contextmanager
def worker(config_file: Path, dies_at: set[int]) -> Iterator[None]:
    """Runs one part after another; parts whose index is in `dies_at` crash before their last shard."""
    stopped = threading.Event()

    def work() -> None:
        done = 0
        while not stopped.is_set():
            for run in parts(config_file):
                if run.state is None or run.state.is_final():
                    continue
                dies = done in dies_at
                numbers = run.parameters["numbers"]
                shards(**{**run.parameters, "numbers": numbers[:-1] if dies else numbers})
                state = State(type=StateType.CRASHED if dies else StateType.COMPLETED, message="exit code -9")
                with get_client(sync_client=True) as client:
                    client.set_flow_run_state(run.id, state, force=True)
                done += 1
            time.sleep(0.1)

    thread = threading.Thread(target=copy_context().run, args=(work,))  # the context holds the tests' server
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@pytest.mark.slow
def test_what_a_dead_worker_left_is_redone(config_file: Path) -> None:
    with worker(config_file, dies_at={0}):
        folder = trajectories(str(config_file), [*FOUR_SHARDS, "launch.parts=2"], on_pool=True)
    assert [run.parameters["numbers"] for run in parts(config_file)] == [[0, 2], [1, 3], [2]]
    assert [run.name for run in parts(config_file)][:2] == [
        "small: shards, part 1 of 2",
        "small: shards, part 2 of 2",
    ]

    # The number of parts is not part of the key of the stage, which is therefore found again.
    assert trajectories(str(config_file), FOUR_SHARDS) == folder
    assert len(read_manifest(folder).files) == 4


def test_the_automation_for_lost_runs_is_one_that_the_server_takes() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "automations" / "lost_runs.yaml").read_text(
        encoding="utf-8"
    )
    automation = Automation.model_validate(yaml.safe_load(text))
    assert isinstance(automation.trigger, EventTrigger)
    heartbeat = get_current_settings().flows.heartbeat_frequency
    assert heartbeat is not None
    assert automation.trigger.within >= timedelta(seconds=3 * heartbeat), "two may be late"


@pytest.mark.slow
def test_a_part_that_always_dies_is_named_and_the_rerun_only_adds(config_file: Path) -> None:
    with (
        worker(config_file, dies_at={0, 1, 2}),
        pytest.raises(StageError, match=r"part-00003\.parquet; .*shards, part 1 of 1' .*exit code -9"),
    ):
        trajectories(str(config_file), FOUR_SHARDS, on_pool=True)
    with worker(config_file, dies_at=set()):
        trajectories(str(config_file), FOUR_SHARDS, on_pool=True)
    assert [run.parameters["numbers"] for run in parts(config_file)] == [[0, 1, 2, 3], [3], [3], [3]]


def test_checks_run_once_and_look_only_at_what_a_stage_touches(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 problems in shards of 6, and two sets that only the benchmark needs."""
    rendered: dict[str, list[int]] = {"preflight.checks": [], "trajectories.record": []}
    for module, counts in rendered.items():

        def counted(problems: list, *more: Any, counts: list[int] = counts) -> list[list[int]]:
            counts.append(len(problems))
            return prompts.encode_problems(problems, *more)

        monkeypatch.setattr(f"dparallel.{module}.encode_problems", counted)
    shards(str(config_file), [1], FOUR_SHARDS)
    assert rendered == {"preflight.checks": [], "trajectories.record": [6]}
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(config_file), "--set", *FOUR_SHARDS])
    main(trajectories, flows.trajectories.plan, flows.trajectories.run)
    assert rendered == {"preflight.checks": [24], "trajectories.record": [6, 6, 6, 6]}
    folder = capsys.readouterr().out.splitlines()[-1]
    assert len(read_manifest(folder).files) == 4

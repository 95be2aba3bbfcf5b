import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from prefect.settings import get_current_settings

from dparallel.stages.manifest import MANIFEST
from tasks.tracking.upload import upload
from tests.failures.experiment import (
    copy_before,
    is_in_the_middle,
    results,
    settings,
    stage_folder,
    temporary_files,
)
from tests.failures.local import Command, running
from tests.failures.stack import FINAL, Case, Stack, running_stack
from tests.failures.table import Row, Table
from tests.failures.zygote import Zygote
from tests.flows.conftest import prefect_server
from tests.stores import new_store

__all__ = ["prefect_server"]

LIMIT = 900  # seconds for a case, on a busy machine; idle, most take 10 to 60
TABLE = pytest.StashKey[Table]()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """These tests run when they are asked for: by their marker, or by their folder."""
    asked = "failures" in config.option.markexpr or any("failures" in name for name in config.args)
    return None if asked else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.failures)
            item.add_marker(pytest.mark.timeout(LIMIT, func_only=True))


def pytest_configure(config: pytest.Config) -> None:
    rows = os.environ.get("FAILURE_ROWS")
    config.stash[TABLE] = Table(None if rows is None else Path(rows))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table if it is asked for and every case has a row."""
    table = session.config.stash[TABLE]
    table.keep()
    if "WRITE_FAILURES" not in os.environ:
        return
    tests = [item.nodeid for item in session.items]
    if session.testsfailed or (missing := table.missing(tests)):
        reason = "cases failed" if session.testsfailed else f"cases without a result: {', '.join(missing)}"
        print(f"\nthe table in docs/operations.md stays as it is: {reason}")
        return
    table.write(tests)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.config.stash[TABLE].drop(item.nodeid)
    return report


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Notes what a case has shown, as its last step."""
    return lambda row: request.config.stash[TABLE].add(request.node.nodeid, row)


@dataclass(frozen=True)
class Place:
    """The folder of a case: its config, its runs, its MLflow store.

    Attributes:
        undisturbed: the digests of all stages of a run without a fault.
        zygote: starts the commands.
    """

    folder: Path
    runs: Path
    config: Path
    store: str
    environment: dict[str, str]
    undisturbed: dict[str, str]
    zygote: Zygote | None = None

    def start(self, flow: str, *options: str, **variables: str) -> AbstractContextManager[Command]:
        """Start `python -m flows.FLOW`, with further options and environment variables."""
        arguments = [f"flows.{flow}", "--config", str(self.config), *options]
        return running(arguments, self.folder, {**self.environment, **variables}, self.zygote)

    def stage(self, name: str) -> Path:
        return stage_folder(self.runs, name)

    def has_begun(self, stage: str) -> bool:
        """Whether a stage has its folder."""
        return any(self.runs.glob(f"*/{stage}-*/stage.json"))

    def is_finished(self, stage: str) -> bool:
        return any(self.runs.glob(f"*/{stage}-*/{MANIFEST}"))

    def wait_for_the_middle(self, run: Command, stage: str) -> None:
        """Wait until some of a stage is done, and some is not."""
        run.wait_until(lambda: is_in_the_middle(self.runs, stage))
        assert not self.is_finished(stage), "the fault comes too late"

    def same_again(self, flow: str, *options: str) -> str:
        """Give the command again: it ends well, with the undisturbed result, and leaves nothing behind."""
        with self.start(flow, *options) as run:
            assert run.code() == 0, run.said
            assert run.leaves_no_process()
            said = run.said
        self.is_undisturbed()
        return said

    def is_undisturbed(self) -> None:
        found = results(self.runs)
        assert found == {name: self.undisturbed[name] for name in found}
        assert temporary_files(self.runs) == []

    def statuses(self) -> dict[str, str]:
        """Status in MLflow of the newest run of every stage, after what waits was uploaded."""
        assert upload(self.runs) == []
        client = MlflowClient(tracking_uri=self.store)
        experiment = client.get_experiment_by_name("small")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
        return {run.data.tags["stage"]: run.info.status for run in runs}


@pytest.fixture(scope="session")
def api(prefect_server: None) -> str:
    """Address of the Prefect server of all local runs."""
    url = get_current_settings().api.url
    assert url is not None
    return url


@pytest.fixture(scope="session")
def zygote(api: str) -> Iterator[Zygote]:
    """Starts commands that have imported everything already."""
    made = Zygote({"PREFECT_API_URL": api})
    yield made
    made.close()


def place_in(
    folder: Path, teacher: Path, api: str, undisturbed: dict[str, str], zygote: Zygote | None = None
) -> Place:
    config, store = folder / "small.yaml", new_store(folder)
    config.write_text(yaml.safe_dump(settings(teacher, folder / "runs")), encoding="utf-8")
    environment = {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": store}
    return Place(folder, folder / "runs", config, store, environment, undisturbed, zygote)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, api: str) -> Iterator[Path]:
    """The folder of an undisturbed run of all stages."""
    folder = tmp_path_factory.mktemp("reference")
    place = place_in(folder, tiny_checkpoint, api, {})
    with place.start("distill") as run:
        assert run.code(LIMIT) == 0, run.said
    assert temporary_files(place.runs) == []
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(
    tmp_path: Path,
    reference: Path,
    tiny_checkpoint: Path,
    api: str,
    zygote: Zygote,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    """A folder without any stage."""
    made = place_in(tmp_path, tiny_checkpoint, api, results(reference / "runs"), zygote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.store)
    yield made
    shutil.rmtree(made.runs, ignore_errors=True)


@pytest.fixture
def before(place: Place, reference: Path) -> Callable[[str], Place]:
    """Prepares the folder of a case: all stages before the named one are finished."""

    def prepare(stage: str) -> Place:
        copy_before(reference / "runs", place.runs, stage)
        return place

    return prepare


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, reference: Path
) -> Iterator[Stack]:
    """Servers, a cpu and a gpu worker, for all cases of a module."""
    with running_stack(tmp_path_factory.mktemp("clone"), tiny_checkpoint) as made:
        yield made


@pytest.fixture
def case(
    tmp_path: Path, reference: Path, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Case]]:
    """Prepares a case on servers: all stages before the named one are finished."""
    stack.up()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow)
    runs, name = tmp_path / "runs", f"case-{time.monotonic_ns()}"

    def prepare(stage: str) -> Case:
        copy_before(reference / "runs", runs, stage)
        if (runs / "small").exists():
            (runs / "small").rename(runs / name)
        config = stack.config(runs, name=name)
        return Case(stack, runs, config, name, stage, results(reference / "runs"))

    yield prepare
    stack.up()
    for run in stack.runs_in(runs):
        if run["state_type"] not in FINAL:
            stack.ask(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
    for process in stack.processes(str(runs)):
        with contextlib.suppress(Exception):
            process.kill()
    shutil.rmtree(runs, ignore_errors=True)

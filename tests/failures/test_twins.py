"""Two identical runs at once: one works, the other one waits, and both end with the same result."""

import signal
from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from tests.failures.conftest import Place
from tests.failures.experiment import LOST, STAGES, temporary_files
from tests.failures.local import waits
from tests.failures.table import Row


def versions_of(client: MlflowClient, student: str) -> int:
    """Number of registered versions of a student."""
    versions = client.search_model_versions("name = 'small'")
    return sum(version.tags["student"] == student for version in versions)


@pytest.mark.parametrize("stage", STAGES)
def test_two_at_once(before: Callable[[str], Place], shown: Callable[[Row], None], stage: str) -> None:
    place = before(stage)
    with place.start(stage, "-v") as first, place.start(stage, "-v") as second:
        codes = [run.code() for run in (first, second)]
        said = [run.said for run in (first, second)]
        assert codes == [0, 0], "\n".join(said)
        assert first.leaves_no_process()
        assert second.leaves_no_process()
    assert sorted("already done" in text for text in said) == [False, True], "\n".join(said)
    # A stage of seconds may be done before the other run, whose processes are still starting, asks for it.
    assert sum(map(waits, said)) <= 1, "\n".join(said)
    place.is_undisturbed()
    client = MlflowClient(tracking_uri=place.store)
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    made, *reused = sorted(run.data.tags["reused"] for run in runs)
    assert made == "false"
    assert reused in (["true"], []), "none if the first one was uploaded before the second one looked"
    assert versions_of(client, "published") == (1 if stage == "merging" else 0)
    outcome = "the second one says that it waits while the first one works, and uses its result"
    shown(Row("the same command twice at once", stage, outcome))


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_one_is_killed(
    before: Callable[[str], Place], shown: Callable[[Row], None], stage: str
) -> None:
    place = before(stage)
    with place.start(stage, "-v") as first:
        place.wait_for_the_middle(first, stage)
        first.send_all(signal.SIGSTOP)
        with place.start(stage, "-v") as second:
            second.wait_until(lambda: waits(second.said))
            first.signal(signal.SIGKILL)
            first.send_all(signal.SIGCONT)
            assert second.code() == 0, second.said
            assert second.leaves_no_process()
        assert first.leaves_no_process()
    place.is_undisturbed()
    outcome = "the second one says that it waits, then takes over and finishes"
    shown(Row("the same command twice at once, SIGKILL of the first", stage, outcome, LOST[stage]))


def test_two_experiments_begin_at_once_in_a_new_place(place: Place, shown: Callable[[Row], None]) -> None:
    """Neither the folder of runs nor MLflow's store exists."""
    (place.folder / "mlflow.db").unlink()
    with place.start("distill", "-v") as first, place.start("distill", "-v") as second:
        assert [run.code(300) for run in (first, second)] == [0, 0], f"{first.said}\n{second.said}"
    place.is_undisturbed()
    assert temporary_files(place.runs) == []
    assert place.statuses()["distill"] == "FINISHED"
    client = MlflowClient(tracking_uri=place.store)
    assert versions_of(client, "published") == 1
    outcome = "each stage is made by one of them; both print the report; one version in the registry"
    shown(Row("`distill` twice at once, without a store of MLflow", "all", outcome))

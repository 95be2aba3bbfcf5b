"""A run is ended by a signal in each stage, and given again."""

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.failures.conftest import Place
from tests.failures.experiment import LOST, STAGES, temporary_files
from tests.failures.local import SIGNALS
from tests.failures.table import Row

IN_ORDER = 10.0  # seconds in which a run ends by itself


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_the_flow_is_ended(
    before: Callable[[str], Place], shown: Callable[[Row], None], stage: str, number: signal.Signals
) -> None:
    place = before(stage)
    with place.start(stage) as run:
        place.wait_for_the_middle(run, stage)
        run.signal(number)
        code = run.code(IN_ORDER + 5)
        assert run.leaves_no_process()
        said = run.said
    assert not place.is_finished(stage)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        outcome = "ends at once, no process is left; MLflow shows it as killed after the next upload"
    else:
        assert code == 128 + number, said
        assert temporary_files(place.runs) == []
        assert "Traceback" not in said
        assert "what is done is kept. To go on, give the same command: " in run.last
        outcome = f"ends within {IN_ORDER:.0f} s with exit code {code}, says how to go on, killed in MLflow"
    assert place.statuses()[stage] == "KILLED"
    place.same_again(stage)
    assert place.statuses()[stage] == "FINISHED"
    shown(Row(f"{SIGNALS[number]} of the run", stage, outcome, LOST[stage]))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_training_process_is_ended(
    before: Callable[[str], Place], shown: Callable[[Row], None], number: signal.Signals
) -> None:
    place = before("training")
    with place.start("training") as run:
        place.wait_for_the_middle(run, "training")
        [rank] = [
            process
            for process in run.family()
            if "torch.distributed.run" not in process.cmdline()
            and "dparallel.distillation" in process.cmdline()
        ]
        rank.send_signal(number)
        assert run.code() == 1, run.said
        assert run.leaves_no_process()
        said = run.said
    assert "Traceback" not in said
    ended = f"flow training failed: a training process was ended by {number.name} (signal {number.value})"
    assert run.last.startswith(ended), said
    assert "give the same command again to go on from the last one" in run.last
    assert place.statuses()["training"] == "FAILED"
    place.same_again("training")
    outcome = "exit code 1, one line with the signal and how to go on"
    shown(Row(f"{number.name} of a training process", "training", outcome, LOST["training"]))


def test_the_temporary_server_is_killed(
    before: Callable[[str], Place], api: str, shown: Callable[[Row], None]
) -> None:
    place = replace(before("trajectories"), zygote=None)
    del place.environment["PREFECT_API_URL"]
    with place.start("trajectories", PREFECT_HOME=str(place.folder / "prefect")) as run:
        place.wait_for_the_middle(run, "trajectories")
        [server] = [process for process in run.family() if "uvicorn" in process.cmdline()]
        server.kill()
        assert run.code(300) == 1, run.said
        assert run.leaves_no_process()
        said = run.said
    assert place.is_finished("trajectories")
    told = "flow trajectories failed: Prefect's server does not answer (", "To go on, give the same command: "
    assert all(text in said for text in told), said
    assert "Traceback" not in said
    place.environment["PREFECT_API_URL"] = api
    place.same_again("trajectories")
    outcome = "the stage is finished; exit code 1, one line with the server and how to go on"
    shown(Row("SIGKILL of a local run's own Prefect server", "trajectories", outcome))

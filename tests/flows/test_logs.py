import logging

import pytest

from dparallel.config.base import ConfigError
from flows.logs import ThinOut, is_not_a_users_error


def record(
    text: str, name: str = "dparallel.trajectories.record", level: int = logging.INFO
) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, text, None, None)


def test_progress_is_printed_now_and_then_and_all_else_always() -> None:
    thin = ThinOut(seconds=3600)
    assert thin.filter(record("part-00000.parquet: 500 rows, about 20 s left"))
    assert not thin.filter(record("step 20 of 150: loss 0.4, 0:51 left", "prefect.task_runs"))
    assert not thin.filter(record("test: teacher, entropy 0.6: 99 % right", "dparallel.evaluation.stage"))
    assert thin.filter(record("Finished in state Completed()", "prefect.task_runs"))
    assert thin.filter(record("1 step is left", "dparallel.evaluation.stage", logging.WARNING))


def test_progress_is_printed_again_after_a_while() -> None:
    thin = ThinOut(seconds=0)
    assert all(thin.filter(record(f"{seconds} s left")) for seconds in (3, 2, 1))


@pytest.mark.parametrize(("error", "printed"), [(ConfigError("x=1"), False), (ValueError("a bug"), True)])
def test_tracebacks_of_users_errors_are_not_printed(error: Exception, printed: bool) -> None:
    failed = record("Encountered exception during execution", "prefect.flow_runs", logging.ERROR)
    assert is_not_a_users_error(failed)
    failed.exc_info = (type(error), error, None)
    assert is_not_a_users_error(failed) is printed

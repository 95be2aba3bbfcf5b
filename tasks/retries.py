"""Which errors of a stage go away by themselves: the stage is then tried again, and goes on where it was."""

import errno
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from dparallel.config.base import UserError

# Of network file systems and connections; missing files, permissions and full disks stay as they are.
TRANSIENT = {
    errno.EIO,
    errno.EAGAIN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
}
RETRIES = 2
DELAYS: list[float] = [10.0, 60.0]  # seconds

P = ParamSpec("P")
R = TypeVar("R")


def resumable_task(name: str, run_name: str | None = None) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A decorator like `prefect.task`, for work that finds what it has done when it is started again."""
    return task(
        name=name,
        task_run_name=run_name,
        cache_policy=NO_CACHE,  # stages find their own results
        retries=RETRIES,
        retry_delay_seconds=DELAYS,
        retry_condition_fn=on_transient_errors,
    )


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a failure of a network or of a file system behind one.

    A user's error is one only if the system said so: a library's `ConnectionError` may mean that it was told
    to stay offline. A broken pipe stays broken.
    """
    causes = [cause for cause in _causes(error) if not isinstance(cause, BrokenPipeError)]
    if any(isinstance(cause, OSError) and cause.errno in TRANSIENT for cause in causes):
        return True
    of_network = any(isinstance(cause, ConnectionError | TimeoutError) for cause in causes)
    return of_network and not isinstance(error, UserError)


def on_transient_errors(task: Any, run: Any, state: State[Any]) -> bool:
    """Condition of Prefect's retries."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

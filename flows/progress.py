"""How far a flow run's stage is, as a progress bar among the artifacts of the run in Prefect's UI."""

import logging
import re
import threading
from uuid import UUID

from prefect import get_client, runtime
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from flows.logs import STAGE, is_progress
from flows.names import experiment_of
from tasks.labels import artifact_key

SECONDS = 5.0  # between two updates
DONE_OF = re.compile(r"(\d[\d,]*) of (\d[\d,]*)")


def show_progress() -> None:
    """Show the library's messages of progress in the flow run that they belong to."""
    log = logging.getLogger("dparallel")
    if not any(isinstance(handler, ProgressBars) for handler in log.handlers):
        log.addHandler(ProgressBars())


def percent_of(message: str) -> float | None:
    """Percentage of a message such as `step 40 of 200: loss 0.1, 0:12 left`; None without such numbers."""
    found = DONE_OF.search(message)
    if found is None:
        return None
    done, total = (int(number.replace(",", "")) for number in found.groups())
    return min(100.0, 100.0 * done / total) if total else None


class ProgressBars(logging.Handler):
    """Keeps one progress artifact for each stage of a flow run, with the latest message as its description.

    A thread of its own talks to the server, so that a slow one, or one that is away, does not slow the work.
    """

    def __init__(self, seconds: float = SECONDS):
        super().__init__(logging.INFO)
        self._seconds = seconds
        self._stage: str | None = None
        self._keys: dict[tuple[str, str], str] = {}  # of artifacts, by flow run and stage
        self._latest: dict[tuple[str, str], tuple[float, str]] = {}  # percent, message by flow run and key
        self._artifacts: dict[tuple[str, str], UUID] = {}
        self._news = threading.Event()
        self._done = threading.Event()  # a stage is: its last message does not wait, the process may end
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a message of progress; others are ignored."""
        self._stage = getattr(record, STAGE, self._stage)
        run_id, message = str(runtime.flow_run.id or ""), record.getMessage()
        percent = percent_of(message) if is_progress(record) else None
        if not run_id or percent is None:
            return
        stage = self._stage or str(runtime.flow_run.flow_name)
        if (run_id, stage) not in self._keys:
            experiment = experiment_of(runtime.flow_run.parameters)
            self._keys[run_id, stage] = artifact_key(experiment, stage, "progress")
        self._latest[run_id, self._keys[run_id, stage]] = (percent, f"{stage}: {message}")
        if percent == 100.0:
            self._done.set()
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, daemon=True)
            self._thread.start()

    def _send_all(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            self._done.clear()
            for place in list(self._latest):
                try:
                    self._send(*place, *self._latest.pop(place))
                except Exception as error:  # progress is no reason to end a run
                    logging.getLogger(__name__).debug("progress was not shown: %s", error)
            self._done.wait(self._seconds)

    def _send(self, run_id: str, key: str, percent: float, message: str) -> None:
        with get_client(sync_client=True) as client:
            known = self._artifacts.get((run_id, key))
            if known is None:
                bar = ArtifactCreate(
                    key=key, type="progress", description=message, data=percent, flow_run_id=UUID(run_id)
                )
                self._artifacts[run_id, key] = client.create_artifact(bar).id
            else:
                client.update_artifact(known, ArtifactUpdate(description=message, data=percent))

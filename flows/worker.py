"""Prefect's worker of process pools, whose flow runs do not stay in state Running when it is stopped.

    python -m flows.worker --pool gpu --limit 1 --name NAME

It takes the options of `prefect worker start`. At SIGTERM and Ctrl-C Prefect's own worker kills the processes
of its flow runs and leaves their states as they are (https://github.com/PrefectHQ/prefect/issues/16746): a
flow that waits for them goes on waiting until the automation `lost runs` misses their heartbeats.
"""

import contextlib
import sys
import warnings

import anyio
import anyio.abc
from prefect.cli import app
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

SECONDS = 10.0  # for the server to answer
MESSAGE = "Its worker was stopped."

with warnings.catch_warnings(action="ignore", category=UserWarning):  # it takes the place of Prefect's

    class Worker(ProcessWorker):
        """Marks its flow runs as Crashed when it is stopped."""

        type = "process"

        async def run(
            self,
            flow_run: FlowRun,
            configuration: ProcessJobConfiguration,
            task_status: anyio.abc.TaskStatus[int] | None = None,
        ) -> ProcessWorkerResult:
            """Run a flow run to its end, in a process."""
            try:
                return await super().run(flow_run, configuration, task_status)
            except anyio.get_cancelled_exc_class():
                with anyio.move_on_after(SECONDS, shield=True), contextlib.suppress(Exception):
                    await self._mark_as_crashed(flow_run)
                raise

        async def _mark_as_crashed(self, flow_run: FlowRun) -> None:
            """Mark a run as Crashed, unless it has ended or is being cancelled."""
            state = (await self.client.read_flow_run(flow_run.id)).state
            if state is not None and (state.is_running() or state.is_pending()):
                await self._propose_crashed_state(flow_run, MESSAGE)


if __name__ == "__main__":
    sys.argv[1:1] = ["worker", "start"]
    app()

"""Flows: where and when each stage runs."""

import os

# A flow without a server starts one of its own; on a busy machine that takes longer than Prefect's 20 s.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# The library's loggers also speak outside of a flow run; that is no mistake.
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")

from flows.logs import show_progress

show_progress()

"""Flows: one per stage, with one or more deployments each; they decide where and when a stage runs."""

import os

# A flow without a server starts a temporary one; on a busy machine this exceeds Prefect's limit of 20 s.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# Sending usage statistics locks the temporary server's database while the run starts.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# MLflow reports the making of its tables.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# The library also logs outside of flow runs, which Prefect would warn about.
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")

from flows.logs import show_progress

show_progress()

"""Tasks: a library call as a step of a flow, with log, Prefect artifact and MLflow run."""

"""Tasks: how a library call becomes a step of a flow, with its log, its artifact and its MLflow run."""

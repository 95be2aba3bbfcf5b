"""How MLflow's page of runs looks when it is opened by a link: its columns, and what its side bar offers.

MLflow keeps both in tags of the experiment: the state of the page under a key that the link names (as its own
"Share" button does), and the kind of experiment.
"""

import json

from tasks.tracking.links import VIEW

COLUMNS = (
    "tags.`stage`",
    "tags.`default_student`",
    "metrics.`headline/accuracy`",
    "metrics.`headline/nfe`",
    "metrics.`headline/tpf`",
    "metrics.`headline/nfe_ratio`",
    "metrics.`headline/tps`",
    "metrics.`headline/latency`",
    "metrics.`headline/teacher_accuracy`",
    "metrics.`headline/teacher_nfe`",
    "metrics.`seconds`",
)
KIND = "custom_model_development"
STATE = {"selectedColumns": list(COLUMNS), "runsHiddenMode": "FIRST_10_RUNS"}


def experiment_tags(name: str) -> dict[str, str]:
    """Tags of an experiment."""
    note = (
        f"Experiment `{name}` of dparallel. A `distill` run is the parent of its stages; its metrics "
        "`headline/…` are those of the default student and of the teacher, on the test problems."
    )
    return {
        "mlflow.experimentKind": KIND,
        f"mlflow.sharedViewState.{VIEW}": json.dumps(STATE),
        "mlflow.note.content": note,
    }

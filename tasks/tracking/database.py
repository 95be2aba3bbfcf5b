"""The database of a store that is a file, made as a whole.

MLflow makes its tables in place, without a lock and not in one transaction: two processes that begin at once,
or one that is killed meanwhile, would leave a database that no later run can use.
"""

import tempfile
from pathlib import Path

from mlflow import MlflowClient

from dparallel.stages.files import create
from tasks.tracking.records import SQLITE


def make_database(uri: str) -> None:
    """Make the database of `uri` elsewhere and put it in place, unless it is there or no SQLite file.

    Raises:
        FileError: the file cannot be written.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists() or not path.parent.is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "mlflow.db"
        MlflowClient(tracking_uri=f"{SQLITE}{whole}").search_experiments()
        create(path, whole.read_bytes())  # the first one stays

"""MLflow stores for tests: migrations run once per process, and each test gets a copy."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from mlflow import MlflowClient

from tests.conftest import HOME


@cache
def _migrated() -> Path:
    folder = Path(tempfile.mkdtemp(dir=HOME))
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


def new_store(folder: Path) -> str:
    """The URI of an empty store in `folder`."""
    shutil.copy(_migrated(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"

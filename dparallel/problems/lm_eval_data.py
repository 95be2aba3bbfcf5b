"""Tasks of lm-eval with their data, from the Hub or from local files."""

from functools import cache
from pathlib import Path
from typing import Any

from dparallel.config.sources import kind_of
from dparallel.models.offline import cache_if_offline
from dparallel.problems.lm_eval_index import manager, task_settings
from dparallel.problems.sources import ProblemsError
from dparallel.problems.tables import KINDS, TableError, check_kinds, open_table

OTHER_SPLITS = ("training_split", "validation_split", "fewshot_split")


@cache
def open_task(name: str, num_fewshot: int | None, data_files: tuple[tuple[str, str], ...]) -> Any:
    """A task of lm-eval with its data.

    Args:
        num_fewshot: number of examples; None for the task's own.
        data_files: local files by split, in place of the data set on the Hub.
    """
    settings = task_settings(name)
    count = settings.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    changes: dict[str, Any] = {"task": name, "num_fewshot": count}
    if data_files:
        changes |= _local_data(name, settings, count, dict(data_files))
    import datasets  # imported here because it takes a second

    datasets.disable_progress_bars()
    try:
        whole = {"group": "dparallel", "task": [changes]}  # takes the settings of the task's file
        with cache_if_offline():
            [task] = manager(name).load(whole)["tasks"].values()
    except Exception as error:  # a task is a program of its own
        raise ProblemsError(_not_loaded(name, settings, count, dict(data_files), error)) from error
    return task


def _not_loaded(
    name: str, settings: dict[str, Any], count: int, files: dict[str, str], error: Exception
) -> str:
    reason = f"{type(error).__name__}: {error}"
    named = settings.get("dataset_path")
    if isinstance(error, ImportError):
        return (
            f"task={name!r} of lm-eval needs another package ({reason}): install it, or choose another task"
        )
    if files:
        columns = "; ".join(f"{file} has {', '.join(_columns(file))}" for file in files.values())
        return (
            f"task={name!r} of lm-eval cannot use the columns of data_files ({reason}; {columns}): give "
            f"files with the columns of {named}"
        )
    needed = ", ".join(f"{split}: FILE" for split in _splits(settings, count))
    return (
        f"task={name!r} of lm-eval cannot be loaded ({reason}); offline, give local copies of the splits of "
        f"{named}: data_files: {{{needed}}}"
    )


def _splits(settings: dict[str, Any], count: int) -> list[str]:
    """The splits that a task reads: of its problems, then of its examples."""
    examples = settings.get("fewshot_config") or {}
    source = examples.get("split") or settings.get("fewshot_split") or settings.get("training_split")
    asked = settings.get("test_split") or settings.get("validation_split")
    needed = [asked, *([source] if count and not examples.get("samples") else [])]
    return list(dict.fromkeys(filter(None, needed)))


def _columns(file: str) -> list[str]:
    """The columns of a local file, all of whose rows are read.

    Raises:
        ProblemsError: it is missing, empty or damaged, or no table.
    """
    path = Path(file)
    if not path.is_file():
        raise ProblemsError(f"data_files: {file}: no such file (looked in {Path.cwd()})")
    try:
        check_kinds([path])
        table = open_table(path)
        _, columns = table.read(range(len(table)), ())
    except TableError as error:
        raise ProblemsError(f"data_files: {error}") from error
    if not len(table):
        raise ProblemsError(f"data_files: {file} holds 0 rows: give another file")
    return columns


def _local_data(name: str, settings: dict[str, Any], count: int, files: dict[str, str]) -> dict[str, Any]:
    """Settings that make a task read local files."""
    needed = _splits(settings, count)
    if missing := [split for split in needed if split not in files]:
        whose = " for its examples" if missing[0] != needed[0] else ""
        raise ProblemsError(
            f"task={name!r} of lm-eval reads the split {missing[0]!r}{whose}, and data_files gives "
            f"{', '.join(files)}: give {missing[0]}: FILE"
        )
    usual = ("train", "validation", "test")  # of another task of the same command
    if unknown := [split for split in files if split not in (*usual, *needed)]:
        raise ProblemsError(
            f"data_files gives {unknown[0]}, and task={name!r} of lm-eval reads {', '.join(needed)}: drop it"
        )
    for file in files.values():
        _columns(file)
    readers = {KINDS[kind_of(Path(file))].lower() for file in files.values()}
    if len(readers) > 1:
        raise ProblemsError(
            f"data_files: {', '.join(files.values())}: give files of one kind, JSON or Parquet"
        )
    changes: dict[str, Any] = {
        "dataset_path": readers.pop(),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(Path(file).absolute()) for split, file in files.items()}
        },
    }
    for setting in OTHER_SPLITS:
        if settings.get(setting) not in (None, *files):
            changes[setting] = None
    return changes

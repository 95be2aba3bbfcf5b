"""Find the files of a data set, the files of a split, and the rows of a slice."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from dparallel.config.sources import PROBLEM_FILES, SourceConfig, kind_of
from dparallel.models.offline import cache_if_offline
from dparallel.problems.tables import (
    COMMIT,
    Concatenation,
    HubError,
    HubTable,
    Table,
    TableError,
    check_kinds,
    listed,
    open_table,
)

log = logging.getLogger(__name__)

Part = tuple[Table, range]  # a table and a range of its rows


def open_source(source: SourceConfig) -> list[Part]:
    """Open the rows of a source's `split`, as tables whose rows are numbered within the unsliced split.

    Raises:
        TableError: files are missing, damaged or of several kinds, or the split does not exist.
    """
    path = Path(source.path)
    try:
        is_folder, files = path.is_dir(), source.files()
    except OSError as error:  # a folder above it that may not be entered, a name too long
        raise TableError(f"{source.path} cannot be read ({error.strerror}): check its permissions") from error
    if source.revision is not None and (is_folder or files):
        raise TableError(
            f"revision={source.revision!r} is for data sets on the Hub, and this is local: drop it "
            "(revision=null)"
        )
    if is_folder:
        return sliced(source.split, _of_files(_folder(source)))
    if not files and (kind_of(path) in PROBLEM_FILES or path.is_absolute() or source.path.count("/") > 1):
        raise TableError(f"no such problems file (looked in {Path.cwd()})")
    if not files:
        return sliced(source.split, of_hub(source))
    if source.subset is not None:
        raise TableError(
            f"subset={source.subset!r} is for folders and data sets on the Hub, and this is a file: drop "
            "it (subset=null)"
        )
    check_kinds(files)
    if len(files) > 1:
        _tell(logging.INFO, f"{source.label}: the files are {listed(files)}")
    name = re.split(r"[\[+(]", source.split)[0].strip()  # a list of files forms a split of any name
    return sliced(source.split, _of_files({name: files}))


class _Splits(Mapping[str, int]):
    """Number of rows by split; splits are opened on first access.

    With `names` None, any name is accepted and looked up on the Hub.
    """

    def __init__(self, opened: Callable[[str], Table], names: Sequence[str] | None):
        self.table = cache(opened)
        self.names = names

    def __getitem__(self, split: str) -> int:
        return len(self.table(split))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names or ())

    def __len__(self) -> int:
        return len(self.names or ())

    def __contains__(self, split: object) -> bool:
        return self.names is None or split in self.names


def _of_files(splits: Mapping[str, Sequence[Path]]) -> _Splits:
    return _Splits(lambda split: Concatenation(list(map(open_table, splits[split]))), list(splits))


def sliced(spec: str, splits: _Splits) -> list[Part]:
    """The rows of a slice such as `train[:10]+test[5:]`, with the syntax of the library `datasets`."""
    if re.fullmatch(r"[\w.-]+", spec) and spec in splits:
        return [(splits.table(spec), range(splits[spec]))]
    from datasets import ReadInstruction  # imported here because it takes a second

    try:
        instructions = ReadInstruction.from_spec(spec).to_absolute(splits)
    except TableError:
        raise
    except (ValueError, AssertionError) as error:
        raise TableError(str(error)) from error
    return [(splits.table(part.splitname), range(part.from_, part.to)) for part in instructions]


def _folder(source: SourceConfig) -> dict[str, list[Path]]:
    from dparallel.problems.folders import (
        is_metadata,
        looks_like_rows,
        read_folder,
    )  # imported here because it takes a second

    splits, left_out = read_folder(Path(source.path).absolute(), source.subset)
    parts = "; ".join(f"{split} ({listed(files)})" for split, files in splits.items())
    _tell(logging.INFO, f"{source.label}: the splits of this folder are {parts}")
    if left_out:
        problems = [file for file in left_out if looks_like_rows(file) and not is_metadata(file)]
        level = logging.WARNING if problems else logging.INFO
        _tell(level, f"{source.label}: files in no split, which are not read: {listed(left_out)}")
    return splits


@cache  # log once per process; problems are loaded by checks and by stages
def _tell(level: int, message: str) -> None:
    log.log(level, "%s", message)


def of_hub(source: SourceConfig) -> _Splits:
    """The splits of a data set on the Hugging Face Hub."""
    return _Splits(lambda split: _load(source.path, source.subset, source.revision, split), None)


def hub_revision(source: SourceConfig) -> str | None:
    """Commit of a data set on the Hub that its rows are of; None for local data."""
    if Path(source.path).is_dir() or source.files():
        return None
    split = re.split(r"[\[+(]", source.split)[0].strip()
    return _load(source.path, source.subset, source.revision, split).revision


@cache
def _load(path: str, subset: str | None, revision: str | None, split: str) -> HubTable:
    import datasets  # imported here because it takes a second

    datasets.disable_progress_bars()
    try:
        with cache_if_offline():
            table = HubTable(datasets.load_dataset(path, name=subset, revision=revision, split=split))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it holds 0 problems"
        raise HubError(f"cannot be read: {reason}") from error
    if revision is not None and COMMIT.fullmatch(revision) and table.revision not in (None, revision):
        log.warning("%s: revision %s is asked for, the cache holds %s", path, revision, table.revision)
    return table

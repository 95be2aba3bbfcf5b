"""Assign the files of a folder to splits like the Hugging Face Hub: by dataset card or by file names.

Import this module only when a folder is read: importing the library `datasets` takes a second.
"""

import glob
import os
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns, resolve_pattern, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from yaml import YAMLError

from dparallel.config.paths import leads_out
from dparallel.config.sources import PROBLEM_FILES, kind_of
from dparallel.problems.tables import TableError, check_kinds, listed

Patterns = dict[str, list[str]]


class Folder(NamedTuple):
    """Files by split, and files that belong to no split (without hidden ones)."""

    splits: dict[str, list[Path]]
    left_out: list[Path]


def read_folder(root: Path, subset: str | None) -> Folder:
    """List the files of every split, all of one kind, including sub-folders.

    Without patterns in a dataset card, a file belongs to the split in its name or its folder's name
    (`test.jsonl`, `data/test-00000-of-00001.parquet`, `test/a.jsonl`); if no name contains a split, all files
    belong to `train`.

    Args:
        subset: a subset of the dataset card, or a sub-folder.

    Raises:
        TableError: no readable file, files of several kinds, or an unknown subset.
    """
    _refuse_unreadable(root)
    folder, patterns = _subset(root, subset)
    every = [file for file in sorted(root.rglob("*")) if file.is_file() and not _hidden(file, root)]
    splits = _match(folder, patterns)
    if not splits:
        raise TableError(
            f"no {', '.join(PROBLEM_FILES)} file of a split in this folder; it holds {listed(every)}"
        )
    read = dict.fromkeys(file for files in splits.values() for file in files)
    left_out = [file for file in every if file not in read]
    misplaced = (
        []
        if patterns
        else [file for file in left_out if kind_of(file) in (".jsonl", ".jsonl.gz", ".parquet")]
    )
    check_kinds([*read, *(file for file in misplaced if folder in file.parents)])
    return Folder(splits, left_out)


def _refuse_unreadable(root: Path) -> None:
    """Raise a TableError if a sub-folder cannot be listed, since its files would be skipped silently."""

    def refuse(error: OSError) -> None:
        raise TableError(f"{error.filename} cannot be read ({error.strerror}): check its permissions")

    for _ in os.walk(root, onerror=refuse):
        pass


def looks_like_rows(file: Path) -> bool:
    """Whether a file seems to hold rows of a data set, also of a kind or spelling that is not read."""
    suffixes = {suffix.lower() for suffix in file.suffixes[-2:]}
    return bool(suffixes & {".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".zst"})


def is_metadata(file: Path) -> bool:
    """Whether a file describes a data set instead of containing its rows."""
    return file.name in FILES_TO_IGNORE


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(root).parts)


def _subset(root: Path, subset: str | None) -> tuple[Path, Patterns | None]:
    """Folder of a subset, and the patterns of its splits if the dataset card defines them."""
    configs = _card(root)
    name = subset or configs.get_default_config_name() or (next(iter(configs)) if len(configs) == 1 else None)
    if configs and name not in configs:
        problem = "give a subset" if name is None else f"no subset {name!r}"
        raise TableError(f"{problem}; its README.md names {', '.join(configs)}")
    if name in configs:
        data_files = configs[name].get("data_files")
        patterns = None if data_files is None else sanitize_patterns(data_files)
        folder = configs[name].get("data_dir") or "."
        for path in (folder, *chain(*(patterns or {}).values())):
            if leads_out(str(path)):
                raise TableError(
                    f"its README.md names {str(path)!r}, which leads out of the folder: correct it"
                )
        return root / folder, patterns
    if subset is not None and not (root / subset).is_dir():
        raise TableError(
            f"no subset {subset!r}: it is neither in a README.md nor a sub-folder; the folder holds "
            f"{listed(sorted(root.iterdir()))}"
        )
    return root / (subset or "."), None


def _card(root: Path) -> MetadataConfigs:
    """The subsets declared in a dataset card, by name."""
    card = root / "README.md"
    try:
        data = DatasetCard.load(card).data if card.is_file() else DatasetCardData()
        return MetadataConfigs.from_dataset_card_data(data)
    except (OSError, ValueError, YAMLError) as error:
        raise TableError(f"{card} cannot be read as a dataset card: {error}") from error


def _match(folder: Path, patterns: Patterns | None) -> dict[str, list[Path]]:
    resolve = partial(
        resolve_pattern, base_path=glob.escape(folder.as_posix()), allowed_extensions=list(PROBLEM_FILES)
    )
    try:
        patterns = patterns or _get_data_files_patterns(resolve)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TableError(str(error)) from error
    splits = {str(split): _resolved(paths, resolve) for split, paths in patterns.items()}
    return {split: files for split, files in splits.items() if files}


def _resolved(patterns: Sequence[str], resolve: partial[list[str]]) -> list[Path]:
    files: dict[Path, None] = {}
    for pattern in patterns:
        try:
            files |= dict.fromkeys(map(Path, resolve(pattern)))
        except FileNotFoundError:  # only some of the possible patterns of a split match
            continue
    return [file for file in files if kind_of(file) in PROBLEM_FILES]

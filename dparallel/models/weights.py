"""Weight files of a checkpoint: locate tensors, read them one at a time, and write them file by file."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dparallel.models.formats import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")


class Stored(NamedTuple):
    """A tensor in a file, not yet read: file, name in the file, shape, and dtype (BF16, ...)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_json(file: Path) -> dict[str, Any]:
    """Fields of a JSON file; CheckpointError if it does not contain an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # syntax, encoding, integers with thousands of digits
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(_unreadable(file, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected an object of fields")
    return content


def locate(folder: Path) -> list[Stored]:
    """List all tensors of a checkpoint, reading only the headers of its files.

    Raises:
        CheckpointError: a file is missing, damaged or truncated, or its tensors differ from the index.
    """
    weight_map = _weight_map(folder)
    files = _files(weight_map)
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(_missing(folder, file))
    stored = []
    for file in files:
        with _open(folder / file) as shard:
            held = list(shard.keys())
            names = held if weight_map is None else [name for name in weight_map if weight_map[name] == file]
            if lost := sorted(set(names).difference(held)):
                raise CheckpointError(f"{folder / INDEX} says {lost[0]} is in {file}, which does not hold it")
            if unnamed := sorted(set(held).difference(names)):
                raise CheckpointError(
                    f"{folder / file} holds {unnamed[0]}, which {INDEX} does not place there: "
                    "correct the index, or the file is another checkpoint's"
                )
            for name in names:
                header = shard.get_slice(name)
                stored.append(Stored(folder / file, name, tuple(header.get_shape()), header.get_dtype()))
    return stored


def are_here(folder: Path) -> bool:
    """Whether all weight files are in the folder, judging by their names."""
    return all((folder / file).is_file() for file in _files(_weight_map(folder)))


def read(
    stored: Mapping[str, Stored], device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Read tensors one at a time to `device` and convert them to `dtype` (None: keep their dtypes)."""
    tensors = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        with _open(file, device) as shard:
            for key, tensor in stored.items():
                if tensor.file == file:
                    tensors[key] = shard.get_tensor(tensor.name).to(dtype)
    return tensors


def write_like(source: Path, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write `tensors` to files with the same names and tensor assignment as the files in `source`.

    Tensors of `source` that are not in `tensors` are copied.
    """
    total_size = 0
    for file, group in groupby(locate(source), key=lambda tensor: tensor.file):
        stored = {tensor.name: tensor for tensor in group}
        copied = read({name: tensor for name, tensor in stored.items() if name not in tensors}, "cpu", None)
        given = {name: tensors[name].cpu().contiguous() for name in stored if name in tensors}
        shard = given | copied
        total_size += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / file.name, metadata={"format": "pt"})
    if not (source / INDEX).is_file():
        return
    index = read_json(source / INDEX)
    metadata = index.get("metadata") or {}
    if metadata.get("total_size", total_size) == total_size:
        shutil.copyfile(source / INDEX, folder / INDEX)
    else:
        index["metadata"] = {**metadata, "total_size": total_size}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _unreadable(file: Path, error: OSError) -> str:
    return f"{file} cannot be read ({error.strerror or error}): check its permissions and its disk"


def _files(weight_map: dict[str, str] | None) -> list[str]:
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def _missing(folder: Path, file: str) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if file == SINGLE and pickled:
        return (
            f"{folder} has its weights in {pickled[0]}, which may run code and is not read: make safetensors "
            "of it with AutoModel.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained(FOLDER)"
        )
    return f"{folder / file} is missing: the checkpoint is incomplete, fetch the file again"


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if there is a single weight file."""
    index = folder / INDEX
    if not index.is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, which says what file holds which tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index} says {name} is in {file!r}, expected the name of a file beside it"
            )
    return weight_map


@contextmanager
def _open(file: Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    try:
        file.open("rb").close()  # safe_open reports an unreadable file as missing
        with safe_open(file, framework="pt", device=str(device)) as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from error
    except OSError as error:
        raise CheckpointError(_unreadable(file, error)) from error

"""Paths in settings: in a file they are relative to that file, given elsewhere to the working folder.

Config files that are not found there are looked up among those that come with the package.
"""

import glob
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

PACKAGE = Path(__file__).parents[1]
DEEPSPEED_FILES = ("output_file", "nvme_path")  # settings of files and folders that DeepSpeed writes
# Settings that are a path or hold some: there, `rows.json` is no config file to include.
PATHS = (
    "path",
    "data_files",
    "chat_template",
    "model",
    "adapter",
    "teacher",
    "runs",
    "store",
    "out",
    "hostfile",
    *DEEPSPEED_FILES,
)
STORES = ("file", "gs", "s3")  # protocols of stores, all with writes that fail where an object exists


class Written(str):
    """A text as it stands in a file.

    Attributes:
        folder: absolute path of the folder that relative paths in this file are relative to.
    """

    folder: str

    def __new__(cls, text: str, folder: str) -> "Written":
        written = super().__new__(cls, text)
        written.folder = folder
        return written


def written(value: Any, folder: str | Path) -> Any:
    """JSON values with all texts as `Written` in a file of `folder`."""
    if isinstance(value, dict):
        return {key: written(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [written(part, folder) for part in value]
    if isinstance(value, str) and not isinstance(value, Written):
        return Written(value, os.path.abspath(folder))
    return value


def shipped_configs() -> Path:
    """The folder of the configs that come with the package: in it, or beside it in a clone."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def shipped_files() -> list[str]:
    """Paths of the configs that come with the package, as they are found from any folder."""
    configs = shipped_configs()
    files = [file for suffix in ("yaml", "json") for file in configs.rglob(f"*.{suffix}")]
    return sorted(file.relative_to(configs).as_posix() for file in files)


def shipped(path: str | Path) -> Path:
    """Where a config, or the teacher `teachers/NAME`, lies if it comes with the package."""
    folder = shipped_configs()
    return Path(os.path.normpath((folder.parent if str(path).startswith("teachers/") else folder) / path))


def find_config(path: Path, folder: Path | None = None) -> Path:
    """A config file; if it does not exist, the one of this name that comes with the package.

    Args:
        folder: `path` is relative to it; by default to the working folder.
    """
    here = path if folder is None else folder / path
    known = shipped_configs() / path
    return known if not os.path.lexists(here) and os.path.isfile(known) else here


def looks_local(path: str) -> bool:
    """Whether a model or data set is a local path by its form, and no id on the Hugging Face Hub."""
    return (
        path.startswith(("/", ".", "~"))
        or path.endswith("/")
        or path.count("/") > 1
        or "\\" in path
        or glob.has_magic(path)
    )


def store_protocol(url: str) -> str:
    """Protocol of a store's URL; of a plain path `file`."""
    return url.partition("://")[0] if is_url(url) else "file"


def is_url(path: str) -> bool:
    """Whether a path is a URL, such as `s3://bucket/folder`."""
    return "://" in path


def leads_out(path: str) -> bool:
    """Whether a path leads out of the folder that it is relative to, by its form."""
    return os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")


def _below(path: str) -> str:
    if leads_out(path):
        raise ValueError(f"{path!r} leads out of its folder: give a name below it, without '..'")
    return path


def check_url(url: str) -> str:
    """The URL of something in a store; ValueError if its kind is unknown or it holds credentials."""
    protocol, _, place = url.partition("://")
    if "@" in place.partition("/")[0]:
        raise ValueError(
            f"the {protocol}:// URL holds a name or password before @: take it out, and give credentials in "
            "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if protocol not in STORES:
        kinds = ", ".join(f"{kind}://" for kind in STORES)
        raise ValueError(f"{url!r}: no store is known for {protocol}://; valid: a folder, {kinds}")
    if not place.strip("/") or "?" in place:
        raise ValueError(f"{url!r} must name a bucket or folder; options are set in the environment")
    return url.rstrip("/")


def _no_url(path: Any) -> Any:
    if isinstance(path, str) and is_url(path):
        raise ValueError(f"{path.rpartition('@')[2]!r} is a URL: give a path on this machine")
    return path


def _no_url_of_runs(path: Any) -> Any:
    if isinstance(path, str) and is_url(path):
        url = path.rpartition("@")[2]
        raise ValueError(
            f"{url!r} is a URL, and runs is the folder of this machine in which stages compute: to keep "
            f"results there, set store: {url}, and leave runs out"
        )
    return path


def _store(url: Any) -> Any:
    return check_url(str(url)) if isinstance(url, str) and is_url(url) else _located(url)


def _expanded(path: str) -> str:
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise ValueError(
            f"no home folder is known for {path.split('/')[0]!r}: write the path in full, or ./{path}"
        )
    return full


def _located(path: Any) -> Any:
    """The path in full, if a file holds it."""
    if not isinstance(path, str) or not path:
        return path
    if is_url(path):
        return check_url(str(path))
    expanded = _expanded(path)
    if not isinstance(path, Written) or os.path.isabs(expanded):
        return expanded
    return os.path.normpath(os.path.join(path.folder, expanded))


def _located_or_hub_id(path: Any) -> Any:
    """As `_located`, unless there is nothing and `path` can be an id on the Hub."""
    full = _located(path)
    if not isinstance(path, Written) or is_url(full) or full == str(path) or _exists(full):
        return full
    known = str(shipped(path))
    if _exists(known):
        return known
    if _exists(path):
        here = os.path.relpath(path, path.folder)
        raise ValueError(
            f"{str(path)!r} is relative to {path.folder}, which has none; the working folder has one: "
            f"write {here if here.startswith('.') else './' + here}"
        )
    return full if looks_local(path) else str(path)


def _exists(path: str) -> bool:
    return os.path.lexists(path) or (glob.has_magic(path) and bool(glob.glob(path)))


# A file or folder of this machine. `~` is expanded here only.
LocalPath = Annotated[str, Field(min_length=1), BeforeValidator(_located), BeforeValidator(_no_url)]
# A file or folder below another one.
BelowFolder = Annotated[str, AfterValidator(_below)]
# A file or folder that is read, of this machine or of a store.
InputPath = Annotated[str, Field(min_length=1), BeforeValidator(_located)]
# A file or folder, or an id on the Hugging Face Hub.
PathOrHubId = Annotated[str, Field(min_length=1), BeforeValidator(_located_or_hub_id)]
# The local folder in which stages compute.
RunsFolder = Annotated[str, Field(min_length=1), BeforeValidator(_located), BeforeValidator(_no_url_of_runs)]
# A folder, or the URL of one in a bucket.
StoreUrl = Annotated[str, Field(min_length=1), BeforeValidator(_store)]

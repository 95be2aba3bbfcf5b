"""The settings file `.env`, of which `deploy/settings.env` is the template."""

import contextlib
import difflib
import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

FILE = ".env"
TEMPLATE = Path(__file__).parents[1] / "settings.env"
PREFIX = "DPARALLEL_"
# Variables of the library.
OTHERS = ("DPARALLEL_SANDBOX", "DPARALLEL_STORE", "DPARALLEL_RUNS", "DPARALLEL_CACHE", "DPARALLEL_FOLDER")
DEFAULT_STORE = "sqlite:///mlflow.db"  # of local runs: a file in the project's folder
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and where processes of this machine reach it
STORES = ("file", "gs", "s3")  # protocols of the library's stores
GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")

Port = Annotated[int, Field(ge=1, le=65535)]


class SettingsError(ValueError):
    """A mistake that the user can correct; the message names the value, the limit and the remedy."""


class Settings(BaseModel):
    """What `make up` starts; the variable of a field is its name in capitals after `DPARALLEL_`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    prefect_port: Port = 4200
    mlflow_port: Port = 5000
    data: Path = Path(".dparallel")
    prefect_database: str = ""
    mlflow_store: str = DEFAULT_STORE
    mlflow_artifacts: str = ""
    cpu_workers: Annotated[int, Field(ge=0, le=64)] = 1
    cpu_runs: Annotated[int, Field(ge=1, le=64)] = 2
    gpu_workers: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    roots: str = ""
    notify_url: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, host: str) -> str:
        try:
            socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)
        except OSError:
            raise ValueError(
                f"{host!r} is no address of this machine; 127.0.0.1 serves this machine only"
            ) from None
        return host

    @field_validator("prefect_database")
    @classmethod
    def _is_asynchronous(cls, url: str) -> str:
        if url and not url.startswith(("postgresql+asyncpg://", "sqlite+aiosqlite:///")):
            raise ValueError(
                f"{_scheme(url)} is no database of Prefect; write "
                "postgresql+asyncpg://USER:PASSWORD@HOST/NAME, or nothing for SQLite in the data folder"
            )
        return url

    @field_validator("mlflow_store")
    @classmethod
    def _is_a_database(cls, url: str) -> str:
        if not url.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg2://", "mysql+pymysql://")):
            raise ValueError(
                f"{_scheme(url)} is no database of MLflow; write postgresql://USER:PASSWORD@HOST/NAME, "
                f"or {DEFAULT_STORE}, the store of local runs"
            )
        if url.startswith(("postgresql://", "postgresql+psycopg2://")) and find_spec("psycopg2") is None:
            raise ValueError("PostgreSQL needs psycopg2: pip install -c constraints.txt -e '.[postgres]'")
        return url

    @model_validator(mode="after")
    def _ports_differ(self) -> "Settings":
        if self.prefect_port == self.mlflow_port:
            raise ValueError(
                f"DPARALLEL_PREFECT_PORT and DPARALLEL_MLFLOW_PORT are both {self.mlflow_port}; "
                "give each server a port of its own"
            )
        return self

    @property
    def reached_at(self) -> str:
        """The address in URLs under which processes of this machine reach the servers."""
        host = EVERYWHERE.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def prefect_url(self) -> str:
        return f"http://{self.reached_at}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{self.reached_at}:{self.mlflow_port}"

    @property
    def shares_the_local_store(self) -> bool:
        """Whether clients write into the same file as without servers, so that `down` changes nothing."""
        return self.mlflow_store == DEFAULT_STORE and not self.mlflow_artifacts


def load(root: Path, environment: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """The settings of a folder; variables of the environment override the file.

    Returns:
        The settings, and the file's other variables, which all servers and workers get.

    Raises:
        SettingsError: the file cannot be read, or has an unknown setting, or a setting an impossible value.
    """
    file = _variables(root / FILE)
    ours = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
    for name in file:
        if name.startswith(PREFIX) and name not in ours and name not in OTHERS:
            near = difflib.get_close_matches(name, ours, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise SettingsError(f"{FILE}: {name} is no setting; {hint}known: {', '.join(ours)}")
    given = {**file, **{name: environment[name] for name in ours if name in environment}}
    # An empty value stands for the default, as in the template.
    values = {field: given[name].strip() for name, field in ours.items() if given.get(name, "").strip()}
    try:
        settings = Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        mistakes = dict.fromkeys(
            _explain(mistake) for mistake in error.errors()
        )  # one for each type in a union
        raise SettingsError("; ".join(mistakes)) from None
    return settings, {name: value for name, value in file.items() if name not in ours}


def _variables(path: Path) -> dict[str, str]:
    """The variables of the settings file; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{FILE} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SettingsError(f"{FILE}, line {line}: not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise SettingsError(f"{FILE}, line {line}: holds a null character; take it out")
    for binding in parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            written = binding.original.string
            line = binding.original.line + written[: len(written) - len(written.lstrip())].count("\n")
            # The line is not shown, as it may hold a password.
            raise SettingsError(f"{FILE}, line {line}: is not of the form NAME=VALUE; comments begin with #")
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text)).items()}


def check_machine(settings: Settings, others: Mapping[str, str], root: Path) -> None:
    """Check the settings that depend on this machine, or on what workers will use.

    Args:
        others: the other variables of the workers.

    Raises:
        SettingsError: names the setting, its value and the remedy.
    """
    if not _is_of_this_machine(settings.host):
        raise SettingsError(
            f"DPARALLEL_HOST: {settings.host} is no address of this machine; 127.0.0.1 serves this machine "
            f"only, 0.0.0.0 all addresses; change it in {FILE}"
        )
    folders = [("DPARALLEL_ROOTS", part.strip()) for part in settings.roots.split(",")]
    places = [*folders, ("DPARALLEL_STORE", others.get("DPARALLEL_STORE", ""))]
    for name, place in places:
        protocol = place.partition("://")[0] if "://" in place else None
        if protocol is not None and protocol not in STORES:
            kinds = ", ".join(f"{kind}://" for kind in STORES)
            raise SettingsError(
                f"{name}: no store is known for {protocol}://; valid: a folder, {kinds}; change it in {FILE}"
            )
    for name, place in folders:
        if place and "://" not in place and not os.path.isdir(root / os.path.expanduser(place)):
            raise SettingsError(f"{name}: {place} is no folder; create it, or change it in {FILE}")
    if "://" in (runs := others.get("DPARALLEL_RUNS", "")):
        raise SettingsError(
            f"DPARALLEL_RUNS: {_scheme(runs)} is no folder of this machine; change it in {FILE}"
        )


def _is_of_this_machine(host: str) -> bool:
    """Whether a server can listen at an address."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def _explain(mistake: Any) -> str:
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if not mistake["loc"]:
        return message
    name = f"{PREFIX}{str(mistake['loc'][0]).upper()}"
    got = "" if mistake["type"] == "value_error" else f", got {mistake['input']!r}"
    if name == "DPARALLEL_NOTIFY_URL":
        message, got = "write an address that begins with http:// or https://", ""  # it may hold a secret
    if name == "DPARALLEL_GPU_WORKERS":
        message = "write `auto` or a number from 0 to 64"
    return f"{name}: {message}{got}; change it in {FILE}"


def _scheme(url: str) -> str:
    """The beginning of a URL, without its password."""
    return repr(url.partition("://")[0] + "://…") if "://" in url else repr(url)


def devices_of_workers(settings: Settings, environment: Mapping[str, str]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each gpu worker; None where there are no GPUs.

    The machine's GPUs are divided evenly; `auto` is one worker for each GPU.

    Raises:
        SettingsError: there are more workers than GPUs.
    """
    gpus = _gpus(environment)
    if settings.gpu_workers == "auto":
        return list(gpus) or [None]
    count = settings.gpu_workers
    if not gpus:
        return [None] * count
    if count > len(gpus):
        raise SettingsError(
            f"DPARALLEL_GPU_WORKERS: {count} workers, but {len(gpus)} GPUs; set at most {len(gpus)} in {FILE}"
        )
    bounds = [index * len(gpus) // count for index in range(count + 1)] if count else []
    return [",".join(gpus[start:stop]) for start, stop in pairwise(bounds)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Numbers of the GPUs that torch can use, as CUDA_VISIBLE_DEVICES names them."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return []
    code = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    count = int(asked.stdout) if asked.returncode == 0 else 0
    visible = [part for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return (visible or [str(index) for index in range(count)])[:count]


def make_file(root: Path) -> bool:
    """Create the settings file from the template if it is missing; whether it was.

    Other users may not read it, as passwords are written there; one that was copied by hand is changed.
    """
    path = root / FILE
    missing = not path.exists()
    if missing:
        try:
            shutil.copyfile(TEMPLATE, path)
        except OSError as error:
            raise SettingsError(
                f"{path} cannot be created ({error.strerror}): make the folder writable, free some of "
                "its disk, or remove a link of this name that leads nowhere"
            ) from None
    with contextlib.suppress(OSError):  # the file of another user, or a file system that cannot be written
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    return missing

"""Where a stage's result comes from: settings, overrides, code, commit, flow run, versions and hardware."""

import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dparallel.config.base import Config, UserError
from dparallel.stages.code import PACKAGE, stage_digest
from dparallel.stages.hardware import hardware

LIBRARIES = ("dparallel", "torch", "transformers", "peft", "deepspeed", "pyarrow")


class CodeChangedError(UserError):
    """The code is another one than when the run started."""


class Origin(BaseModel):
    """The run that a stage belongs to.

    Attributes:
        config: the config file that the user named.
        overrides: the overrides that the user gave.
        flow_run: name and id of the flow run.
        vouched: digest of code whose result is accepted in place of the running code's; the user vouches
            that it is the same (`DistillConfig.code`).
        code: digest of the code when the run started; None if it does not matter.
    """

    model_config = ConfigDict(frozen=True)

    config: str | None = None
    overrides: tuple[str, ...] = ()
    flow_run: str | None = None
    vouched: str | None = None
    code: str | None = None

    def accepted_code(self, stage: str, config: Config) -> str | None:
        """Digest of the code of a result; None for stages whose folder the user names.

        Raises:
            CodeChangedError: this process runs other code than the run was started with.
        """
        if self.vouched is not None:
            return self.vouched
        running = stage_digest(stage, config)
        if self.code not in (None, running):
            raise CodeChangedError(
                f"stage {stage!r} is to be made by the code with which its run started ({self.code}), and "
                f"the code here ({running}) is another: run on the same version of dparallel, or start the "
                "run again"
            )
        return running

    def recorded(self) -> dict[str, Any]:
        """What a manifest records, as JSON values."""
        run = self.model_dump(mode="json", include={"config", "overrides", "flow_run"})
        return {**run, **commit(), "hardware": hardware(), "host": socket.gethostname()}


@cache
def commit() -> dict[str, Any]:
    """Commit of the running code, and whether files differ from it; both None outside of a git repository."""
    unknown = {"commit": None, "uncommitted_changes": None}
    repository = PACKAGE.parent
    if not (repository / ".git").exists():  # such as a package in a virtual environment inside another one
        return unknown
    folders = [name for name in ("dparallel", "flows", "tasks") if (repository / name).is_dir()]
    head = _git(repository, "rev-parse", "HEAD")
    changes = _git(repository, "status", "--porcelain", "--untracked-files=no", "--", *folders)
    if head is None or changes is None:
        return unknown
    return {"commit": head, "uncommitted_changes": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that determine results."""
    found = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # such as a source folder on the path
            continue
    return found

"""Command line of `make up`, `make down` and `make status`, given in the project's folder."""

import argparse
import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from deploy.local import settings as file
from deploy.local.down import down
from deploy.local.processes import ServiceError
from deploy.local.services import RUNS, data_folder
from deploy.local.settings import FILE, Settings, SettingsError
from deploy.local.status import status
from deploy.local.up import up


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status"])
    command = parser.parse_args().command
    root = Path.cwd()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if not (root / "prefect.yaml").is_file():
            raise SettingsError(f"{root} has no prefect.yaml: run this in the project's folder")
        if command == "up" and file.make_file(root):
            say(f"settings: {FILE} was created; its comments explain each of them")
        settings, others = file.load(root, os.environ)
        if command == "status":
            return 0 if status(settings, others, root, say) else 1
        with _alone(data_folder(settings, root)):
            if command == "down":
                down(settings, root, say)
            else:
                up(settings, others, root, say)
                _say_what_is_next(settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        print(
            f"error: {error.filename or 'a file'}: {error.strerror}: check its permissions and its disk; "
            "what this command had started is stopped again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; what this command had started is stopped again", file=sys.stderr)
        return 130
    return 0


def _say_what_is_next(settings: Settings) -> None:
    say(f"\nPrefect  {settings.prefect_url}\nMLflow   {settings.mlflow_url}{RUNS}")
    say("next     prefect deployment run distill/full --watch")
    say("         make status shows what runs, make down stops it")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one command at a time start and stop services of a data folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
    except OSError as error:
        raise SettingsError(
            f"DPARALLEL_DATA: {folder} cannot be written ({error.strerror}); change it in {FILE}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make up or make down is at work; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

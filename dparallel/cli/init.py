"""`dparallel init`: an editable copy of a config that comes with the package."""

import os
import re
from pathlib import Path

from dparallel.config.base import ConfigError, nearest
from dparallel.config.paths import shipped_configs
from dparallel.stages.files import write_atomically

BY_MAKE = re.compile(r"make \w+ +\(or: (.*)\)")  # a command of the clone, and the one that it stands for
TEACHER_FOLDER = re.compile(r"^out: \.\./teachers/.*$", re.MULTILINE)
EXPERIMENT_NAME = re.compile(r"^name: .*$", re.MULTILINE)


def init(file: Path, source: str) -> None:
    """Copy a config, with its comments, to a new file, and print the file and what can be done with it.

    An experiment is named after the file.

    Args:
        source: name of a config, such as `tiny` or `recipes/d2f`.

    Raises:
        ConfigError: there is no such config, or the file exists or is not named like a config.
    """
    known = known_configs()
    if source not in known:
        raise ConfigError(f"--from {source}: unknown; {nearest(source, known)}known: {', '.join(known)}")
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: name a config with the suffix .yaml")
    if os.path.lexists(file):
        raise ConfigError(f"{file} exists already: delete it, or choose another name")
    text = (shipped_configs() / f"{source}.yaml").read_text(encoding="utf-8")
    text = EXPERIMENT_NAME.sub(f"name: {file.stem}", text, count=1)
    text = BY_MAKE.sub(r"\1", text).replace(f"configs/{source}.yaml", str(file))
    text = TEACHER_FOLDER.sub(f"out: runs/{file.stem}", text, count=1)
    text = text.replace("teacher: ../teachers/", "teacher: teachers/")
    write_atomically(file, f"{HEADER.format(source=source)}{text}")
    print(file)
    if EXPERIMENT_NAME.search(text):
        print(f"  dparallel plan {file}")
        print(f"  python -m flows.distill --config {file}")
    elif "train_steps:" in text:
        print(f"  python -m flows.teacher --config {file}")


HEADER = """\
# Written by `dparallel init --from {source}`; times and numbers below are those of the original.
# Paths are relative to this file. A config or teacher that is not there, such as recipes/d2f.yaml or
# teachers/tiny, is looked up among the ones that come with dparallel.
"""


def known_configs() -> list[str]:
    """Names of the configs that come with the package: experiments first."""
    folder = shipped_configs()
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.parent != folder, file.as_posix()))
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]

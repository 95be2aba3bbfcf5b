"""How a training process reports a user's error to the process that launched it: a marked line, exit code 2.

Launchers replace exit codes and add reports of their own, so the line is recognized by its start.
"""

import re
import sys

from dparallel.config.base import UserError

PROGRAM = "dparallel.distillation"
EXIT_CODE = 2
# Launchers on several machines print the machine's name before each line.
REPORTED = re.compile(rf"(?:^|: ){re.escape(PROGRAM)}: error: (?P<message>.*)")


def report(error: UserError) -> int:
    """Print the error as one line; returns the exit code."""
    # A single write, since all processes of a launch may print at the same time.
    sys.stderr.write(f"{PROGRAM}: error: {' '.join(str(error).split())}\n")
    sys.stderr.flush()
    return EXIT_CODE


def reported(line: str) -> str | None:
    """Message of an error that a training process printed with `report`; None for other lines."""
    found = REPORTED.search(line)
    return found["message"] if found else None

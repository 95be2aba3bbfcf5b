"""Which sandboxes this machine has."""

import pytest

from dparallel.problems.sandbox.jobs import MODES, Mode, SandboxError
from dparallel.problems.sandbox.run import check_sandbox


def missing(mode: Mode) -> str:
    """Why a mode does not work here; "" if it does."""
    try:
        check_sandbox(mode)
    except SandboxError as error:
        return str(error)
    return ""


BUBBLEWRAP = pytest.mark.skipif(bool(missing("bubblewrap")), reason=missing("bubblewrap"))
EITHER = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, marks=pytest.mark.skipif(bool(missing(mode)), reason=missing(mode)))
        for mode in MODES
    ],
)

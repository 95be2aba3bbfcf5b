"""Files and folders that this user may not read or write: errors in one line, with the remedy."""

import errno
import os
from pathlib import Path

from dparallel.config.base import UserError

NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


def not_permitted(error: OSError) -> str | None:
    """What is said of a file or folder that may not be used; None if the error has another reason."""
    named = error.filename
    if error.errno not in NOT_PERMITTED or not isinstance(named, str | bytes | os.PathLike):
        return None
    return (
        f"{os.fsdecode(named)} cannot be used ({error.strerror}): check its permissions and those of the "
        "folders above it, or name another"
    )


def check_reachable(path: str | Path) -> None:
    """Raise a UserError if a folder above `path` hides whether there is something; all else is accepted."""
    try:
        os.stat(path)
    except OSError as error:
        if message := not_permitted(error):
            raise UserError(message) from error
    except ValueError:  # no file can have this name
        return

"""Which log messages a flow shows, and where."""

import logging
import re
import time

from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler

from dparallel.config.base import UserError

SECONDS = 20.0  # between two lines of progress on the terminal
PROGRESS = re.compile(r" left$")  # how a line ends that only says how far a stage is
DETAILS = "dparallel.evaluation"  # logs a line for each measurement, all of which are in the table


def show_progress() -> None:
    """Send the library's log messages to the flow run's log and to the terminal."""
    log = logging.getLogger("dparallel")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in log.handlers):
        log.addHandler(APILogHandler())


def thin_out_terminal() -> None:
    """Print less on the terminal; the flow run's log has all messages.

    Progress is printed every `SECONDS`, and tracebacks of users' errors are not: the flow ends with their
    message.
    """
    filters = (ThinOut(), is_not_a_users_error)
    names = ["", *logging.root.manager.loggerDict]
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    for handler in handlers:
        if isinstance(handler, PrefectConsoleHandler):
            for thin in filters:
                handler.addFilter(thin)


def is_not_a_users_error(record: logging.LogRecord) -> bool:
    """Whether a message comes without the traceback of a user's error."""
    return record.exc_info is None or not isinstance(record.exc_info[1], UserError)


class ThinOut(logging.Filter):
    """Drops a message of progress that follows another one within `SECONDS`."""

    def __init__(self, seconds: float = SECONDS):
        super().__init__()
        self.seconds = seconds
        self._printed_at = -seconds

    def filter(self, record: logging.LogRecord) -> bool:
        is_progress = PROGRESS.search(record.getMessage()) or record.name.startswith(DETAILS)
        if record.levelno > logging.INFO or not is_progress:
            return True
        now = time.monotonic()
        if now - self._printed_at < self.seconds:
            return False
        self._printed_at = now
        return True

"""Show the library's log messages while a flow runs."""

import logging

from prefect.logging.handlers import APILogHandler


def show_progress() -> None:
    """Send the library's log messages to the flow run's log and to the terminal."""
    log = logging.getLogger("dparallel")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in log.handlers):
        log.addHandler(APILogHandler())

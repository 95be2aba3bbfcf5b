"""Arguments of commands: mistakes are one line, and unknown options name the nearest one."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, with the help page of the command in question."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else ";"
        self.exit(2, f"{self.prog}: error: {message}{end} see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; what a command does not know is an error of this command, not of the program."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return options, unknown

    def _unknown(self, unknown: Sequence[str]) -> str:
        option = next((text.partition("=")[0] for text in unknown if text.startswith("-")), None)
        if option is None:
            return f"unrecognized arguments: {' '.join(unknown)}"
        near = difflib.get_close_matches(option, list(self._option_string_actions), n=1)
        return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else "")

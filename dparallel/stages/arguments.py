"""Arguments of commands: mistakes are one line, and what is unknown comes with the nearest known name."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from dparallel.config.base import nearest


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, with the help page of the command in question.

    Attributes:
        foreign: options that other programs have, with what to do instead.
    """

    foreign: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else ";"
        self.exit(2, f"{self.prog}: error: {message}{end} see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; what a command does not know is an error of this command, not of the program.

        Unknown options are found first: a mistyped `--model` is not also a missing one.
        """
        given = sys.argv[1:] if args is None else args
        for option in self._mistyped(given):
            self._refuse_option(option)
        options, unknown = super().parse_known_args(given, namespace)
        if unknown:
            for text in unknown:
                if text.startswith("-"):
                    self._refuse_option(text.partition("=")[0])
            self.error(
                f"unrecognized arguments: {' '.join(unknown)} (quote a text with spaces; a pattern such as "
                "runs/* must match one name)"
            )
        return options, unknown

    def _mistyped(self, given: Sequence[str]) -> Iterator[str]:
        """Options that are unknown, of this parser and not of its commands."""
        own: Iterable[str] = takewhile(lambda text: text not in ("--", "-h", "--help"), given)
        if self._subparsers is not None:
            own = takewhile(lambda text: text.startswith("-"), own)
        for text in own:
            option = text.partition("=")[0]
            if option.startswith("--") and " " not in text and option not in self._option_string_actions:
                yield option

    def _refuse_option(self, option: str) -> NoReturn:
        if option in self.foreign:
            self.error(f"unknown option {option}: {self.foreign[option]}")
        near = nearest(option, list(self._option_string_actions)).replace("'", "").strip()
        self.error(f"unknown option {option}" + (f"; {near}" if near else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise an error for a value that is none of the choices, which are few."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = nearest(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"unknown command {value!r}; {near}known: {', '.join(known)}")
        raise argparse.ArgumentError(action, f"unknown value {value!r}; {near}known: {', '.join(known)}")

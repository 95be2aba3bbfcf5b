"""The command line once more, with settings that remove its error."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from dparallel.decoding.generate import LengthError


def corrected(arguments: Sequence[str], error: BaseException) -> str | None:
    """The command with lengths that fit the model, to be pasted; None if the error is another one.

    Args:
        arguments: of `dparallel`.
    """
    about = next((cause for cause in _causes(error) if isinstance(cause, LengthError)), None)
    if about is None or not about.fitting:
        return None
    command = shlex.join(["dparallel", *_with(arguments, about.fitting)])
    return command if command == " ".join(command.split()) else None  # errors are one line


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _with(arguments: Sequence[str], settings: Mapping[str, int]) -> list[str]:
    """The arguments with these settings instead of the given ones."""
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in settings.items()}
    kept, rest = list[str](), iter(arguments)
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if flag not in flags:
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return [*kept, *(text for flag in flags.items() for text in flag)]

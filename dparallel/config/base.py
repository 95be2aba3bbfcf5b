"""What all settings have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class UserError(ValueError):
    """What a user got wrong and can put right; the message names the value, the limit and the remedy.

    Commands print it as one line. Any other exception is a bug, and keeps its traceback.
    """


class ConfigError(UserError):
    """A configuration that cannot be run; the message says which key, why and what to write."""


class How:
    """Marks a setting that changes how fast, where or in what portions work is done, not its result."""


HOW = How()  # as in `batch_size: Annotated[PositiveInt, HOW] = 64`


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def what(self) -> dict[str, Any]:
        """The settings that determine the result, as JSON values: all but those marked `HOW`."""
        return _split(self, self.model_dump(mode="json"))[0]

    def how(self) -> dict[str, Any]:
        """The settings marked `HOW`, as JSON values; sections without any are left out."""
        return _split(self, self.model_dump(mode="json"))[1]


def _split(value: Any, dumped: Any) -> tuple[Any, Any]:
    """What and how of a setting, in Configs at any depth; an empty dict where there is no how."""
    if isinstance(value, Config):
        marked = {name for name, field in type(value).model_fields.items() if HOW in field.metadata}
        parts = [(name, getattr(value, name), part) for name, part in dumped.items()]
    elif isinstance(value, dict):
        marked = set()
        parts = [
            (name, inner, part) for inner, (name, part) in zip(value.values(), dumped.items(), strict=True)
        ]
    elif isinstance(value, tuple | list):
        both = [_split(inner, part) for inner, part in zip(value, dumped, strict=True)]
        how = {str(index): how for index, (_, how) in enumerate(both) if how}
        return [what for what, _ in both], how
    else:
        return dumped, {}
    what_parts, how_parts = {}, {}
    for name, inner, part in parts:
        what, how = ({}, part) if name in marked else _split(inner, part)
        if name not in marked:
            what_parts[name] = what
        if name in marked or how:
            how_parts[name] = how
    return what_parts, how_parts


def plain_message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ")

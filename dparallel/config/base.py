"""What all settings have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class UserError(ValueError):
    """What a user got wrong and can put right; the message names the value, the limit and the remedy.

    Commands print it as one line. Any other exception is a bug, and keeps its traceback.
    """


class ConfigError(UserError):
    """A configuration that cannot be run; the message says which key, why and what to write."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def plain_message(error: Any) -> str:
    return error["msg"].removeprefix("Value error, ")

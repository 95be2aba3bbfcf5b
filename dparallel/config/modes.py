"""What each decoding mode asks of the settings."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NONE: Mapping[str, Any] = MappingProxyType({})
GEN_LENGTH = "gen_length"  # as a value in `Mode.fixed`: that setting's value


class Mode(NamedTuple):
    """The settings that a decoding mode takes.

    Attributes:
        caches: the valid ones, the default first.
        scheduled: also takes rules that commit on a schedule.
        fixed: settings that have one valid value.
        defaults: the mode's own settings and their defaults; None where it works without.
        cached: more of them, with any cache but `none`.
    """

    caches: tuple[str, ...]
    scheduled: bool = False
    fixed: Mapping[str, Any] = NONE
    defaults: Mapping[str, float | None] = NONE
    cached: Mapping[str, int] = NONE


MODES: dict[str, Mode] = {
    "sequential": Mode(caches=("none", "prefix", "dual"), scheduled=True),
    "multi_block": Mode(
        caches=("none", "prefix", "dual"),
        defaults={"block_add_threshold": 0.1, "decoded_token_threshold": None},
        cached={"settle_rounds": 1, "refresh_every": 8},
    ),
    "pipelined": Mode(
        caches=("exact", "none"), defaults={"block_add_threshold": 0.1, "decoded_token_threshold": 0.95}
    ),
    "autoregressive": Mode(
        caches=("exact", "none"),
        scheduled=True,
        fixed={"rule": "steps", "block_length": 1, "steps": GEN_LENGTH, "stop_at_eos": True},
    ),
}

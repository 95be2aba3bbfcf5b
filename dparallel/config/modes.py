"""Settings of each decoding mode."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NONE: Mapping[str, Any] = MappingProxyType({})
GEN_LENGTH = "gen_length"  # in `Mode.fixed`: the value of the setting gen_length


class Mode(NamedTuple):
    """Settings that a decoding mode accepts.

    Attributes:
        caches: valid caches, the default first.
        patterns: attention patterns of training with which a model is decoded in this mode; None stands for
            checkpoints that do not state theirs, such as published block-causal ones.
        scheduled: whether rules with a schedule of `steps` are accepted.
        fixed: settings for which only one value is valid.
        defaults: settings of this mode with their defaults; None if the setting is optional.
        cached: further settings that apply with any cache except `none`.
    """

    caches: tuple[str, ...]
    patterns: tuple[str | None, ...]
    scheduled: bool = False
    fixed: Mapping[str, Any] = NONE
    defaults: Mapping[str, float | None] = NONE
    cached: Mapping[str, int] = NONE


MODES: dict[str, Mode] = {
    "sequential": Mode(caches=("none", "prefix", "dual"), patterns=("full", None), scheduled=True),
    "multi_block": Mode(
        caches=("none", "prefix", "dual"),
        patterns=("full", None),
        defaults={"block_add_threshold": 0.1, "decoded_token_threshold": None},
        cached={"settle_rounds": 1, "refresh_every": 8},
    ),
    "pipelined": Mode(
        caches=("exact", "none"),
        patterns=("block_causal", None),
        defaults={"block_add_threshold": 0.1, "decoded_token_threshold": 0.95},
    ),
    "autoregressive": Mode(
        caches=("exact", "none"),
        patterns=("causal",),
        scheduled=True,
        fixed={"rule": "steps", "block_length": 1, "steps": GEN_LENGTH, "stop_at_eos": True},
    ),
}

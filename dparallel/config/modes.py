"""Settings of each decoding mode."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NONE: Mapping[str, Any] = MappingProxyType({})
GEN_LENGTH = "gen_length"  # in `Mode.fixed`: the value of the setting gen_length


class Setting(NamedTuple):
    """A number that some modes take, a setting of decoding.

    Attributes:
        meaning: in a few words, with the modes; for the help of the command line.
        limits: as pydantic's `Field` takes them.
        whole: takes whole numbers only.
    """

    meaning: str
    limits: Mapping[str, float]
    whole: bool = False


SETTINGS: dict[str, Setting] = {
    "block_add_threshold": Setting(
        "share of a block from which the next is active, in multi_block and pipelined", {"gt": 0, "le": 1}
    ),
    "decoded_token_threshold": Setting(
        "share of a block from which the next commits a token, in pipelined", {"gt": 0, "le": 1}
    ),
    "final_threshold": Setting(
        "probability from which tokens are not predicted again, in revising", {"ge": 0, "le": 1}
    ),
    "revision_passes": Setting(
        "further passes over a block without masks at most, in revising", {"ge": 0}, whole=True
    ),
    "settle_rounds": Setting(
        "passes for which a complete block is recomputed, in multi_block with a cache", {"gt": 0}, whole=True
    ),
    "refresh_every": Setting(
        "passes between two computations of everything, in multi_block with a cache", {"gt": 0}, whole=True
    ),
}


class Mode(NamedTuple):
    """Settings that a decoding mode accepts.

    Attributes:
        caches: valid caches, the default first.
        patterns: attention patterns of training with which a model is decoded in this mode; None stands for
            checkpoints that do not state theirs, such as published block-causal ones.
        scheduled: whether rules with a schedule of `steps` are accepted.
        fixed: settings for which only one value is valid.
        usual: defaults that differ from those of other modes.
        defaults: settings that not all modes take, with their defaults; None if the setting is optional.
        cached: further ones that apply with any cache except `none`.
    """

    caches: tuple[str, ...]
    patterns: tuple[str | None, ...]
    scheduled: bool = False
    fixed: Mapping[str, Any] = NONE
    usual: Mapping[str, Any] = NONE
    defaults: Mapping[str, float | None] = NONE
    cached: Mapping[str, int] = NONE


MODES: dict[str, Mode] = {
    "sequential": Mode(
        caches=("none", "prefix", "dual"),
        patterns=("full", None),
        scheduled=True,
        defaults={"eos_fill": None},
    ),
    "multi_block": Mode(
        caches=("none", "prefix", "dual"),
        patterns=("full", None),
        defaults={"block_add_threshold": 0.1, "decoded_token_threshold": None, "eos_fill": None},
        cached={"settle_rounds": 1, "refresh_every": 8},
    ),
    "revising": Mode(
        caches=("none", "prefix", "dual"),
        patterns=("full", None),
        usual={"rule": "contiguous"},
        defaults={"final_threshold": 0.9, "revision_passes": 8},
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


def modes_of(pattern: str | None) -> list[str]:
    """The modes in which a model is decoded, by the attention pattern that it was trained with."""
    return [name for name, mode in MODES.items() if pattern in mode.patterns]

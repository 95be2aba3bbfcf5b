"""Bytes as text. A GiB is 2**30 of them."""

from collections.abc import Mapping, Sequence

GIB = 2**30


def size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 8 else f"{count / 2**20:.2f} MiB"


def sizes(counts: Sequence[int]) -> list[str]:
    """The bytes of one column, all in the unit of the largest."""
    if max(counts, default=0) >= GIB:
        return [f"{count / GIB:.2f} GiB" for count in counts]
    return [f"{count / 2**20:.2f} MiB" for count in counts]


def listed(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {size(held)}" for kind, held in kinds.items())

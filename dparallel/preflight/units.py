"""Format numbers of bytes. A GiB is 2**30 bytes."""

from collections.abc import Mapping, Sequence

GIB = 2**30


def size(count: int) -> str:
    """A number of bytes in GiB, or in MiB if it is small."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 8 else f"{count / 2**20:.2f} MiB"


def sizes(counts: Sequence[int]) -> list[str]:
    """Numbers of bytes with a common unit, for a column of a table."""
    if max(counts, default=0) >= GIB:
        return [f"{count / GIB:.2f} GiB" for count in counts]
    return [f"{count / 2**20:.2f} MiB" for count in counts]


def listed(kinds: Mapping[str, int]) -> str:
    """Numbers of bytes by kind, for messages."""
    return ", ".join(f"{kind} {size(held)}" for kind, held in kinds.items())

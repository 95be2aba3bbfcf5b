"""Stop texts: where a response is cut, and when decoding can end because of them."""

from bisect import bisect_left
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dparallel.decoding.stops import Stop


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first occurrence of any stop text."""
    return text[: _first(text, stops)]


def _first(text: str, stops: Sequence[str]) -> int | None:
    return min((place for place in map(text.find, stops) if place >= 0), default=None)


def is_settled(text: str, stops: Sequence[str]) -> bool:
    """Whether `text` contains a stop text and nothing written after it can move the cut forward.

    A longer stop text may have begun before the first complete one: of the stops `b` and `abc`, the text `ab`
    contains `b`, but `abc` would cut before it. U+FFFD at the end may be the first bytes of a character.
    """
    text = text.rstrip("\ufffd")
    found = _first(text, stops)
    if found is None:
        return False
    longest = max(map(len, stops))
    starts = range(max(0, len(text) - longest + 1), found)
    return not any(stop.startswith(text[start:]) for start in starts for stop in stops)


def stop_at(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> Stop | None:
    """A `Stop` for `generate`: a response ends with the token that completes a stop text.

    The text of a response, cut at its first stop text, is the same as without it.

    Returns:
        None if there are no stop texts.
    """
    if not stops:
        return None

    def stop(tokens: Sequence[int]) -> int | None:
        def settled(count: int) -> bool:
            text = tokenizer.decode(list(tokens[:count]), skip_special_tokens=False)
            assert isinstance(text, str)
            return is_settled(text, stops)

        if not tokens or not settled(len(tokens)):
            return None
        return bisect_left(range(len(tokens)), True, key=settled)

    return stop

"""Words of prompts that are not in a tokenizer's vocabulary: a model reads them all as one token."""

import logging
from collections.abc import Iterable, Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHOWN = 8  # words that the warning names


def unknown_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> list[str]:
    """The words that became the tokenizer's unknown token, in their order, each once.

    Args:
        texts: the prompts, with everything that was encoded.
        encoded: their token ids.

    Returns:
        An empty list for tokenizers that know every word, such as those of bytes, and for the few whose
        tokens cannot be traced to the text.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not tokenizer.is_fast:
        return []
    found: dict[str, None] = {}
    for text in (text for text, ids in zip(texts, encoded, strict=True) if unknown in ids):
        traced = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(traced["input_ids"], traced["offset_mapping"], strict=True):
            word = text[start:end]
            if token == unknown and word != tokenizer.unk_token:  # which may be written in a text
                found[word] = None
    return list(found)


def warn_of_unknown_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> None:
    """Log a warning that names the unknown words, if there are any; the same words are named once."""
    if words := unknown_words(tokenizer, texts, encoded):
        _warn(tokenizer.name_or_path or "the tokenizer", str(tokenizer.unk_token), tuple(words))


@cache
def _warn(name: str, token: str, words: tuple[str, ...]) -> None:
    log.warning(
        "%s: the model does not know %s of the prompts, and reads %s instead: expect no sensible response",
        name,
        _listed(words),
        token,
    )


def _listed(words: Iterable[str]) -> str:
    shown = [repr(word) for word in words]
    more = len(shown) - SHOWN
    named = ", ".join(shown[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{len(shown)} {'word' if len(shown) == 1 else 'words'} ({named})"

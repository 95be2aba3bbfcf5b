"""The text that each token of a response contributes."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to the text of the previous tokens.

    A token that ends within a character adds nothing; the token that completes the character adds it.
    """
    texts, start, done = [], 0, 0  # decoding starts at token `start`; `done` characters are assigned
    for end in range(1, len(tokens) + 1):
        before, now = (str(tokenizer.decode([*tokens[start:stop]])) for stop in (done, end))
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, end
    return texts

"""Texts with gaps: parts that are texts or lengths of gaps, their token ids, and their text when filled."""

import re
from collections.abc import Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from dparallel.decoding.canvas import DecodingError
from dparallel.decoding.generate import LengthError
from dparallel.models.backbone import DiffusionConfig
from dparallel.problems.prompts import front_tokens
from dparallel.problems.vocabulary import warn_of_unknown_words

Part = str | int  # a text, or the number of tokens of a gap

FORM = "a list of texts and of numbers of tokens, such as ['The total is ', 4, '.']"
MARK = re.compile(r"(\\*)<gap(?![A-Za-z_])([^<>]*)>")  # with the backslashes in front


def parts_of(text: str, name: str) -> list[Part]:
    """The parts of a text in which `<gap 12>` is a gap of 12 tokens.

    A backslash in front makes a mark ordinary text. In front of a mark only, two backslashes stand for one.

    Raises:
        DecodingError: a mark has no number of at least 1, or there is none; begins with `name`.
    """
    parts: list[Part] = []
    said, start = "", 0
    for mark in MARK.finditer(text):
        slashes, inside = mark.groups()
        said += text[start : mark.start()] + "\\" * (len(slashes) // 2)
        start = mark.end()
        if len(slashes) % 2:
            said += mark[0][len(slashes) :]
            continue
        number = re.fullmatch(r" +0*([1-9][0-9]{0,8})", inside)
        if number is None:
            whole = mark[0][len(slashes) :]
            raise DecodingError(
                f"{name}: {whole} is no gap: give its number of tokens, such as <gap 12>, or write \\{whole} "
                "for the text"
            )
        parts += [said, int(number[1])] if said else [int(number[1])]
        said = ""
    said += text[start:]
    if not parts:
        raise DecodingError(f"{name} has no gap: mark the place of its text, such as 'The total is <gap 4>.'")
    return [*parts, said] if said else parts


def check_parts(parts: object, name: str) -> None:
    """Raise a DecodingError, which begins with `name`, for what are not texts and lengths of gaps."""
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise DecodingError(f"{name} is {parts!r}: give {FORM}")
    for part in parts:
        if isinstance(part, str):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:  # half a surrogate pair
                raise DecodingError(f"{name} has {part!r}, not a text in UTF-8: {error.reason}") from error
        elif isinstance(part, bool) or not isinstance(part, int | np.integer) or part < 1:
            raise DecodingError(f"{name} has {part!r}, which is no text and no length of a gap: give {FORM}")
    if all(isinstance(part, str) for part in parts):
        raise DecodingError(f"{name} has no gap: give {FORM}")


def encode_parts(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part], config: DiffusionConfig, name: str
) -> list[int]:
    """Token ids of texts, and masks for gaps. Each text is encoded by itself.

    Raises:
        DecodingError: a text has the text of the mask token, or the gaps are longer than the model's canvas
            (LengthError); begins with `name`.
    """
    mask_token_id, limit = config.mask_token_id, config.max_position_embeddings
    masked = sum(int(part) for part in parts if not isinstance(part, str))
    if masked > limit:  # before a list of that length is made
        raise LengthError(
            f"{name} has gaps of {masked} tokens, and this model takes {limit} (max_position_embeddings): "
            "shorten the gaps"
        )
    ids: list[int] = []
    for part in parts:
        if not isinstance(part, str):
            ids += [mask_token_id] * int(part)
            continue
        tokens: list[int] = tokenizer.encode(part, add_special_tokens=False)
        if mask_token_id in tokens:
            raise DecodingError(
                f"{name} has the mask token {tokenizer.decode([mask_token_id])!r} in the text {part!r}: give "
                "gaps as their numbers of tokens"
            )
        warn_of_unknown_words(tokenizer, [part], [tokens])
        ids += tokens
    return ids


def encode_infill(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    config: DiffusionConfig,
    name: str,
    prompt: Sequence[int] | None = None,
) -> list[int]:
    """Token ids of a prompt and the parts behind it, with masks for gaps.

    Args:
        prompt: token ids; by default what the tokenizer puts in front of a text (BOS), once.

    Raises:
        DecodingError: see `encode_parts`.
    """
    ids = encode_parts(tokenizer, parts, config, name)
    if prompt is not None:
        return [*prompt, *ids]
    front = front_tokens(tokenizer, "a")
    return ids if ids[: len(front)] == front else front + ids


def gap_texts(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    tokens: Sequence[int],
    end_token_ids: Collection[int],
) -> list[str]:
    """Text of each gap, without end tokens.

    Args:
        tokens: of all gaps, one after the other.
    """
    texts, start = [], 0
    for length in (int(part) for part in parts if not isinstance(part, str)):
        filled = [token for token in tokens[start : start + length] if token not in end_token_ids]
        texts.append(str(tokenizer.decode(filled, skip_special_tokens=False)))
        start += length
    return texts


def joined(parts: Sequence[Part], gaps: Sequence[str]) -> str:
    """The parts as one text, with the texts of its gaps."""
    texts = iter(gaps)
    return "".join(part if isinstance(part, str) else next(texts) for part in parts)

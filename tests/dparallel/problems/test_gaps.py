"""Marks of gaps in texts, their token ids, and the filled text."""

import pytest

from dparallel.decoding.canvas import DecodingError
from dparallel.problems.gaps import check_parts, encode_parts, gap_texts, joined, parts_of
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a <gap 12> b", ["a ", 12, " b"]),
        ("<gap 1><gap  2>", [1, 2]),
        ("a\n<gap 007>", ["a\n", 7]),
        (r"write \<gap 12>, then <gap 3>", ["write <gap 12>, then ", 3]),
        (r"C:\\<gap 3>", ["C:\\", 3]),
        (r"\\\<gap x><gap 3>", ["\\<gap x>", 3]),
        (r"\n\\n <gap 3>", ["\\n\\\\n ", 3]),
        ("a < b > <gap 3> <gaps>", ["a < b > ", 3, " <gaps>"]),
    ],
)
def test_marks_by_hand(text: str, parts: list) -> None:
    assert parts_of(text, "--infill") == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "--infill has no gap: mark the place"),
        (r"\<gap 3>", "--infill has no gap"),
        ("<gap 0>", r"--infill: <gap 0> is no gap: give .* such as <gap 12>, or write \\<gap 0> for the"),
        ("<gap>", "<gap> is no gap"),
        ("<gap -3>", "<gap -3> is no gap"),
        ("<gap 3 words>", "<gap 3 words> is no gap"),
        ("<gap12> <gap 3>", "<gap12> is no gap"),
        ("<gap 1000000000>", "<gap 1000000000> is no gap"),
    ],
)
def test_marks_that_say_no_length_are_named(text: str, message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        parts_of(text, "--infill")


@pytest.mark.parametrize("parts", ["a", 5, None, [5.0], [True], ["a", 0], ["a", -1], ["a", None], ["a", [3]]])
def test_parts_are_texts_and_lengths(parts: object) -> None:
    with pytest.raises(
        DecodingError, match=r"infill 0 (is|has) .*: give a list of texts and of numbers of to"
    ):
        check_parts(parts, "infill 0")


def test_a_text_without_gaps_and_a_broken_text_are_named() -> None:
    with pytest.raises(DecodingError, match="infill 0 has no gap: give a list"):
        check_parts(["a", "b"], "infill 0")
    with pytest.raises(DecodingError, match="not a text in UTF-8: surrogates not allowed"):
        check_parts(["\ud83d", 3], "infill 0")
    check_parts(("a", 3), "infill 0")


def test_texts_and_gaps_as_tokens_and_back() -> None:
    tokenizer = build_tokenizer()
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    parts = ["Tom has ", 2, " coins . ", 1]
    given = tokenizer.encode("Tom has"), tokenizer.encode("coins .")
    config = random_model().config
    assert encode_parts(tokenizer, parts, config, "infill 0") == [*given[0], mask, mask, *given[1], mask]
    gaps = gap_texts(tokenizer, parts, [*tokenizer.encode("7"), eos, eos], [eos])
    assert gaps == ["7", ""]
    assert joined(parts, gaps) == "Tom has 7 coins . "


def test_the_text_of_the_mask_token_is_no_gap() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(
        DecodingError, match=f"infill 3 has the mask token '{tokenizer.mask_token}' in the text"
    ):
        encode_parts(tokenizer, [f"Tom {tokenizer.mask_token}", 3], random_model().config, "infill 3")

"""Words that a tokenizer does not know are named, once."""

import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dparallel.config.problems import ProtocolConfig
from dparallel.problems.prompts import render_all
from dparallel.problems.sources import Problem
from dparallel.problems.vocabulary import unknown_words
from dparallel.tiny.tokenizer import build_tokenizer


def asked(texts: list[str]) -> list[Problem]:
    return [Problem(str(number), "texts", text) for number, text in enumerate(texts)]


def test_unknown_words_of_all_prompts_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    texts = ["Tom 7 coins buys 2 ?", "What is the capital of France?", "the capital of Spain"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            render_all(asked(texts), ProtocolConfig(), tokenizer)
    [record] = caplog.records
    assert "does not know 7 words ('What', 'is', 'the', 'capital', 'of'," in record.getMessage()
    assert "reads <unk> instead" in record.getMessage()


def test_long_lists_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        render_all(
            asked([" ".join(f"word{number}" for number in range(20))]), ProtocolConfig(), build_tokenizer()
        )
    assert "'word7' and 12 more)" in caplog.text


def test_words_of_the_task_and_a_written_unknown_token_are_no_unknown_words() -> None:
    tokenizer = build_tokenizer()
    for text, words in (("Tom 7 coins buys 2 ?", []), ("Tom <unk> odd odd", ["odd"])):
        assert unknown_words(tokenizer, [text], [tokenizer.encode(text)]) == words


def test_pieces_of_words_are_traced_to_the_text() -> None:
    """Word pieces make a whole word unknown; without an unknown token everything is known."""
    pieces = models.WordPiece({"<unk>": 0, "know": 1, "##n": 2}, unk_token="<unk>")
    tokenizer = Tokenizer(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for unknown, words in (("<unk>", ["Zürich", "!"]), (None, [])):
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)
        text = "known Zürich know!"
        assert unknown_words(fast, [text], [fast.encode(text, add_special_tokens=False)]) == words

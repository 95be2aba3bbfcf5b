"""Text is sent as early as possible, is never taken back, and in the end equals the whole response."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dparallel.problems.prompts import finish
from dparallel.serving.texts import TextStream, encode_messages, encode_text
from dparallel.tiny.byte_level import LLADA, MASK, byte_level
from dparallel.tiny.tokenizer import build_tokenizer

BYTES = byte_level()
END = BYTES.convert_tokens_to_ids("<|eot_id|>")


@given(
    text=st.text(alphabet="abé€🙂", max_size=12),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
    ended=st.booleans(),
    data=st.data(),
)
def test_the_parts_make_the_whole(text: str, stops: list[str], ended: bool, data: st.DataObject) -> None:
    tokens = BYTES.encode(text, add_special_tokens=False) + [END, 5, 5] * ended
    known = sorted({len(tokens), *data.draw(st.lists(st.integers(0, len(tokens))))})
    stream, parts = TextStream(BYTES, [END], stops), []
    for count in known:
        parts.append(stream.push(tokens[:count], final=count == len(tokens)))
        assert finish(tokens, BYTES, [END], stops).startswith("".join(parts))
    assert "".join(parts) == finish(tokens, BYTES, [END], stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    stream = TextStream(BYTES, [END], ["END"])
    tokens = BYTES.encode("xEyEN", add_special_tokens=False)
    assert [stream.push(tokens[:count]) for count in range(6)] == ["", "x", "", "Ey", "", ""]
    assert stream.push(tokens, final=True) == "EN"


def test_a_character_is_sent_when_all_its_bytes_are_there() -> None:
    stream = TextStream(BYTES, [END])
    tokens = BYTES.encode("🙂", add_special_tokens=False)
    assert [stream.push(tokens[:count]) for count in range(1, 5)] == ["", "", "", "🙂"]


@given(text=st.lists(st.sampled_from(["a ", MASK, "<|ma", "sk|>", "é", "|>"]), max_size=6).map("".join))
def test_the_mask_in_a_text_is_text(text: str) -> None:
    mask = BYTES.mask_token_id
    ids = encode_text(BYTES, text, mask)
    assert mask not in ids
    assert BYTES.decode(ids) == text
    turns = encode_messages(BYTES, [{"role": "user", "content": text}], mask)
    assert mask not in turns
    assert text.strip() in BYTES.decode(turns)
    assert (turns == BYTES.encode(BYTES.decode(turns), add_special_tokens=False)) == (MASK not in text)


@pytest.mark.parametrize("tokenizer", [BYTES, build_tokenizer()], ids=["bytes", "words"])
def test_other_texts_are_encoded_as_ever(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Tom has 3 coins ."
    assert encode_text(tokenizer, text, tokenizer.mask_token_id) == tokenizer.encode(text)
    mask = tokenizer.mask_token
    assert tokenizer.mask_token_id not in encode_text(
        tokenizer, f"{text}{mask} {mask}", tokenizer.mask_token_id
    )


def test_a_beginning_of_the_text_is_added_once() -> None:
    tokenizer = byte_level(LLADA)
    tokenizer.add_bos_token = True
    [bos, *rest] = encode_text(tokenizer, "<|startoftext|>x", tokenizer.mask_token_id)
    assert bos == tokenizer.bos_token_id
    assert bos not in rest

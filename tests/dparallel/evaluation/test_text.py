import pytest

from dparallel.config import DecodingConfig
from dparallel.evaluation.benchmarks import Problem
from dparallel.evaluation.text import (
    decode_response,
    encode_problems,
    encode_prompt,
    tokenizer_fingerprint,
)
from dparallel.tiny.tokenizer import build_tokenizer

DECODING = DecodingConfig(gen_length=36, block_length=12)


def ids(words: str) -> list[int]:
    return [build_tokenizer().get_vocab()[word] for word in words.split()]


def test_text_ends_before_the_first_end_of_text_and_keeps_stray_special_tokens() -> None:
    tokens = ids("Tom <pad> has <eos> 7 <eos>")
    assert decode_response(build_tokenizer(), tokens, eos_token_id=ids("<eos>")[0]) == "Tom <pad> has"
    assert decode_response(build_tokenizer(), ids("Tom has"), eos_token_id=ids("<eos>")[0]) == "Tom has"


def test_a_chat_template_makes_the_prompt_a_users_turn() -> None:
    tokenizer = build_tokenizer()
    assert encode_prompt(tokenizer, "Tom 7") == ids("Tom 7")
    tokenizer.chat_template = (
        "{% for message in messages %}first {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    assert encode_prompt(tokenizer, "Tom 7") == ids("first Tom 7 answer")


def test_a_prompt_that_does_not_fit_names_problem_and_lengths(tiny_model) -> None:
    problems = [Problem("short", "s", "Tom 7", None), Problem("long", "s", "Tom " * 29, None)]
    with pytest.raises(ValueError, match=r"problem long \(s\).* 29 tokens.*gen_length=36.*at most 28"):
        encode_problems(problems, build_tokenizer(), tiny_model, DECODING)
    assert encode_problems(problems[:1], build_tokenizer(), tiny_model, DECODING) == [ids("Tom 7")]


def test_a_prompt_that_holds_the_mask_is_refused(tiny_model) -> None:
    problems = [Problem("masked", "s", "Tom <mask>", None)]
    with pytest.raises(ValueError, match="problem masked.*holds token id 1"):
        encode_problems(problems, build_tokenizer(), tiny_model, DECODING)


def test_tokenizer_fingerprint_sees_vocabulary_and_template() -> None:
    one, other = build_tokenizer(), build_tokenizer()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    other = build_tokenizer()
    other.add_tokens(["word"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)

"""`complete` with texts that have gaps."""

import pytest
from tokenizers.processors import TemplateProcessing

from dparallel import ChatTemplateError, Completion, DecodingConfig, DecodingError, complete
from dparallel.decoding.infill import infill
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.test_api import TEMPLATE

DECODING = DecodingConfig(gen_length=24, block_length=8, threshold=1.5)
PARTS = [["Tom has ", 5, " coins . ", 3], [4, " pens"]]


def test_gaps_are_filled_and_the_texts_stay() -> None:
    model, tokenizer = random_model(2), build_tokenizer()
    mask, ends = tokenizer.mask_token_id, model.config.end_token_ids
    completions = complete(model, tokenizer, infill=PARTS, decoding=DECODING)
    tom, coins, pens = (tokenizer.encode(text) for text in ("Tom has", "coins .", "pens"))
    canvases = [[*tom, *[mask] * 5, *coins, *[mask] * 3], [*[mask] * 4, *pens]]
    for completion, filled in zip(completions, infill(model, canvases, DECODING), strict=True):
        assert completion.tokens == filled.tokens
        assert completion.nfe == filled.nfe
        shown = sum(token not in ends for token in filled.tokens)
        assert completion.tokens_per_forward == shown / filled.nfe
        assert completion.finish_reason == "length"
    first, second = completions
    assert first.text == f"Tom has {first.gaps[0]} coins . {first.gaps[1]}"
    assert second.text == f"{second.gaps[0]} pens"
    assert "<eos>" not in first.text + second.text
    assert first.gaps[0].split() == tokenizer.decode([t for t in first.tokens[:5] if t not in ends]).split()
    assert complete(model, tokenizer, ["Tom has"], DECODING)[0].gaps == []


def test_prompts_stand_in_front_and_are_no_text_of_the_result() -> None:
    model, tokenizer = random_model(2), build_tokenizer()
    with pytest.raises(ChatTemplateError):
        complete(model, tokenizer, [[{"role": "user", "content": "Tom"}]], DECODING, infill=[["answer ", 3]])
    tokenizer.chat_template = TEMPLATE
    prompts = [[{"role": "user", "content": "Tom"}], "Ann has"]
    parts = [[" #### ", 3], [4, " pens"]]
    [chat, text] = complete(model, tokenizer, prompts, DECODING, infill=parts)
    alone = [["user Tom answer #### ", 3], ["Ann has ", 4, " pens"]]
    for one, other in zip(
        (chat, text), complete(model, tokenizer, None, DECODING, infill=alone), strict=True
    ):
        assert one.tokens == other.tokens
    assert text.text == f"{text.gaps[0]} pens"


def test_a_beginning_of_text_is_put_in_front_once() -> None:
    model, tokenizer = random_model(), build_tokenizer()
    plain = complete(model, tokenizer, infill=[["<eos> Tom has ", 3, " pens"]], decoding=DECODING)
    gap_first = complete(model, tokenizer, infill=[["<eos>", 3, " pens"]], decoding=DECODING)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )

    def tokens(parts: list[str | int]) -> list[int]:
        [completion] = complete(model, tokenizer, infill=[parts], decoding=DECODING)
        return completion.tokens

    for text in ("Tom has ", "<eos> Tom has "):
        assert tokens([text, 3, " pens"]) == plain[0].tokens
    assert tokens([3, " pens"]) == gap_first[0].tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"infill": ["Tom ", 3]}, r"infill is one text with gaps: give a list of them, such as \[infill\]"),
        ({"infill": "Tom"}, "infill is 'Tom': give a list of texts with gaps"),
        ({"infill": [["Tom"]]}, "infill 0 has no gap"),
        ({"infill": [["Tom ", 3], None]}, "infill 1 is None: give a list of texts and of numbers of tokens"),
        ({"infill": [["Tom <mask> ", 3]]}, "infill 0 has the mask token '<mask>' in the text"),
        ({"infill": [["Tom ", 3]], "prompts": ["<mask>"]}, "prompt 0 holds token id 1"),
        ({"infill": [["Tom ", 3]], "prompts": []}, "0 prompts with 1 texts with gaps: give one for each, or"),
        (
            {"infill": [["Tom ", 3]], "stops": ["a"]},
            r"stops=\['a'\] with infill, whose gaps have fixed lengt",
        ),
        ({"infill": [["Tom ", 3]], "streamer": 5}, "streamer with infill, whose text is not decoded from le"),
        ({"infill": [["Tom ", 64]]}, "infill 0 has 65 tokens with its gaps, and this model takes 64"),
        ({"infill": [["Tom ", 40, "a", 40]]}, "infill 0 has gaps of 80 tokens, and this model takes 64"),
        ({"infill": [["Tom ", 10**30]]}, f"infill 0 has gaps of {10**30} tokens, and this model takes 64"),
        ({}, "prompts is a NoneType: give a list of texts"),
    ],
)
def test_what_is_no_infill_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        complete(random_model(), build_tokenizer(), decoding=DECODING, **arguments)


def test_no_texts_are_no_completions() -> None:
    assert complete(random_model(), build_tokenizer(), infill=[], decoding=DECODING) == list[Completion]()

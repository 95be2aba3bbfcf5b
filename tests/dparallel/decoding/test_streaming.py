"""A streamer gets the prompt, drafts, finished blocks in order and the end, as from transformers' models."""

from itertools import chain

import pytest
import torch
from transformers import TextDiffusionStreamer, TextIteratorStreamer

from dparallel import DecodingConfig, DecodingError, complete, generate
from dparallel.decoding.canvas import Step
from dparallel.problems.stops import stop_at
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model

SHAPE = {"gen_length": 24, "block_length": 8, "threshold": 1.5}
DECODINGS = [
    SHAPE,
    {**SHAPE, "stop_at_eos": False},
    {**SHAPE, "mode": "multi_block", "cache": "dual"},
    {**SHAPE, "mode": "multi_block", "eos_fill": "immediate"},
    {**SHAPE, "mode": "pipelined"},
    {**SHAPE, "rule": "contiguous", "threshold": 0.1, "mode": "revising", "revision_passes": 3},
    {"gen_length": 24, "rule": "dream_entropy", "steps": 6},
]
PROMPT = [5, 6, 7]


class Recorder:
    """Its calls in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(("put", self.row(value)))

    def put_draft(self, value: torch.Tensor) -> None:
        self.calls.append(("draft", self.row(value)))

    def end(self) -> None:
        self.calls.append(("end", []))

    @staticmethod
    def row(value: torch.Tensor) -> list[int]:
        assert value.shape[0] == 1
        assert value.ndim == 2
        assert (value.dtype, value.device.type) == (torch.long, "cpu")
        return value[0].tolist()

    def texts(self, name: str) -> list[list[int]]:
        return [tokens for call, tokens in self.calls if call == name]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", DECODINGS, ids=str)
def test_blocks_add_up_to_the_response_and_each_forward_pass_has_a_draft(settings: dict, seed: int) -> None:
    model, decoding, recorder = random_model(seed), DecodingConfig(**settings), Recorder()
    steps: list[Step] = []
    [streamed] = generate(model, [PROMPT], decoding, streamer=recorder, observe=steps.extend)
    assert [streamed] == generate(model, [PROMPT], decoding)
    prompt, *blocks = recorder.texts("put")
    assert recorder.calls[0] == ("put", prompt)
    assert prompt == PROMPT
    assert [*chain(*blocks)] == streamed.tokens[: streamed.num_tokens]
    assert all(len(block) % decoding.block_length == 0 for block in blocks[:-1])
    assert recorder.calls[-1] == ("end", [])
    assert recorder.calls.count(("end", [])) == 1

    # A draft follows what was put before it; nothing in it is a mask, and what was committed stays.
    drafts = recorder.texts("draft")
    if decoding.stop_at_eos:
        assert len(drafts) == streamed.nfe == len(steps)
    put, forward = -len(PROMPT), 0
    for call, tokens in recorder.calls:
        if call == "put":
            put += len(tokens)
        if call != "draft":
            continue
        assert tokens
        assert model.config.mask_token_id not in tokens
        assert put + len(tokens) >= max(steps[forward].offsets) + 1
        if not decoding.revises:
            for place, token in enumerate(tokens, put):
                if streamed.commit_step[place] <= forward and streamed.confidence[place]:  # not filled in
                    assert token == streamed.tokens[place]
        forward += 1


def test_by_hand() -> None:
    """One token per forward pass, blocks of two: drafts are the block, which is put when the next is read."""
    decoding = DecodingConfig(gen_length=4, block_length=2, rule="steps", steps=4, stop_at_eos=False)
    recorder, steps = Recorder(), list[Step]()
    [response] = generate(random_model(), [PROMPT], decoding, observe=steps.extend, streamer=recorder)
    assert [call for call, _ in recorder.calls] == [
        *("put", "draft", "draft", "put", "draft", "draft", "put", "end")
    ]
    first, second, third, fourth = recorder.texts("draft")
    assert first == steps[0].tokens
    assert second == response.tokens[:2]
    assert third == steps[2].tokens
    assert fourth == response.tokens[2:]


def test_the_published_streamer_prints_the_text_and_removes_its_drafts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = random_model(2), build_tokenizer()
    decoding = DecodingConfig(**SHAPE)
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    [completion] = complete(model, tokenizer, ["Tom has"], decoding, streamer=streamer)
    printed = capsys.readouterr().out
    assert printed.count("\033[33m") == completion.nfe  # drafts in yellow
    final = []  # what a terminal shows in the end: a draft lasts from \0337 to the next \0338
    for piece in printed.split("\0337"):
        _, back, rest = piece.partition("\0338\033[J")
        final.append(rest if back else piece)
    assert "".join(final).split() == completion.text.split()


def test_a_streamer_without_drafts_gets_the_prompt_and_the_text() -> None:
    model, tokenizer = random_model(2), build_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    [completion] = complete(model, tokenizer, ["Tom has"], DecodingConfig(**SHAPE), streamer=streamer)
    assert "".join(streamer).split() == ["Tom", "has", *completion.text.split()]


def test_a_stop_text_ends_the_stream() -> None:
    model, tokenizer, decoding = random_model(2), build_tokenizer(), DecodingConfig(**SHAPE)
    [free] = complete(model, tokenizer, ["Tom has"], decoding)
    stop, recorder = free.text.split()[2], Recorder()
    [ended] = complete(model, tokenizer, ["Tom has"], decoding, stops=[stop], streamer=recorder)
    assert [*chain(*recorder.texts("put")[1:])] == ended.tokens
    ids = tokenizer.encode("Tom has")
    generate(model, [ids], decoding, stop=stop_at(tokenizer, [stop]), streamer=(again := Recorder()))
    assert again.calls == recorder.calls


def test_what_a_streamer_cannot_take_is_refused_before_anything_is_put() -> None:
    model, decoding = random_model(), DecodingConfig(**SHAPE)
    with pytest.raises(DecodingError, match="streamer with 2 prompts: give one prompt"):
        generate(model, [PROMPT, PROMPT], decoding, streamer=(recorder := Recorder()))
    with pytest.raises(DecodingError, match="streamer with 0 prompts"):
        generate(model, [], decoding, streamer=recorder)
    assert recorder.calls == []
    with pytest.raises(DecodingError, match="streamer=5 has no method put and no method end: give"):
        generate(model, [PROMPT], decoding, streamer=5)  # type: ignore[arg-type]
    recorder._takes_logits = True  # type: ignore[attr-defined]
    with pytest.raises(DecodingError, match=r"asks for logits \(_takes_logits\)"):
        generate(model, [PROMPT], decoding, streamer=recorder)

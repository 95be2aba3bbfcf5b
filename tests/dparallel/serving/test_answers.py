"""Answers over HTTP equal those of the library, in both forms and under a mixed load."""

import asyncio
import json
import math
import random
from typing import Any

import httpx
import pytest

from dparallel.completion import complete
from dparallel.config.decoding import DecodingConfig, combined
from dparallel.decoding.generate import generate
from dparallel.serving.engine import Served
from tests.dparallel.serving.conftest import TEACHER, Running

PUZZLE = "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as OpenAI's do."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_completion_equals_the_librarys(client: httpx.Client, teacher: Served) -> None:
    [alone] = complete(teacher.model, teacher.tokenizer, [PUZZLE], TEACHER)
    answer = client.post(COMPLETIONS, json={"model": "tiny", "prompt": PUZZLE}).json()
    [choice] = answer["choices"]
    assert choice["text"] == alone.text
    assert choice["finish_reason"] == alone.finish_reason == "stop"
    prompt = len(teacher.tokenizer.encode(PUZZLE))
    assert answer["usage"].pop("decode_seconds") > 0
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(alone.tokens),
        "total_tokens": prompt + len(alone.tokens),
        "nfe": alone.nfe,
        "tokens_per_forward": alone.tokens_per_forward,
    }


def test_a_chat_and_its_stream_say_the_same(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": PUZZLE}], "logprobs": True}
    whole = client.post(CHAT, json=body).json()
    chunks = streamed(client, CHAT, {**body, "stream_options": {"include_usage": True}})
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *parts, usage = chunks
    choices = [chunk["choices"][0] for chunk in parts]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["choices"] == []
    assert usage["usage"].pop("decode_seconds") > 0
    assert whole["usage"].pop("decode_seconds") > 0
    assert usage["usage"] == whole["usage"]
    said = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert said == whole["choices"][0]["logprobs"]["content"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_log_probabilities_are_those_at_commit(client: httpx.Client, teacher: Served) -> None:
    prompt = teacher.tokenizer.encode(PUZZLE)
    [alone] = generate(teacher.model, [prompt], TEACHER)
    body = {"model": "tiny", "prompt": prompt, "logprobs": 1}
    logprobs = client.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    count = alone.num_tokens - 1  # without the end token
    assert logprobs["tokens"] == [teacher.tokenizer.decode([token]) for token in alone.tokens[:count]]
    expected = [math.log(confidence) for confidence in alone.confidence[:count]]
    assert logprobs["token_logprobs"] == pytest.approx(expected)


def test_drafts_show_the_canvas_being_filled(client: httpx.Client, teacher: Served) -> None:
    prompt = teacher.tokenizer.encode(PUZZLE)
    [alone] = generate(teacher.model, [prompt], TEACHER)
    body = {"model": "tiny", "prompt": prompt, "stream_mode": "canvas"}
    first, *chunks = streamed(client, COMPLETIONS, body)
    assert first["choices"][0]["text"] == ""
    assert DecodingConfig(**first["choices"][0]["decoding"]) == TEACHER
    drafts = [chunk["choices"][0]["canvas"] for chunk in chunks]
    assert [draft["forward"] for draft in drafts] == list(range(alone.nfe))
    filled = {}
    for draft in drafts:
        columns = zip(
            draft["positions"], draft["token_ids"], draft["tokens"], draft["confidences"], strict=True
        )
        for (position, token, text, confidence), commit in zip(columns, draft["committed"], strict=True):
            assert teacher.tokenizer.decode([token]) == text
            if commit:
                assert position not in filled
                filled[position] = token
                assert confidence == pytest.approx(alone.confidence[position])
    assert all(alone.tokens[position] == token for position, token in filled.items())
    assert set(range(alone.num_tokens)) <= set(filled)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == teacher.tokenizer.decode(
        alone.tokens[: alone.num_tokens - 1]
    )


def test_stop_texts_and_lengths_cut_a_response(client: httpx.Client, teacher: Served) -> None:
    [alone] = complete(teacher.model, teacher.tokenizer, [PUZZLE], TEACHER)
    words = alone.text.split()
    body = {"model": "tiny", "prompt": PUZZLE}
    stop = f"{words[2]} {words[3]}"
    [cut] = complete(teacher.model, teacher.tokenizer, [PUZZLE], TEACHER, stops=[stop])
    answer = client.post(COMPLETIONS, json={**body, "stop": stop}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (cut.text, "stop")
    assert answer["usage"]["nfe"] == cut.nfe
    answer = client.post(COMPLETIONS, json={**body, "max_tokens": 3}).json()
    assert answer["choices"][0]["text"] == teacher.tokenizer.decode(alone.tokens[:3])
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    for path, extra in ((COMPLETIONS, {"prompt": PUZZLE}), (CHAT, {"messages": _turns(PUZZLE)})):
        chunks = streamed(client, path, {"model": "tiny", **extra, "stop": [stop], "max_tokens": 9})
        assert stop not in "".join(_text(chunk) for chunk in chunks)


def test_a_longer_max_tokens_makes_room(client: httpx.Client, teacher: Served) -> None:
    """By default the teacher's canvas has 36 positions; 40 need 4 blocks of 12."""
    decoding = DecodingConfig(gen_length=48, block_length=12, threshold=0.5)
    [alone] = complete(teacher.model, teacher.tokenizer, [PUZZLE], decoding)
    answer = client.post(COMPLETIONS, json={"model": "tiny", "prompt": PUZZLE, "max_tokens": 40}).json()
    assert answer["usage"]["completion_tokens"] == min(40, len(alone.tokens))
    prompt = [5] * 50  # leaves 14 of 64 positions, which are a block of 12 and a rest
    answer = client.post(COMPLETIONS, json={"model": "tiny", "prompt": prompt}).json()
    shorter = DecodingConfig(gen_length=12, block_length=12, threshold=0.5)
    [alone] = generate(teacher.model, [prompt], shorter)
    assert answer["usage"]["completion_tokens"] == alone.num_tokens
    body = {"model": "tiny", "prompt": prompt, "stream_mode": "canvas"}
    [choice] = streamed(client, COMPLETIONS, body)[0]["choices"]
    assert choice["decoding"]["gen_length"] == 12, "a client learns the length before the first forward pass"


def test_several_choices_have_seeds_of_their_own(client: httpx.Client, teacher: Served) -> None:
    sampling = {"temperature": 1.5, "top_p": 0.95}
    body = {"model": "tiny", "prompt": [PUZZLE, "Ann 3 pens ?"], "n": 2, "seed": 5, **sampling}
    answer = client.post(COMPLETIONS, json=body).json()
    expected = []
    for prompt in body["prompt"]:
        for seed in (5, 6):
            decoding = TEACHER.model_copy(update={**sampling, "seed": seed})
            expected += complete(teacher.model, teacher.tokenizer, [prompt], decoding)
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in expected]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["nfe"] == sum(one.nfe for one in expected)


LONG = {"gen_length": 64, "block_length": 64, "steps": 64}
KNOBS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.2, "seed": 1, "temperature": 0.7},
    {"rule": "confidence", "threshold": 0.8, "block_length": 9},
    {
        "gen_length": 16,
        "block_length": 8,
        "mode": "multi_block",
        "cache": "dual",
        "temperature": 1,
        "seed": 9,
    },
    {"rule": "steps", "steps": 6, "gen_length": 24},
]


@pytest.mark.parametrize("requests", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_a_mixed_load_changes_no_token(server: Running, teacher: Served, requests: int) -> None:
    """Requests of any length, decoding and seed arrive at any time, others are cancelled beside them."""
    rng = random.Random(0)
    asked = []
    for _ in range(requests):
        prompt = [rng.randrange(3, 50) for _ in range(rng.randrange(1, 28))]
        asked.append(({"model": "tiny", "prompt": prompt, **rng.choice(KNOBS)}, rng.random() / 2))

    async def one(client: httpx.AsyncClient, body: dict[str, Any], delay: float) -> dict[str, Any]:
        await asyncio.sleep(delay)
        return (await client.post(COMPLETIONS, json=body)).raise_for_status().json()

    async def abandoned(client: httpx.AsyncClient, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            async with asyncio.timeout(0.1):
                await client.post(COMPLETIONS, json={"model": "endless", "prompt": [7], **LONG})
        except TimeoutError:
            pass

    async def everything() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            tasks = [one(client, *request) for request in asked]
            left = [abandoned(client, rng.random() / 2) for _ in range(requests // 3)]
            answers, _ = await asyncio.gather(asyncio.gather(*tasks), asyncio.gather(*left))
            return answers

    for (body, _), answer in zip(asked, asyncio.run(everything()), strict=True):
        knobs = {name: value for name, value in body.items() if name not in ("model", "prompt")}
        decoding = DecodingConfig(**combined(knobs, TEACHER.stated()))
        [alone] = generate(teacher.model, [body["prompt"]], decoding)
        expected = teacher.tokenizer.decode(
            [token for token in alone.tokens[: alone.num_tokens] if token != teacher.tokenizer.eos_token_id]
        )
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["nfe"] == alone.nfe


def _turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _text(chunk: dict[str, Any]) -> str:
    choice = chunk["choices"][0]
    return choice["text"] if "text" in choice else choice["delta"].get("content", "")

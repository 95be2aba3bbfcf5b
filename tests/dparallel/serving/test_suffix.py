"""`suffix` of `/v1/completions`: a gap between prompt and suffix, filled as by `complete(infill=...)`."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from dparallel import DecodingConfig, complete
from dparallel.decoding.generate import row_seed
from dparallel.decoding.infill import fitted, gap_blocks, infill
from dparallel.decoding.pool import Pool
from dparallel.models.backbone import DiffusionTransformer
from dparallel.serving.engine import Served
from tests.dparallel.serving.conftest import TEACHER
from tests.dparallel.serving.test_abuse import error_of

COMPLETIONS = "/v1/completions"
PUZZLE = "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
SUFFIX = " answer #### 9"


def alone(teacher: Served, gap: int, decoding: DecodingConfig = TEACHER, prompt: str = PUZZLE) -> Any:
    parts = [prompt, gap, SUFFIX]
    [filled] = complete(teacher.model, teacher.tokenizer, infill=[parts], decoding=decoding)
    return filled


def asked(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(COMPLETIONS, json={"model": "tiny", "prompt": PUZZLE, "suffix": SUFFIX, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("gap", [1, 7, 12, 30])
def test_the_text_is_that_of_the_gap(client: httpx.Client, teacher: Served, gap: int) -> None:
    answer, expected = asked(client, max_tokens=gap, logprobs=0), alone(teacher, gap)
    [choice] = answer["choices"]
    assert choice["text"] == expected.gaps[0]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["nfe"] == expected.nfe
    assert answer["usage"]["tokens_per_forward"] == expected.tokens_per_forward
    assert answer["usage"]["prompt_tokens"] == 12 + 3
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] <= gap


def test_without_max_tokens_the_gap_has_the_default_length(client: httpx.Client, teacher: Served) -> None:
    assert asked(client)["choices"][0]["text"] == alone(teacher, TEACHER.gen_length).gaps[0]
    assert asked(client, suffix="")["choices"][0]["finish_reason"] == "stop"


def test_settings_count_and_gaps_and_responses_share_the_server(
    client: httpx.Client, teacher: Served
) -> None:
    """Several at once, with the same settings and others, beside ordinary responses."""
    multi = TEACHER.model_copy(update={"mode": "multi_block", "block_add_threshold": 0.3, "threshold": 0.3})
    bodies: list[tuple[dict[str, Any], str]] = []
    for gap in (3, 10, 12, 20, 24):
        bodies += [({"max_tokens": gap}, alone(teacher, gap).gaps[0])]
        knobs = {"mode": "multi_block", "block_add_threshold": 0.3, "threshold": 0.3}
        bodies += [({"max_tokens": gap, **knobs}, alone(teacher, gap, multi).gaps[0])]
    [plain] = complete(teacher.model, teacher.tokenizer, [PUZZLE], TEACHER)
    bodies += [({"suffix": ""}, plain.text)] * 3
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: asked(client, **body[0]), bodies))
    assert [answer["choices"][0]["text"] for answer in answers] == [text for _, text in bodies]


def test_a_stream_adds_up_to_the_text(client: httpx.Client, teacher: Served) -> None:
    body = {"model": "tiny", "prompt": PUZZLE, "suffix": SUFFIX, "max_tokens": 20, "stream": True}
    with client.stream("POST", COMPLETIONS, json={**body, "stream_mode": "canvas"}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(choice.get("text") or "" for choice in choices) == alone(teacher, 20).gaps[0]
    positions = {place for choice in choices for place in (choice.get("canvas") or {}).get("positions", [])}
    assert positions == set(range(20))


def test_a_stop_cuts_the_text(client: httpx.Client, teacher: Served) -> None:
    text = alone(teacher, 20).gaps[0]
    stop = text.split()[3]
    [choice] = asked(client, max_tokens=20, stop=[stop])["choices"]
    assert choice["text"] == text.partition(stop)[0]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"max_tokens": 60},
            "the prompt and its suffix have 15 tokens and the text between them 60, but at m",
        ),
        ({"cache": "dual"}, "cache='dual' with infill"),
        ({"mode": "pipelined"}, "mode='pipelined' with infill"),
        ({"prompt": [5, 1, 6]}, "the prompt holds token id 1"),
        ({"suffix": 5}, "suffix"),
    ],
)
def test_what_does_not_suit_is_said(client: httpx.Client, body: dict[str, Any], words: str) -> None:
    given = {"model": "tiny", "prompt": PUZZLE, "suffix": SUFFIX, **body}
    assert words in error_of(client.post(COMPLETIONS, json=given), 400)["message"]


def test_a_suffix_of_a_chat_is_unknown(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "suffix": "b"}
    assert error_of(client.post("/v1/chat/completions", json=body), 400)["param"] == "suffix"


def test_rows_of_a_pool_equal_infill_alone(tiny_model: DiffusionTransformer) -> None:
    """Several gaps in a row; rows of equal numbers of blocks join while others run."""
    decoding = DecodingConfig(gen_length=8, block_length=4, threshold=2.0)
    canvases = [[5, *[1] * 6, 7, 1, 9], [1, 1, 1, 8, *[1] * 5], [6, 1, 6, 1, 6, 1, *[6] * 20], [3, *[1] * 12]]
    suited = fitted(decoding, 12)
    pool, waiting, running = Pool(tiny_model, suited, gaps=True), list(enumerate(canvases)), dict[int, int]()
    with torch.inference_mode():
        while waiting or running:
            if waiting:
                row, canvas = waiting.pop()
                assert len(gap_blocks(canvas, 1, decoding)) == 12
                running[pool.join(canvas, row_seed(None, canvas))] = row
            forward, done = pool.forward()
            slots = forward.rows
            look = pool.look(slots)
            for place in done.nonzero()[0]:
                canvas = canvases[running.pop(int(slots[place]))]
                [expected] = infill(tiny_model, [canvas], decoding)
                real = [each for each, at in enumerate(gap_blocks(canvas, 1, decoding)) if at is not None]
                assert look.tokens[place][real].tolist() == expected.tokens
                assert look.commit_step[place][real].tolist() == expected.commit_step
                assert look.nfe[place] == expected.nfe
            pool.leave(slots[done].tolist())

"""Load and abuse: what is refused, and how; what ends early, and when."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.serving.bodies import ChatBody, CompletionBody, parse
from dparallel.serving.engine import Served
from dparallel.serving.errors import RequestError
from tests.dparallel.serving.conftest import Running, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDLESS = {"model": "endless", "prompt": [7, 8]}
Wait = Callable[[Callable[[], bool]], None]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt: required key is missing"),
        ({"prompt": 5}, "prompt", "prompt"),
        ({"prompt": []}, None, "got []"),
        ({"prompt": ["a", 5]}, "prompt", "prompt: give a text, its token ids, or a list of at least one of "),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than 0"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "top_p": 2}, "top_p", "less than or equal to 1"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "a", "stream_mode": "canvas"}, None, "without stream: give stream: true"),
        ({"prompt": "a", "stop_at_eos": "no"}, "stop_at_eos", "valid boolean"),
        ({"prompt": "a", "suppress_eos": 1}, "suppress_eos", "valid boolean"),
        ({"prompt": "a", "stop": [""]}, "stop", "empty"),
        ({"prompt": "a", "n": 0}, "n", "greater than 0"),
        ({"prompt": "a", "n": 1000}, "n", "at most 68 in"),
        ({"prompt": "a", "treshold": 0.5}, "treshold", "did you mean 'threshold'"),
        ({"prompt": "a", "cfg_scale": 1.5}, "cfg_scale", "cfg_scale: classifier-free guidance"),
        ({"prompt": "a", "temperature": 1, "top_k": -1}, "top_k", "greater than 0"),
        ({"prompt": "a", "rule": "entrop"}, "rule", "did you mean 'entropy'"),
        ({"prompt": "a", "rule": "learned", "threshold": 0.5}, None, "learned"),
        ({"prompt": "a", "mode": "autoregressive"}, None, "with a model"),
        ({"prompt": "a", "compile": True}, "compile", "unknown key"),
        ({"prompt": "a", "gen_length": 10, "block_length": 4}, None, "not divisible"),
        ({"prompt": "a", "threshold": [1]}, "threshold", "threshold"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"prompt": "a", "echo": True}, "echo", "not supported"),
        ({"prompt": "a", "max_tokens": 64}, "prompt", "at most 64 fit together"),
        ({"prompt": [1]}, None, "the mask 1"),
        ({"prompt": [50]}, None, "valid ids are 0 to 49"),
        ({"prompt": [-1]}, None, "valid ids are 0 to 49"),
        ({"prompt": "a\0b"}, "prompt", "null character"),
    ],
)
def test_what_cannot_be_answered_is_said(
    client: httpx.Client, body: dict[str, Any], param: str | None, words: str
) -> None:
    error = error_of(client.post(COMPLETIONS, json={"model": "tiny", **body}), 400)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param in (None, error["param"])


TEXT_PART = {"type": "text", "text": "Tom ?"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least 1"),
        ("hello", "list"),
        ([5], "messages.0: Input should be an object, got 5"),
        ([{"role": "user", "content": 5}], "messages.0.content: Input should be a valid string, got 5"),
        ([{"role": "user", "content": {}}], "messages.0.content: Give a text, or a list of its parts"),
        ([{"role": "king", "content": "a"}], "known: system"),
        ([{"role": "user"}], "content"),
        (
            [{"role": "user", "content": [TEXT_PART, {"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.1: a part of type='image_url' is not supported: give text as {type: text, ",
        ),
        ([{"role": "user", "content": [TEXT_PART | {"text": 5}]}], "messages.0.content.0.text: Input"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages.0.content.0.type: required key is miss"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}], "tool_calls"),
    ],
)
def test_conversations_that_cannot_be_read(client: httpx.Client, messages: Any, words: str) -> None:
    body = {"model": "tiny", "messages": messages}
    assert words in error_of(client.post(CHAT, json=body), 400)["message"]


def test_values_without_effect_are_taken(client: httpx.Client) -> None:
    body = {"prompt": "Tom ?", "model": "tiny", "max_tokens": 2, "temperature": 0, "top_p": 0.9, "user": "x"}
    body |= {"top_k": 5}
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "stop": None}
    assert client.post(COMPLETIONS, json={**body, **neutral}).status_code == 200
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Tom "}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "gets", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "name": "Ann", "content": "?"},
    ]
    body = {"model": "tiny", "messages": turns, "max_completion_tokens": 2, "top_logprobs": 0}
    assert client.post(CHAT, json=body).json()["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"a"', b"NaN", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_what_is_no_object_of_json(client: httpx.Client, raw: bytes) -> None:
    answer = client.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
    error_of(answer, 400)


TEXT = st.text("ab\0é", max_size=5)  # an alphabet of all characters takes seconds to build
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=3,
)
NAMES = st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields]) | TEXT


@given(body=st.dictionaries(NAMES, JSON, max_size=5), kind=st.sampled_from([ChatBody, CompletionBody]))
def test_any_body_is_a_request_or_an_error_of_one_line(body: dict[str, Any], kind: Any) -> None:
    raw = json.dumps(body).encode()
    try:
        parsed = parse(kind, raw)
    except RequestError as error:
        refused = error
    else:
        assert isinstance(parsed, kind)
        return
    assert refused.status == 400
    assert refused.message
    assert not any(word in refused.message for word in ("\n", "function-", "instance of"))


def test_other_paths_methods_models_and_types(client: httpx.Client) -> None:
    assert "/v1/models" in error_of(client.get("/v2/models"), 404)["message"]
    wrong = client.get(COMPLETIONS)
    assert error_of(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"
    body = {"prompt": "a", "model": "gpt"}
    assert error_of(client.post(COMPLETIONS, json=body), 404)["code"] == "model_not_found"
    assert "tiny, endless" in error_of(client.post(COMPLETIONS, json={"prompt": "a"}), 404)["message"]
    error_of(client.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}), 415)
    error_of(client.get("/v1/models/gpt"), 404)
    error_of(client.delete("/v1/requests/none"), 404)


def test_models_health_and_measurements(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "endless"]
    assert client.get("/v1/models/tiny").json()["decoding"]["threshold"] == 0.5
    assert client.get("/health").json()["status"] == "ok"
    client.post(COMPLETIONS, json={"model": "tiny", "prompt": "Tom ?"})
    text = client.get("/metrics").text
    assert f'dparallel_requests_total{{endpoint="{COMPLETIONS}",status="200"}}' in text
    for name in ("tokens_total", "nfe_total", "running", "waiting", "time_to_first_token_seconds_count"):
        assert f"\ndparallel_{name} " in text


def test_a_client_that_disconnects_frees_its_row(server: Running, until: Wait) -> None:
    """Both in a stream and while it waits for the whole answer."""
    for stream in (False, True):
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: server.engine.running == 1)
        before = server.engine.forwards
        until(lambda: server.engine.running == 0)
        assert server.engine.forwards - before < 500  # of 1,024


def test_a_request_is_cancelled_by_its_id(server: Running, client: httpx.Client, until: Wait) -> None:
    answers = []

    def ask() -> None:
        with server.client() as own:
            answers.append(own.post(COMPLETIONS, json=ENDLESS, headers={"x-request-id": "mine"}))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.engine.running == 1)
    assert client.delete("/v1/requests/mine").json()["cancelled"]
    thread.join(60)
    assert error_of(answers[0], 409)["code"] == "cancelled"
    assert answers[0].headers["x-should-retry"] == "false"

    canvas = {"stream": True, "stream_mode": "canvas"}  # a chunk after every forward pass
    with client.stream("POST", COMPLETIONS, json={**ENDLESS, **canvas}) as answer:
        lines = answer.iter_lines()
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        assert answer.headers["x-request-id"] == name
        with server.client() as other:
            other.delete(f"/v1/requests/{name}")
        said = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert said[-1]["error"]["code"] == "cancelled"
    until(lambda: server.engine.running == 0)


def test_requests_are_limited_in_size_and_time(endless: Served) -> None:
    limits = {"body_bytes": 200, "body_seconds": 0.3, "context": 32, "timeout": 0.5, "heartbeat": 0.1}
    headers = {"content-type": "application/json"}

    def slow() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    with serving(endless, **limits) as server, server.client() as client:
        error_of(client.post(COMPLETIONS, json={"prompt": [5] * 100}), 413)
        parts = (b"[" for _ in range(201))  # without content-length
        error_of(client.post(COMPLETIONS, content=parts, headers=headers), 413)
        error_of(client.post(COMPLETIONS, content=slow(), headers=headers), 408)
        body = {"prompt": [5] * 20, "max_tokens": 20}
        assert error_of(client.post(COMPLETIONS, json=body), 400)["code"] == "context_length_exceeded"
        body = {"prompt": [5], "gen_length": 31, "block_length": 31, "steps": 1}
        assert client.post(COMPLETIONS, json=body).status_code == 200


def test_responses_are_limited_in_time(endless: Served) -> None:
    with serving(endless, timeout=0.5, heartbeat=0.1) as server, server.client() as client:
        assert error_of(client.post(COMPLETIONS, json={"prompt": [5]}), 504)["code"] == "timeout"
        with client.stream("POST", COMPLETIONS, json={"prompt": [5], "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert 'dparallel_failed_responses_total{reason="timeout"} 2.0' in client.get("/metrics").text


def test_a_full_queue_says_when_to_come_again(endless: Served, until: Wait) -> None:
    with serving(endless, batch_size=1, queue=1) as server, server.client() as client:

        def ask() -> None:
            with server.client() as own:
                own.post(COMPLETIONS, json={"prompt": [5]}, headers={"x-request-id": "all"})

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: server.engine.running == 1 and server.engine.waiting == 1)
        refused = client.post(COMPLETIONS, json={"prompt": [5]})
        assert error_of(refused, 429)["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        client.delete("/v1/requests/all")
        for thread in threads:
            thread.join(60)
        never = client.post(COMPLETIONS, json={"prompt": [5], "n": 3})  # more than row and queue hold
        assert "are 3 responses: ask for at most 2" in error_of(never, 400)["message"]


def test_a_server_drains_before_it_ends(endless: Served, until: Wait) -> None:
    """Accepted requests are answered, those that wait as well; the address takes no others."""
    answers = []
    short = {"prompt": [5], "gen_length": 48, "block_length": 48, "steps": 48}
    with serving(endless, batch_size=1) as server:

        def ask(body: dict[str, Any]) -> None:
            with server.client() as own:
                answers.append(own.post(COMPLETIONS, json=body))

        threads = [
            threading.Thread(target=ask, args=[body]) for body in ({"prompt": [5]}, short, short, short)
        ]
        threads[0].start()
        until(lambda: server.engine.running == 1)
        for thread in threads[1:]:  # these wait while the first one's 1,024 forward passes take the row
            thread.start()
        until(lambda: server.engine.waiting == 3)
        server.server.should_exit = True
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 4
    with server.client() as client, pytest.raises(httpx.ConnectError):
        client.get("/health")


def test_a_key_is_asked_for(teacher: Served) -> None:
    with serving(teacher, key="secret") as server, server.client() as client:
        assert client.get("/health").status_code == 200
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer secret "[:-2]}):
            assert error_of(client.get("/v1/models", headers=header), 401)["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200

"""Programs that others wrote for OpenAI's API: its own client, lm-eval, and a process that is terminated."""

import asyncio
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dparallel.cli.main import main
from dparallel.completion import complete
from dparallel.models.defaults import write_defaults
from dparallel.serving.engine import Served
from tests.conftest import ROOT
from tests.dparallel.serving.conftest import TEACHER, TEMPLATE, Running, serving

PUZZLE = "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
TURNS: Any = [{"role": "user", "content": PUZZLE}]
HAS_OPENAI = importlib.util.find_spec("openai") is not None
HAS_LM_EVAL = all(importlib.util.find_spec(name) for name in ("lm_eval", "tenacity"))
needs_openai = pytest.mark.skipif(not HAS_OPENAI, reason="the client openai is missing")
needs_lm_eval = pytest.mark.skipif(
    not HAS_LM_EVAL, reason="lm-eval is missing, or tenacity, of which its clients are made"
)
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture
def answer(teacher: Served) -> str:
    """The teacher's answer to the chat, whose template adds a space."""
    [alone] = complete(teacher.model, teacher.tokenizer, [f"{PUZZLE} "], TEACHER)
    return alone.text


@pytest.fixture
def openai(server: Running) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


@needs_openai
def test_openais_client(openai: Any, answer: str) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny", "endless"]
    chat = openai.chat.completions.create(
        model="tiny", messages=TURNS, temperature=0, logprobs=True, extra_body={"threshold": 0.5}
    )
    assert chat.choices[0].message.content == answer
    assert chat.choices[0].finish_reason == "stop"
    assert chat.choices[0].logprobs.content[0].logprob <= 0
    assert chat.usage.nfe > 0
    assert chat.usage.tokens_per_forward == chat.usage.completion_tokens / chat.usage.nfe
    text = openai.completions.create(model="tiny", prompt=f"{PUZZLE} ", max_tokens=3).choices[0]
    assert answer.startswith(text.text)
    assert text.finish_reason == "length"


@needs_openai
def test_openais_client_streams(openai: Any, answer: str) -> None:
    with openai.chat.completions.create(model="tiny", messages=TURNS, stream=True) as stream:
        parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.delta.content or "" for part in parts) == answer
    assert parts[-1].finish_reason == "stop"


@needs_openai
def test_openais_client_knows_our_errors(openai: Any) -> None:
    import openai as library

    with pytest.raises(library.BadRequestError) as refused:
        openai.chat.completions.create(model="tiny", messages=TURNS, extra_body={"treshold": 0.5})
    assert refused.value.param == "treshold"
    with pytest.raises(library.NotFoundError) as unknown:
        openai.completions.create(model="gpt", prompt="a")
    assert unknown.value.code == "model_not_found"


@needs_openai
def test_openais_async_client(server: Running, answer: str, until: Wait) -> None:
    import openai

    async def everything() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            chats = [client.chat.completions.create(model="tiny", messages=TURNS) for _ in range(8)]
            whole = [chat.choices[0].message.content or "" for chat in await asyncio.gather(*chats)]
            parts = []
            async for chunk in await client.chat.completions.create(
                model="tiny", messages=TURNS, stream=True, extra_body={"stream_mode": "canvas"}
            ):
                parts.append(chunk.choices[0].delta.content or "")
            left = await client.completions.create(model="endless", prompt="Tom", stream=True)
            await left.close()
            return whole, "".join(parts)

    whole, streamed = asyncio.run(everything())
    assert whole == [answer] * 8
    assert streamed == answer
    until(lambda: server.engine.running == 0)


LM_EVAL = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 36}
metric_list: [{metric: exact_match}]
"""


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_evals_chats(server: Running, teacher: Served, tmp_path: Path) -> None:
    """Half of the references are the teacher's own answers."""
    import lm_eval

    questions = [f"{name} 7 coins buys 2 loses 1 finds 1 . . ?" for name in ("Tom", "Ann", "Sam", "Eva")]
    alone = complete(teacher.model, teacher.tokenizer, [f"{text} " for text in questions], TEACHER)
    answers = [one.text for one in alone[:2]] + ["wrong", "wrong"]
    rows = [{"question": text, "answer": one} for text, one in zip(questions, answers, strict=True)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(LM_EVAL.replace("FILE", str(data)), encoding="utf-8")
    measured = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": "tiny", "base_url": f"{server.url}/v1/chat/completions", "num_concurrent": 2},
        tasks=["sums"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert measured["results"]["sums"]["exact_match,none"] == 0.5


@pytest.mark.slow
def test_the_command_serves_and_drains_on_sigterm(tmp_path: Path) -> None:
    """The request that is decoded when the signal comes is answered; the checkpoint's defaults are said."""
    model = shutil.copytree(ROOT / "teachers" / "tiny", tmp_path / "model")
    write_defaults(model, {"gen_length": 36, "block_length": 18, "rule": "confidence", "threshold": 0.8})
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    command = [sys.executable, "-m", "dparallel", "serve", "--model", str(model)]
    command += [
        "--served-name",
        "tiny",
        "--port",
        "0",
        "--chat-template",
        "chat.jinja",
        "--api-key-file",
        "key",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=tmp_path)
    assert process.stderr is not None
    try:
        said_first = next(process.stderr)
        assert said_first.startswith(
            "Decoding with the checkpoint's decode defaults gen_length 36, block_length 18, rule confidence, "
        )
        line = next(line for line in process.stderr if line.startswith("Serving "))
        url = line.split(" on ")[1].strip()
        headers = {"authorization": "Bearer secret"}
        steps = {"gen_length": 48, "block_length": 48, "rule": "steps", "steps": 48, "stop_at_eos": False}
        body = {"model": "tiny", "messages": TURNS, "stream": True, "stream_mode": "canvas", **steps}
        with (
            httpx.Client(timeout=60, trust_env=False, headers=headers) as client,
            client.stream("POST", f"{url}/chat/completions", json=body) as stream,
        ):
            [listed] = client.get(f"{url}/models").json()["data"]
            assert (listed["decoding"]["block_length"], listed["decoding"]["threshold"]) == (18, 0.8)
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert process.wait(60) == 0
        assert "All accepted requests are answered." in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compile"], "--compile with dparallel serve"),
        (["--rule", "nonsense"], "unknown rule"),
        (["--served-name", "a", "--served-name", "b"], "2 --served-name for 1 --model"),
        (["--mode", "autoregressive"], "with a model"),
        (["--rule", "learned", "--threshold", "0.5"], "learned"),
        (["--host", "256.1.1.1"], "--host 256.1.1.1"),
        (["--api-key-file", "none"], "--api-key-file none: "),
        (["--chat-template", "none"], "--chat-template none: "),
        (["--model", "MODEL"], "two models are called 'tiny'"),
    ],
)
def test_options_that_cannot_be_used(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "teachers" / "tiny")
    given = [path if option == "MODEL" else option for option in options]
    assert main(["serve", "--model", path, "--port", "0", *given]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dparallel serve: error: ")
    assert message in line


def test_missing_libraries_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dparallel.cli.serve.LIBRARIES", ("fastapi", "no_such_library"))
    assert main(["serve", "--model", "any"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("no_such_library is not installed: pip install 'dparallel[serve]'")


def test_a_port_that_is_taken(teacher: Served, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(teacher) as server:
        port = server.url.rpartition(":")[2]
        assert main(["serve", "--model", str(ROOT / "teachers" / "tiny"), "--port", port]) == 2
    assert f"--port {port}: " in capsys.readouterr().err

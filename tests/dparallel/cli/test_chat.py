"""`dparallel chat`, with a tiny random model whose tokenizer has a chat template."""

import io
import os
import signal

import pytest

from dparallel import DecodingConfig, generate, load_model, load_tokenizer, save_model
from dparallel.cli.chat import ChatError, converse
from dparallel.cli.main import main
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model

TEMPLATE = """
{%- for each in messages %}{{ 'Tom' if each.role == 'user' else 'Ann' }} {{ each.content }} {% endfor -%}
{%- if add_generation_prompt %}Ann{% endif -%}
"""
SHAPE = ["--gen-length", "8", "--block-length", "8"]


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chat_checkpoint")
    save_model(random_model(1), folder, tokenizer=tokenizer)
    return folder


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_each_turn_sees_the_turns_before(chat_checkpoint, monkeypatch, capsys):
    model, tokenizer = load_model(chat_checkpoint), load_tokenizer(chat_checkpoint)

    def answer(text: str) -> str:
        [one] = generate(model, [tokenizer.encode(text)], DecodingConfig(gen_length=8, block_length=8))
        return tokenizer.decode(one.tokens[: one.num_tokens], skip_special_tokens=True)

    first = answer("Tom has 3 Ann")
    second = answer(f"Tom has 3 Ann {first} Tom buys 2 Ann")
    anew = answer("Tom buys 2 Ann")
    assert second != anew, "the history must matter"
    type_in(monkeypatch, "has 3", "", "buys 2", "/reset", "buys 2", "/exit", "never read")
    assert main(["chat", "--model", str(chat_checkpoint), *SHAPE]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [first, second, anew]
    assert err.count("NFE") == 3


def test_a_conversation_over_the_limit_keeps_what_was_said(chat_checkpoint, monkeypatch, capsys):
    type_in(monkeypatch, "has 3", "1 " * 60, "buys 2", "/reset", "has 3")
    assert main(["chat", "--model", str(chat_checkpoint), *SHAPE]) == 0
    out, err = capsys.readouterr()
    [error] = [line for line in err.splitlines() if "takes at most" in line]
    assert "takes at most 56" in error
    assert "this turn was dropped" in error
    assert "/reset" in error
    type_in(monkeypatch, "has 3", "buys 2", "/reset", "has 3")
    main(["chat", "--model", str(chat_checkpoint), *SHAPE])
    assert capsys.readouterr().out == out, "as if the long turn had never been typed"


def test_interrupting_an_answer_drops_its_turn_alone(monkeypatch, capsys):
    seen = []
    # A shell's background job starts with the signal ignored; a person's terminal does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def respond(messages):
        seen.append([each["content"] for each in messages])
        if messages[-1]["content"] == "long":
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
        return "answer"

    type_in(monkeypatch, "hello", "long", "again")
    try:
        converse(respond)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [["hello"], ["hello", "answer", "long"], ["hello", "answer", "again"]]
    assert "Interrupted" in capsys.readouterr().err


def test_a_failed_turn_is_dropped(monkeypatch, capsys):
    seen = []

    def respond(messages):
        seen.append(len(messages))
        if len(seen) == 1:
            raise ChatError("no room")
        return "answer"

    type_in(monkeypatch, "one", "two", "three")
    converse(respond)
    assert seen == [1, 1, 3]
    assert "no room" in capsys.readouterr().err


def test_no_chat_template_names_the_remedy(tiny_checkpoint, capsys):
    assert main(["chat", "--model", str(tiny_checkpoint)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no chat template" in error
    assert "dparallel generate --prompt" in error


def test_bytes_that_are_no_text_drop_their_line_alone(chat_checkpoint, monkeypatch, capsys):
    """In any locale: Python reads invalid bytes as surrogates in a locale like C, and raises in others."""
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"has 3\nTom \xff\nbuys 2\n"), encoding="ascii")
    )
    assert main(["chat", "--model", str(chat_checkpoint), *SHAPE]) == 0
    out, err = capsys.readouterr()
    [error] = [line for line in err.splitlines() if "UTF-8" in line]
    assert error.startswith("this line is not a text in UTF-8 (")
    assert error.endswith("; this turn was dropped")
    type_in(monkeypatch, "has 3", "buys 2")
    main(["chat", "--model", str(chat_checkpoint), *SHAPE])
    assert capsys.readouterr().out == out, "as if the line had never been typed"

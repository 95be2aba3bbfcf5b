"""`dparallel generate`, run in this process as a user would."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dparallel import DecodingConfig, generate, load_model, load_tokenizer, save_model
from dparallel.cli import decoding_arguments
from dparallel.cli.main import main
from dparallel.problems.prompts import finish
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.cli.commands import PROMPT, SHAPE, refused, write_lines

DECODING = DecodingConfig(gen_length=24, block_length=8, threshold=1.5)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def decoded(checkpoint: Path, prompts: list[str]) -> list[tuple[str, int, int]]:
    """Response, NFE and number of tokens as the library gives them."""
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    generations = generate(model, [tokenizer.encode(prompt) for prompt in prompts], DECODING)
    ends = model.config.end_token_ids
    return [(finish(each.tokens, tokenizer, ends), each.nfe, each.num_tokens) for each in generations]


def run_on_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code, and what a terminal as stdout received."""
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 65536):
                received.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        code = main(arguments)
        monkeypatch.undo()
    reader.join()
    os.close(ours)
    return code, b"".join(received).decode()


def test_a_pipe_gets_the_text_alone(tiny_checkpoint, capsys):
    assert main(["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE]) == 0
    out, err = capsys.readouterr()
    [(response, nfe, num_tokens)] = decoded(tiny_checkpoint, [PROMPT])
    assert out == response + "\n"
    assert f"NFE {nfe} | TPF {num_tokens / nfe:.2f} | TPS " in err
    assert f"({num_tokens} tokens in " in err
    assert "on cpu, batch size 1)" in err


def test_stop_texts_end_responses_of_both_kinds_of_prompts(tiny_checkpoint, capsys, tmp_path):
    [(response, nfe, _)] = decoded(tiny_checkpoint, [PROMPT])
    stop = response.split()[2]
    arguments = [
        "generate",
        "--model",
        str(tiny_checkpoint),
        *SHAPE,
        "--stop",
        stop,
        "--stop",
        "no such text",
    ]
    assert main([*arguments, "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == response.partition(stop)[0] + "\n"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n", encoding="utf-8")
    assert main([*arguments, "--prompts", str(tmp_path / "prompts.jsonl")]) == 0
    [result] = map(json.loads, capsys.readouterr().out.splitlines())
    assert result["response"] == response.partition(stop)[0]
    assert result["nfe"] < nfe
    with pytest.raises(SystemExit):
        main([*arguments, "--prompt", PROMPT, "--stop", ""])
    assert "an empty text would end every response: drop it" in capsys.readouterr().err


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def test_a_terminal_sees_the_canvas_fill(tiny_checkpoint, terminal):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE]
    code, text = run_on_terminal(arguments, terminal)
    assert code == 0
    assert "·" in text, "masks are drawn at first"
    colours = set(re.findall(r"38;[25];[\d;]+", text))
    assert len(colours) > 2, "tokens committed at different steps differ in colour"
    [(response, _, _)] = decoded(tiny_checkpoint, [PROMPT])
    words = ESCAPE.sub("", text).split()
    assert words[-len(response.split()) :] == response.split(), "the last frame is the response alone"


@pytest.mark.parametrize("plain", ["--plain", "NO_COLOR", "TERM"])
def test_plain_terminals_get_no_escape_codes(tiny_checkpoint, terminal, plain):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE]
    if plain == "--plain":
        arguments.append("--plain")
    else:
        terminal.setenv(plain, {"NO_COLOR": "1", "TERM": "dumb"}[plain])
    code, text = run_on_terminal(arguments, terminal)
    assert code == 0
    assert "\x1b" not in text
    [(response, _, _)] = decoded(tiny_checkpoint, [PROMPT])
    assert text.split() == response.split()


def test_the_text_ends_at_the_first_end_of_text(tmp_path, capsys):
    """Also if decoding continues after it, as in the published loops."""
    model, tokenizer = random_model(1), build_tokenizer()
    save_model(model, tmp_path, tokenizer=tokenizer)
    decoding = DecodingConfig(gen_length=24, block_length=8, threshold=1.5, stop_at_eos=False)
    candidates = [f"{first} {second}" for first in ("Tom", "Ann", "Sam") for second in range(10)]
    generations = generate(model, [tokenizer.encode(prompt) for prompt in candidates], decoding)
    longer = [
        (prompt, one)
        for prompt, one in zip(candidates, generations, strict=True)
        if set(one.tokens[one.num_tokens :]) - {tokenizer.eos_token_id}
    ]
    prompt, one = longer[0]
    assert main(["generate", "--model", str(tmp_path), "--prompt", prompt, *SHAPE, "--no-stop-at-eos"]) == 0
    assert capsys.readouterr().out == tokenizer.decode(one.tokens[: one.num_tokens - 1]) + "\n"


def test_a_file_of_prompts(tiny_checkpoint, tmp_path, capsys):
    """Input order and input fields are kept, rows equal the library's, totals are summed before dividing."""
    prompts = [PROMPT, "Ann 3 pens wins 2 ?", "?", "Eva 5 hats loses 3 buys 2 wins 1 . . ?"]
    records = [{"id": str(i), "question": each, "n": [i]} for i, each in enumerate(prompts)]
    lines = [json.dumps(record) for record in records]
    file = write_lines(tmp_path / "in.jsonl", lines[0], "", *lines[1:], "")
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompts", str(file), *SHAPE]
    arguments += ["--prompt-field", "question", "--batch-size", "3"]

    assert main([*arguments, "--out", str(tmp_path / "out.jsonl")]) == 0
    printed, err = capsys.readouterr()
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = decoded(tiny_checkpoint, prompts)
    assert found == [
        {**record, "response": response, "nfe": nfe, "num_tokens": count}
        for record, (response, nfe, count) in zip(records, expected, strict=True)
    ]
    nfe, count = sum(each[1] for each in expected), sum(each[2] for each in expected)
    assert f"NFE {nfe / 4:.4g} | TPF {count / nfe:.2f} | TPS " in err
    assert "batch size 3)" in err
    assert "/4 prompts" in err
    assert "\x1b" not in err
    assert printed == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]

    assert main(arguments) == 0
    assert capsys.readouterr().out == (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_prompts_from_stdin(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    content = "\ufeff" + json.dumps({"prompt": PROMPT, "note": "→"}, ensure_ascii=False) + "\n"
    file = tmp_path / "in.jsonl"
    file.write_text(content, encoding="utf-8")
    arguments = ["generate", "--model", str(tiny_checkpoint), *SHAPE, "--prompts"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode()), encoding="ascii"))
    assert main([*arguments, "-"]) == 0
    from_stdin = capsys.readouterr().out
    assert main([*arguments, str(file)]) == 0
    assert capsys.readouterr().out == from_stdin
    for content, message in (
        (b"{\n", "stdin, line 1: not JSON"),
        (b"\xff", "--prompts -: not a text file in UTF-8"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
        assert message in refused([*arguments, "-"], capsys)


def test_one_prompt_and_a_file_of_prompts_give_the_same_text(tmp_path, capsys):
    """Also if special tokens are decoded, within a response and at its end."""
    tokenizer = build_tokenizer()
    model = random_model(1)
    with torch.no_grad():  # special tokens are likely
        model.lm_head.weight[[0, 2, 3]] *= 3
    save_model(model, tmp_path, tokenizer=tokenizer)
    prompts = [f"{name} {number}" for name in ("Tom", "Ann", "Sam") for number in range(4)]
    file = write_lines(tmp_path / "in.jsonl", *(json.dumps({"prompt": prompt}) for prompt in prompts))
    arguments = ["generate", "--model", str(tmp_path), *SHAPE]
    assert main([*arguments, "--prompts", str(file)]) == 0
    together = [json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()]
    assert any("<" in response for response in together), "special tokens are among them"
    for prompt, response in zip(prompts, together, strict=True):
        assert main([*arguments, "--prompt", prompt]) == 0
        assert capsys.readouterr().out == response + "\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dparallel {version('dparallel')}\n"


def test_a_bug_keeps_its_traceback(tiny_checkpoint, monkeypatch):
    """A ValueError that is not a user's error keeps its traceback."""

    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("dparallel.cli.model.generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE])


def test_every_decoding_field_is_a_flag(tiny_checkpoint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    for field, info in DecodingConfig.model_fields.items():
        flag = f"--{field.replace('_', '-')}"
        assert flag in help_text
        if info.annotation is bool:
            assert f"--no-{flag[2:]}" in help_text

    model = load_model(tiny_checkpoint)
    tokens = load_tokenizer(tiny_checkpoint).encode(PROMPT)
    for flags, changed in (
        (["--no-stop-at-eos"], {"stop_at_eos": False}),
        (["--mode", "multi_block", "--cache", "dual", "--refresh-every", "3"], None),
        (
            ["--temperature", "1", "--seed", "3", "--top-p", "0.9"],
            {"temperature": 1, "seed": 3, "top_p": 0.9},
        ),
    ):
        changed = changed or {"mode": "multi_block", "cache": "dual", "refresh_every": 3}
        assert main(["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE, *flags]) == 0
        [one] = generate(model, [tokens], DecodingConfig(**{**DECODING.model_dump(), **changed}))
        assert f"NFE {one.nfe} | TPF {one.num_tokens / one.nfe:.2f} " in capsys.readouterr().err


def test_the_chat_template_is_applied_unless_raw(tmp_path, capsys):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for each in messages %}Tom has {{ each.content }} then{% endfor %}"
    save_model(random_model(), tmp_path, tokenizer=tokenizer)
    printed = {}
    for prompt, flags in (("7 coins", []), ("Tom has 7 coins then", ["--raw"]), ("7 coins", ["--raw"])):
        assert main(["generate", "--model", str(tmp_path), "--prompt", prompt, *SHAPE, *flags]) == 0
        printed[prompt, *flags] = capsys.readouterr().out
    assert printed[("7 coins",)] == printed["Tom has 7 coins then", "--raw"]
    assert printed[("7 coins",)] != printed["7 coins", "--raw"]


@pytest.mark.slow
def test_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "dparallel", "generate", "--model", "x"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("dparallel generate: error: ")


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_help_is_grouped_and_short(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What everyone needs comes first; every setting of decoding is in exactly one group."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 101
    assert lines[0].startswith(f"usage: dparallel {command} --model MODEL ")
    groups = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[0] == "options"
    assert groups[1] in ("what is decoded", "what is measured")
    places = [groups.index(name) for name in ("decoding", "sampling", "hardware")]
    assert places == sorted(places)
    shown = [*decoding_arguments.DECODING, *decoding_arguments.SAMPLING, *decoding_arguments.HARDWARE]
    assert sorted(shown) == sorted(DecodingConfig.model_fields)


def test_unknown_words_are_named(tiny_checkpoint, capsys, caplog, tmp_path):
    arguments = ["generate", "--model", str(tiny_checkpoint), *SHAPE]
    lines = [json.dumps({"prompt": text}) for text in ("Tom 7 bananas", "zebras ?", "more bananas")]
    file = write_lines(tmp_path / "in.jsonl", *lines)
    assert main([*arguments, "--prompts", str(file)]) == 0
    assert "the model does not know 3 words ('bananas', 'zebras', 'more') of the prompts" in caplog.text
    caplog.clear()
    assert main([*arguments, "--prompt", PROMPT]) == 0
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30)], ids=["one part", "the whole"])
def test_names_too_long_for_a_file(name, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_checkpoint)]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    for path in (name, f"/{name}"):
        for command in (
            ["eval", *model, "--protocol", path],
            ["eval", *model, "--protocol", "gsm8k_llada", "--path", path],
            ["compare", path, f"{path}b"],
            ["compare", "a", "b", "--out", path],
            ["clean", "--runs", path],
            ["clean", path, "--runs", str(tmp_path)],
            ["runs", "--runs", path],
            ["init", f"{path}.yaml"],
            ["init", "--from", path, "a.yaml"],
            ["plan", f"{path}.yaml"],
            ["generate", *model, "--prompts", path],
            ["generate", *model, "--prompts", "prompts.jsonl", "--out", path],
            ["generate", *model, "--prompt", "a", "--trace", f"{path}.html"],
            ["generate", "--model", path, "--prompt", "a"],
        ):
            assert command[0] in refused(command, capsys)

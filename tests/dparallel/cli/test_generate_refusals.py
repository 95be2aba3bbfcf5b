"""What `dparallel generate` refuses, each in one line."""

import json
import re
import shlex

import pytest
import torch

from dparallel import save_model
from dparallel.cli.main import main
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.cli.commands import PROMPT, SHAPE, refused, write_lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "-1"], r"--threshold: .*greater than or equal to 0, got -1"),
        (["--gen-length", "ten"], r"--gen-length: .*valid integer, got 'ten'"),
        (
            ["--gen-length", "25"],
            r"--gen-length=25 is not divisible by --block-length=8.*24; or give a --block-length .* as 5$",
        ),
        (["--rule", "best"], r"--rule: unknown rule='best'; known rules: .*entropy"),
        (
            ["--mode", "multiblock"],
            r"--mode: unknown value 'multiblock'; did you mean 'multi_block'\? known: ",
        ),
        (["--refresh-every", "4"], r"--refresh-every=4 has no effect .*multi_block"),
        (["--batch-size", "0"], r"--batch-size: '0': give a whole number of at least 1"),
        (["--device", "abacus"], r"device='abacus' cannot be used here .*; give one of cpu"),
        (
            ["--dtype", "float8"],
            r"--dtype: unknown value 'float8'; did you mean 'float32'\? known: auto, float32",
        ),
        (
            ["--treshold", "1"],
            r"generate: error: unknown option --treshold; did you mean --threshold\? see .* generate --help",
        ),
        (["--cfg-scale", "1.5"], r"unknown option --cfg-scale: classifier-free guidance .*leave it out"),
        (["--logits-eos-inf"], r"unknown option --logits-eos-inf: give --suppress-eos; see .*--help"),
        (["--early-stop"], r"unknown option --early-stop: .* is --stop-at-eos with --eos-fill immediate;"),
        (["--rule", "random"], r"--rule: unknown rule='random': .* not built in: give steps"),
        (["--top-k", "5"], r"--top-k=5 has no effect at temperature=0\.0"),
        (["--out", "x.jsonl"], r"--out x.jsonl takes the results of --prompts"),
        (["--trace", "/nowhere/trace.html"], r"--trace /nowhere/trace.html: /nowhere cannot be written to"),
        (["--trace", "."], r"--trace . is a folder; name a file in it"),
    ],
)
def test_bad_options_are_one_line(tiny_checkpoint, capsys, flags, message):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE, *flags]
    assert re.search(message, refused(arguments, capsys))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "--prompt: the prompt is empty"),
        ("1 " * 41, r"--prompt: .*has 41 tokens; with --gen-length=24 .* takes at most 40"),
        ("Tom <mask>", r"--prompt: .*holds token id 1; .*without the mask"),
        ("Tom \udc80", r"--prompt: .*surrogates not allowed"),
    ],
)
def test_bad_prompts_are_one_line(tiny_checkpoint, capsys, prompt, message):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", prompt, *SHAPE]
    assert re.search(message, refused(arguments, capsys))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt'", r"line 2: not JSON"),
        ("[1]", r"line 2: holds list, expected an object"),
        (
            '{"question": "?", "id": 3}',
            r"line 2: field 'prompt' is missing; its fields: question, id; .*--prompt-field",
        ),
        ('{"prompt": 3}', r"line 2: field 'prompt' is 3, not a text"),
        ('{"prompt": "?", "nfe": 3}', r"line 2: field 'nfe' would be overwritten .*rename"),
        ('{"prompt": ""}', r"line 2: the prompt is empty"),
        (json.dumps({"prompt": "1 " * 41}), r"line 2: .*takes at most 40"),
        (
            "\n".join(json.dumps({"prompt": "1 " * length}) for length in (41, 45, 43)),
            r"line 3: .*has 45 tokens.* is 16\)",
        ),
        ('{"prompt": "\\ud800"}', r"line 2: .*surrogates not allowed"),
    ],
)
def test_bad_lines_are_named(tiny_checkpoint, tmp_path, capsys, line, message):
    file = write_lines(tmp_path / "in.jsonl", '{"prompt": "?"}', line)
    out = tmp_path / "out.jsonl"
    arguments = [
        "generate",
        "--model",
        str(tiny_checkpoint),
        "--prompts",
        str(file),
        "--out",
        str(out),
        *SHAPE,
    ]
    error = refused(arguments, capsys)
    assert f"{file}, {'line 3' if 'line 3' in message else 'line 2'}: " in error
    assert re.search(message, error)
    assert not out.exists()


def test_bad_files_are_named(tiny_checkpoint, tmp_path, capsys):
    arguments = ["generate", "--model", str(tiny_checkpoint), *SHAPE, "--prompts"]
    assert "No such file" in refused([*arguments, str(tmp_path / "none.jsonl")], capsys)
    assert "Is a directory" in refused([*arguments, str(tmp_path)], capsys)
    empty = write_lines(tmp_path / "empty.jsonl", "", " ")
    assert "holds no prompt" in refused([*arguments, str(empty)], capsys)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe")
    assert "not a text file in UTF-8" in refused([*arguments, str(binary)], capsys)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        (["256"], "the largest valid --gen-length with --block-length=32 is 32"),
        (["256", "--block-length", "8"], "the largest valid --gen-length with --block-length=8 is 48"),
        (["64", "--block-length", "64"], "lower --gen-length and --block-length to at most 52"),
    ],
)
def test_too_long_a_response_names_the_largest_length(tiny_checkpoint, capsys, shape, remedy):
    """The canvas has 64 positions, and the prompt 12 tokens."""
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, "--gen-length", *shape]
    assert remedy in refused(arguments, capsys)


def test_bad_models_are_one_line(tmp_path, capsys):
    arguments = ["generate", "--prompt", "?", "--model"]
    assert "holds no config.json" in refused([*arguments, str(tmp_path)], capsys)
    for name in ("merging-b", "merging-a", "training-a"):
        (tmp_path / name).mkdir()
        if name.startswith("merging"):
            (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    models = f"models in it: {tmp_path / 'merging-a'}, {tmp_path / 'merging-b'}"
    assert models in refused([*arguments, str(tmp_path)], capsys)
    assert "none: no such folder" in refused([*arguments, str(tmp_path / "none")], capsys)
    copied = "copy it, such as by `aws s3 cp --recursive s3://bucket/model FOLDER`"
    assert copied in refused([*arguments, "s3://bucket/model"], capsys)
    assert "secret" not in refused([*arguments, "gs://name:secret@bucket/model"], capsys)
    damaged = random_model()
    with torch.no_grad():
        damaged.lm_head.weight[5] = torch.nan
    save_model(damaged, tmp_path, tokenizer=build_tokenizer())
    assert "NaN or infinite" in refused([*arguments, str(tmp_path), *SHAPE], capsys)


def test_no_command_and_no_prompt_are_one_line(capsys):
    assert "COMMAND" in refused([], capsys)
    line = refused(["generate", "--model", "x"], capsys)
    assert "nothing is decoded: give --prompt TEXT, --prompts FILE or --infill TEXT" in line


@pytest.mark.parametrize(
    ("shape", "fitting"),
    [
        ([], ["--gen-length", "32"]),
        (["--gen-length", "256", "--block-length=8"], ["--block-length=8", "--gen-length", "48"]),
        (["--block-length=64", "--gen-length=64"], ["--gen-length", "52", "--block-length", "52"]),
    ],
)
def test_too_long_a_response_comes_with_a_command_to_paste(tiny_checkpoint, capsys, shape, fitting):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT]
    line = refused([*arguments, *shape], capsys)
    command = shlex.split(line.partition("; this fits: ")[2])
    assert command == ["dparallel", *arguments, *fitting]
    assert main(command[1:]) == 0


def test_prompts_that_cannot_be_pasted_in_a_line_get_no_command(tiny_checkpoint, capsys):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", "Tom\n7 coins"]
    assert "this fits" not in refused(arguments, capsys)

"""Commands use the decode defaults of a checkpoint, and say so."""

import json
import shutil
from pathlib import Path

import pytest

from dparallel.cli.main import main
from dparallel.models.defaults import write_defaults
from dparallel.stages.generation_file import GENERATION
from tests.dparallel.cli.commands import PROMPT, SHAPE, refused

SETTINGS = {"gen_length": 24, "block_length": 8, "rule": "entropy", "threshold": 1.5}
CHOSEN = {"benchmark": "coins", "split": "validation"}


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    write_defaults(folder, SETTINGS, CHOSEN)
    return folder


def test_generate_decodes_as_the_checkpoint_says(tiny_checkpoint: Path, model: Path, capsys) -> None:
    assert main(["generate", "--model", str(tiny_checkpoint), "--prompt", PROMPT, *SHAPE]) == 0
    explicit = capsys.readouterr()
    assert "decode defaults" not in explicit.err
    assert main(["generate", "--model", str(model), "--prompt", PROMPT]) == 0
    found = capsys.readouterr()
    assert found.out == explicit.out
    assert found.err.splitlines()[0] == (
        "Decoding with the checkpoint's decode defaults gen_length 24, block_length 8, rule entropy, "
        f"threshold 1.5 ({model / GENERATION}, chosen on validation problems of coins)"
    )
    command = [
        "generate",
        "--model",
        str(model),
        "--prompt",
        PROMPT,
        "--gen-length",
        "16",
        "--rule",
        "factor",
    ]
    assert main(command) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("Decoding with the checkpoint's decode defaults block_length 8 (")


def test_options_that_do_not_go_with_them_are_named(model: Path, capsys) -> None:
    command = ["generate", "--model", str(model), "--prompt", PROMPT]
    line = refused([*command, "--gen-length", "20"], capsys)
    assert "--gen-length=20 is not divisible by --block-length=8" in line
    assert "; beside the checkpoint's decode defaults --block-length 8, rule entropy, threshold 1.5 (" in line
    write_defaults(model, {**SETTINGS, "rule": "psychic"}, CHOSEN)
    line = refused(command, capsys)
    assert f"{model / GENERATION} has decode defaults that this version of dparallel cannot use" in line
    assert main([*command, "--rule", "entropy"]) == 0
    capsys.readouterr()
    (model / GENERATION).write_text('{"dparallel": 1}', encoding="utf-8")
    assert 'has dparallel=1, expected an object: correct the key "dparallel"' in refused(command, capsys)


def test_eval_takes_what_neither_options_nor_the_protocol_say(model: Path, capsys) -> None:
    command = ["eval", "--model", str(model), "--protocol", "coins", "--limit", "4"]
    write_defaults(model, {**SETTINGS, "gen_length": 48, "threshold": 3.0}, CHOSEN)
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["of_checkpoint"] == {"rule": "entropy", "threshold": 3.0}
    assert (row["decoding"]["gen_length"], row["decoding"]["threshold"]) == (36, 3.0), "the task's own length"
    assert row["overridden"] == {}
    assert "coins: decoding with the checkpoint's decode defaults rule entropy, threshold 3 (" in err
    assert main([*command, "--threshold", "2"]) == 0
    out = capsys.readouterr().out
    assert "  of these   rule entropy are the checkpoint's decode defaults\n" in out
    assert "threshold 2.0 (default: 0.5)" in out
    assert main([*command, "--mode", "revising"]) == 0
    out = capsys.readouterr().out
    assert "mode revising (default: sequential)" in out
    assert "final_threshold 0.9," in out, "no default is named where the other mode has no such setting"


@pytest.mark.parametrize(
    ("defaults", "options", "blocks"),
    [
        ({"block_length": 36}, [], 36),  # divides the task's 36 tokens
        ({"gen_length": 60, "block_length": 18}, [], 18),
        ({"block_length": 36}, ["--block-length", "6"], 6),
        ({"block_length": 24}, [], 12),  # does not: the task's own
        ({"block_length": 36}, ["--gen-length", "24"], 12),
        ({"block_length": 8}, ["--gen-length", "24"], 8),
        ({"threshold": 0.3}, [], 12),
    ],
)
def test_eval_decodes_an_embedded_task_in_the_blocks_of_the_checkpoint(
    model: Path, capsys, defaults, options, blocks
) -> None:
    """A student that was trained for other blocks than the task's would be measured wrongly."""
    write_defaults(model, {**defaults, "rule": "entropy"}, CHOSEN)
    assert (
        main(["eval", "--model", str(model), "--protocol", "coins", "--limit", "2", "--json", *options]) == 0
    )
    assert json.loads(capsys.readouterr().out)["decoding"]["block_length"] == blocks


def test_chat_says_so_before_the_first_turn(model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dparallel.cli.chat.check_can_chat", lambda tokenizer: None)
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    assert main(["chat", "--model", str(model)]) == 0
    assert capsys.readouterr().err.startswith("Decoding with the checkpoint's decode defaults gen_length 24")

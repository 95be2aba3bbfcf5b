"""What `dparallel eval` refuses before any decoding, in one line."""

from pathlib import Path

import pytest

from dparallel.cli.main import main
from dparallel.models.checkpoints import save_model
from dparallel.problems.sandbox import confinement
from dparallel.problems.sandbox.run import check_sandbox
from dparallel.tiny.byte_level import byte_level
from tests.conftest import random_model
from tests.dparallel.cli.eval_made import SHAPE, command


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused before any decoding."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert not Path("runs").exists()
    return line.removeprefix("dparallel eval: error: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--protocol", "gsm8k_lada"],
            "--protocol gsm8k_lada: unknown; did you mean 'gsm8k_llada'? known: gsm8k_d2f, ",
        ),
        (["--protocol", "mine/gsm8k.yaml"], "mine/gsm8k.yaml: no such config file (looked in "),
        (["--path", "nowhere"], "gsm8k_llada: path=nowhere: no such file or folder (looked in "),
        (["--temperature", "0.5"], "gsm8k_llada: --temperature 0.5 without a seed: give --seed; "),
        (["--steps", "4"], "gsm8k_llada: steps=4 has no effect with rule='entropy': "),
        (["--set", 'rows="[8:]"'], "--limit 8 with rows=[8:] in --set: give one of them"),
        (
            ["--protocol", "gsm8k"],
            "--protocol gsm8k: unknown; did you mean 'gsm8k_d2f', 'gsm8k_dream', 'gsm8k_llada' or "
            "'gsm8k_llada_raw'? known: ",
        ),
        (["--protocol", "coin"], "--protocol coin: unknown; did you mean 'coins'? known: gsm8k_d2f, "),
        (["--protocol", "coins"], "coins: benchmark='coins' with path="),
        (["--set", "seed=1"], "gsm8k_llada: benchmark='dataset' with seed=1: it draws count problems; "),
        (
            ["--set", "protocol.scorers=[boxd]"],
            "gsm8k_llada: protocol.scorers: unknown scorer 'boxd'; did you mean 'boxed'? known: ",
        ),
        (["--set", 'protocol.stops=[""]'], "gsm8k_llada: protocol: stops holds an empty text"),
        (
            ["--gen-length", "16384"],
            "gsm8k_llada: problem gsm8k-0",
        ),
        (["--mode", "autoregressive"], "gsm8k_llada: mode='autoregressive' with a model that states no "),
        (["--model", "nowhere/at/all"], "nowhere/at/all: no such folder (looked in "),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    change: list[str], message: str, checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(checkpoint, data, *([] if change[0] == "--protocol" else ["gsm8k_llada"]))
    if change[0] == "--mode":
        arguments = arguments[: -len(SHAPE)]
    assert refused(capsys, [*arguments, *change]).startswith(message)


def test_what_the_machine_the_data_or_the_model_lack_is_named(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "solution": "2"}\n', encoding="utf-8")
    line = refused(capsys, command(checkpoint, tmp_path / "rows.jsonl", "gsm8k_llada"))
    assert "gsm8k_llada: " in line
    assert "no column 'answer'; its columns: question, solution" in line
    tokenizer = byte_level()
    tokenizer.chat_template = None
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    save_model(random_model(**shape, **ids), tmp_path / "base", tokenizer=tokenizer)
    line = refused(capsys, command(tmp_path / "base", data, "gsm8k_llada"))
    assert line.startswith("gsm8k_llada: ")
    assert "has no chat template" in line
    check_sandbox.cache_clear()
    confinement._bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(capsys, command(checkpoint, data, "gsm8k_llada", "humaneval_llada"))
    assert line.startswith(
        "humaneval_llada: generated code runs in bubblewrap, whose command bwrap is not on "
    )


def test_a_task_of_lm_eval_is_named_and_what_it_lacks_is_said(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--model", str(checkpoint), "--protocol", "lm_eval:gsm8k", "--limit", "8"]
    assert refused(capsys, arguments).startswith("lm_eval:gsm8k: ")
    line = refused(capsys, [*arguments, "--path", "here.jsonl"])
    assert "with lm_eval:gsm8k: tasks of lm-eval read files by split; give --set data_files.test=" in line
    assert "data_files" in line

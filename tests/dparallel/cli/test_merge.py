"""The command `dparallel merge`, and `generate --adapter`."""

import shutil
from pathlib import Path

import pytest
import torch

from dparallel import load_model
from dparallel.cli.main import main
from dparallel.models.defaults import write_defaults
from tests.conftest import random_model
from tests.dparallel.cli.commands import PROMPT, SHAPE, refused
from tests.dparallel.models.test_lora import trained_adapter


def test_a_merged_model_decodes_as_base_and_adapter(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trained_adapter(random_model()).save_pretrained(str(tmp_path / "adapter"))
    given = ["--model", str(tiny_checkpoint), "--adapter", str(tmp_path / "adapter")]
    out = tmp_path / "merged"
    assert main(["merge", *given, "--out", str(out), "--attention", "full"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: native format, float32; logits differ")
    ids = torch.tensor([[5, 6, 1, 1, 1]])
    with torch.no_grad():
        expected = load_model(tiny_checkpoint, "cpu", adapter=tmp_path / "adapter")(ids)
        assert torch.equal(load_model(out, "cpu")(ids), expected)
    texts = []
    for model in (given, ["--model", str(out)]):
        assert main(["generate", *model, "--prompt", PROMPT, *SHAPE, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert f"--out {out} is not empty" in refused(["merge", *given, "--out", str(out)], capsys)
    wrong = ["merge", *given[:2], "--adapter", str(out), "--out", str(tmp_path / "other")]
    assert "adapter_model.safetensors: no such file" in refused([*wrong], capsys)
    assert not (tmp_path / "other").exists()


def test_decode_defaults_of_the_base_model_do_not_count_with_an_adapter(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    write_defaults(base, {"rule": "entropy", "stop_at_eos": False})
    trained_adapter(random_model()).save_pretrained(str(tmp_path / "adapter"))
    given = ["generate", "--model", str(base), "--prompt", PROMPT, *SHAPE, "--device", "cpu"]
    assert main(given) == 0
    assert "decode defaults rule entropy" in capsys.readouterr().err
    assert main([*given, "--adapter", str(tmp_path / "adapter")]) == 0
    assert "decode defaults" not in capsys.readouterr().err

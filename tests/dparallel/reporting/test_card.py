"""Model cards, as `dparallel export` writes them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dparallel import load_model
from dparallel.cli.main import main
from dparallel.models.defaults import write_defaults
from tests.conftest import GOLDEN
from tests.dparallel.cli.commands import refused
from tests.dparallel.models.published import publish
from tests.dparallel.models.test_adapters import adapted


def test_a_card_has_the_defaults_and_the_table_of_a_run(
    tiny_checkpoint: Path, stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, model = tmp_path / "out", publish(tmp_path / "llada", "llada")
    write_defaults(model, {"gen_length": 64, "rule": "confidence", "threshold": 0.7})
    given = ["export", "--model", str(model), "--out", str(out)]
    assert main([*given, "--format", "original", "--run", str(stage), "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: README.md, backbone.py, config.json,")
    card = (out / "README.md").read_text(encoding="utf-8")
    table = (stage / "table.md").read_text(encoding="utf-8").strip()
    for part in (table, '"threshold": 0.7', "# llada\n", "Device: ", "Protocol: ", "mask token 255"):
        assert part in card
    assert str(tmp_path) not in card
    section = json.loads((out / "config.json").read_text(encoding="utf-8"))["dparallel"]
    assert section["decoding"]["rule"] == "confidence"
    assert load_model(out, "cpu").defaults.settings["threshold"] == 0.7
    assert f"--out {out} is not empty" in refused([*given, "--format", "native"], capsys)
    other = "`generate` of the model code here cannot"
    assert other not in card
    write_defaults(model, {"gen_length": 64, "mode": "multi_block"})
    again = tmp_path / "again"
    assert main(["export", "--model", str(model), "--out", str(again), "--format", "original"]) == 0
    assert other in (again / "README.md").read_text(encoding="utf-8")


def test_an_adapter_is_exported_alone_with_the_publishers_names(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = GOLDEN / "llada_tiny"
    folder = adapted("llada", tmp_path / "made", target_modules=["q_proj", "attn_out"])
    given = ["export", "--model", str(base), "--format", "adapter", "--out", str(tmp_path / "out")]
    assert "--format adapter writes an adapter alone: give --adapter" in refused(given, capsys)
    assert main([*given, "--adapter", str(folder / "adapter")]) == 0
    before, after = (
        load_file(at / "adapter_model.safetensors") for at in (folder / "adapter", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    load_model(base, "cpu", adapter=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "with full attention, for decoding in mode sequential or multi_block or revising;" in card
    assert "Nothing was measured" in card


@pytest.mark.parametrize("format", ["adapter", "original", "native", "llama"])
def test_the_attention_of_an_adapter_is_stated(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, out = publish(tmp_path / "llada", "llada"), tmp_path / "out"
    adapter = adapted("llada", tmp_path / "made", target_modules=["q_proj"]) / "adapter"
    given = ["export", "--model", str(model), "--format", format, "--out", str(out)]
    given += ["--attention", "block_causal"]
    assert "--attention is the pattern that an adapter was trained with: give --adapter" in refused(
        given, capsys
    )
    assert main([*given, "--adapter", str(adapter)]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "with block_causal attention, for decoding in mode pipelined;" in card
    assert "Decode defaults" not in card  # those built in are for full attention
    assert ("`generate` of the model code here cannot decode so" in card) == (format == "original")
    assert "dparallel merge" not in card  # the base states no pattern, so that it may be decoded in any
    if format in ("original", "native"):
        assert load_model(out, "cpu").config.attention_pattern == "block_causal"
    if format == "llama":
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert (config["dllm"]["attention"], config["is_causal"]) == ("block_causal", False)


def test_an_adapter_for_other_attention_than_the_base_states_is_merged_first(tmp_path: Path) -> None:
    model, out = publish(tmp_path / "llada", "llada"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "attention_pattern": "full"}), encoding="utf-8")
    adapter = str(adapted("llada", tmp_path / "made", target_modules=["q_proj"]) / "adapter")
    command = ["export", "--model", str(model), "--adapter", adapter, "--format", "adapter"]
    assert main([*command, "--out", str(out), "--attention", "block_causal"]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "dparallel merge --model MODEL --adapter FOLDER --attention block_causal --out MERGED" in card
    merging = ["merge", "--model", str(model), "--adapter", str(out), "--attention", "block_causal"]
    assert main([*merging, "--out", str(tmp_path / "merged")]) == 0
    assert load_model(tmp_path / "merged", "cpu").config.attention_pattern == "block_causal"

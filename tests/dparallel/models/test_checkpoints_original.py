"""Saving in the publisher's format reproduces the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dparallel import load_model, save_model
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.formats import CheckpointError
from tests.conftest import GOLDEN, random_model
from tests.dparallel.models.published import EXTRAS, INDEX, edit_json, publish


def tensors_by_file(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in folder.glob("*.safetensors")}


def assert_same_weights(actual: Path, expected: Path) -> None:
    """The same files, names, dtypes and bytes."""
    ours, theirs = tensors_by_file(actual), tensors_by_file(expected)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        assert ours[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert ours[file][name].dtype == tensor.dtype
            assert torch.equal(ours[file][name].view(torch.uint8), tensor.view(torch.uint8)), name
        with safe_open(actual / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_golden_checkpoints_survive(family: str, tmp_path: Path) -> None:
    golden = GOLDEN / f"{family}_tiny"
    names = save_model(load_model(golden, "cpu"), tmp_path, format="original")
    assert names == ["config.json", "model.safetensors"] == sorted(file.name for file in tmp_path.iterdir())
    assert_same_weights(tmp_path, golden)
    assert read(tmp_path / "config.json") == read(golden / "config.json")


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_published_checkpoints_survive_whole(family: str, tmp_path: Path) -> None:
    source, copy = publish(tmp_path / "source", family), tmp_path / "copy"
    names = save_model(load_model(source, "cpu"), copy, format="original")
    assert_same_weights(copy, source)
    assert set(names) == {file.name for file in source.iterdir()} - {"README.md"}
    for name in set(names) - tensors_by_file(copy).keys():
        if name in ("config.json", INDEX):
            assert read(copy / name) == read(source / name)
        else:
            assert (copy / name).read_bytes() == (source / name).read_bytes()
    assert EXTRAS.items() <= read(copy / "config.json").items()
    twice = tmp_path / "twice"  # loaded from our own copy
    save_model(load_model(copy, "cpu"), twice, format="original")
    assert_same_weights(twice, source)


def test_what_stands_beside_the_weights_is_handed_on(tmp_path: Path) -> None:
    source, copy = publish(tmp_path / "source", "dream"), tmp_path / "copy"
    handed_on = ["LICENSE", "NOTICE.txt", "preprocessor_config.json", "any.json", "tokenizer.tiktoken"]
    handed_on += ["chat_template.jinja", "additional_chat_templates/tools.jinja"]
    left = [
        "manifest.json",
        "stage.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        ".gitattributes",
    ]
    (source / "additional_chat_templates").mkdir()
    for name in (*handed_on, *left):
        (source / name).write_text(f'{{"content": "{name}"}}', encoding="utf-8")
    model = load_model(source, "cpu")
    names = save_model(model, copy, format="original")
    assert set(handed_on) <= set(names)
    assert not {*left, "README.md"}.intersection(names)
    for name in handed_on:
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    assert save_model(model, copy, format="original") == names  # into the same folder again
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()) == names


def test_stored_frequencies_are_not_read_but_handed_on(tmp_path: Path) -> None:
    """Old code stored tensors that are derived from rope_theta."""
    source, copy = publish(tmp_path / "source", "dream"), tmp_path / "copy"
    plain = load_model(source, "cpu")
    first = "model-00001-of-00003.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(source / first), name: torch.full((8,), 0.3)}, source / first, {"format": "pt"})
    edit_json(source / INDEX, weight_map={**read(source / INDEX)["weight_map"], name: first})
    edit_json(source / INDEX, metadata={"total_size": read(source / INDEX)["metadata"]["total_size"] + 32})
    model = load_model(source, "cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
    save_model(model, copy, format="original")
    assert_same_weights(copy, source)
    assert (copy / INDEX).read_bytes() == (source / INDEX).read_bytes()


def test_changed_weights_and_dtypes_are_what_is_written(tmp_path: Path) -> None:
    source, out = publish(tmp_path / "source", "dream"), tmp_path / "out"
    model = load_model(source, "cpu", torch.float32)
    with torch.no_grad():
        model.get_parameter("layers.1.feed_forward.up_proj.weight").fill_(0.25)
    save_model(model, out, format="original")
    written = {name: tensor for shard in tensors_by_file(out).values() for name, tensor in shard.items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert bool((written["model.layers.1.mlp.up_proj.weight"] == 0.25).all())
    assert read(out / "config.json") == {**read(source / "config.json"), "torch_dtype": "float32"}
    sizes = [read(folder / INDEX)["metadata"]["total_size"] for folder in (source, out)]
    assert sizes[1] == 2 * sizes[0]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(out, "cpu")(ids), model(ids))


@pytest.mark.parametrize("written_out", [True, False])
def test_a_tied_head_is_written_where_the_source_has_one(written_out: bool, tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "source")
    edit_json(source / "config.json", weight_tying=True)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    if written_out:
        tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    save_model(load_model(source, "cpu"), tmp_path / "out", format="original")
    assert_same_weights(tmp_path / "out", source)


def test_a_model_of_no_publisher_has_no_original_format(
    tiny_model: DiffusionTransformer, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"was not loaded from a checkpoint: .* give format='native'"):
        save_model(tiny_model, out, format="original")
    with pytest.raises(
        CheckpointError, match="tiny_checkpoint0, which is in our own format: load the published"
    ):
        save_model(load_model(tiny_checkpoint, "cpu"), out, format="original")
    with pytest.raises(
        ValueError, match="format='gguf' cannot be written; formats that can: native, original"
    ):
        save_model(tiny_model, out, format="gguf")
    model = load_model(publish(tmp_path / "gone", "dream"), "cpu")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        save_model(model, out, format="original")
    assert not out.exists()


def test_our_own_format_takes_a_dream_model_too(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "dream_tiny", "cpu")
    save_model(model, tmp_path)
    assert str(GOLDEN) not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = load_model(tmp_path, "cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = random_model(hidden_size=2**20, intermediate_size=2**21, num_hidden_layers=20)
    with pytest.raises(
        CheckpointError, match=r"needs 8\.8e\+05 GB on the disk of .*, which has [\d.e+]+ GB free"
    ):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_checkpoint_are_not_mixed_up_with_the_new_ones(tmp_path: Path) -> None:
    model = load_model(publish(tmp_path / "source", "llada"), "cpu")
    save_model(random_model(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out already holds model\.safetensors of another checkpoint"):
        save_model(model, tmp_path / "out", format="original")
    assert load_model(tmp_path / "out", "cpu").config.family == "tiny"
    before = tensors_by_file(tmp_path / "source")
    save_model(model, tmp_path / "source", format="original")  # onto itself
    assert {file: set(held) for file, held in before.items()} == {
        file: set(held) for file, held in tensors_by_file(tmp_path / "source").items()
    }

"""The file with a checkpoint's fitted commit rule."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from dparallel import DecodingConfig, generate, load_model, load_tokenizer, save_model
from dparallel.config.experiment import MergingConfig
from dparallel.models.commit_rule import read_commit_rule, write_commit_rule
from dparallel.models.formats import CheckpointError
from dparallel.rules.declaration import COMMIT_RULE
from dparallel.stages.manifest import Stage, fingerprint
from tests.dparallel.rules.fitted import random_commit_rule

DECODING = DecodingConfig(gen_length=12, block_length=6, rule="learned", threshold=0.5)


@pytest.mark.parametrize("hidden", [0, 3])
def test_what_is_written_is_read_and_saved_with_the_model(
    hidden: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    made = random_commit_rule(5, hidden)
    write_commit_rule(folder, made)
    model = load_model(folder)
    for read, written in zip(model.commit_rule.weights.layers, made.weights.layers, strict=True):
        assert all(map(torch.equal, read, written)), "without rounding"
    expected = generate(model, [[5, 6, 7]], DECODING)
    assert generate(deepcopy(model), [[5, 6, 7]], DECODING) == expected
    save_model(model, tmp_path / "saved", tokenizer=load_tokenizer(folder))
    assert (tmp_path / "saved" / COMMIT_RULE).read_bytes() == (folder / COMMIT_RULE).read_bytes()
    assert generate(load_model(tmp_path / "saved"), [[5, 6, 7]], DECODING) == expected


def test_a_model_without_one_is_refused_with_the_remedy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert read_commit_rule(tmp_path) is None
    with pytest.raises(
        CheckpointError, match="holds no commit_rule.json: fit one on .* `dparallel fit-rule`"
    ):
        generate(load_model(tiny_checkpoint), [[5, 6, 7]], DECODING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["log_doubt"]}, "and this version has"),
        ({"layers": []}, "the last layer does not have one output"),
        ({"layers": [{"weight": [[1.0, 2.0]], "bias": [0.0]}]}, "layer 0 does not have 6 inputs"),
        ({"layers": [{"weight": [[1.0] * 6], "bias": [0.0, 1.0]}]}, "as many rows as biases"),
        ({"layers": [{"weight": [[1.0] * 6] * 2, "bias": [0.0, 1.0]}]}, "does not have one output"),
        ({"layers": [{"weight": [[1e300] + [1.0] * 5], "bias": [0.0]}]}, "has a weight beyond 1e"),
        ({"layers": [{"weight": [["1"] * 6], "bias": [0.0]}]}, "valid number"),
        ({"layers": [{"weight": [[1.0] * 6], "bias": [float("nan")]}]}, "finite"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(change: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / COMMIT_RULE
    file.write_text(json.dumps({**json.loads(random_commit_rule().as_json()), **change}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as refused:
        read_commit_rule(tmp_path)
    assert str(refused.value).startswith(str(file))
    assert "`dparallel fit-rule`" in str(refused.value)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_commit_rule(tmp_path)


def test_a_rule_that_is_fitted_later_makes_another_model(tmp_path: Path) -> None:
    """Otherwise what was decoded with an earlier one would be found again."""
    stage = Stage("merging", MergingConfig(), {}, tmp_path / "merged")
    (stage.folder / "model.safetensors").write_bytes(b"weights")
    stage.finish(["model.safetensors"])
    found = [fingerprint(stage.folder)]
    for seed in (0, 1):
        write_commit_rule(stage.folder, random_commit_rule(seed))
        found.append(fingerprint(stage.folder))
    assert len(set(found)) == 3

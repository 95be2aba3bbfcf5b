import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import MergingConfig, StudentConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.decoding.generate import generate
from dparallel.distillation import merging
from dparallel.distillation.merging import (
    MergeError,
    check_canvases,
    masked_logits,
    max_difference,
    run_stage,
)
from dparallel.models.adapters import load_adapter
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer, save_model
from dparallel.models.defaults import write_defaults
from dparallel.models.formats import CheckpointError
from dparallel.models.lora import AdapterError, merge
from dparallel.stages import lease
from dparallel.stages.generation_file import EMPTY, GENERATION, with_defaults
from dparallel.stages.lease import LeaseHeldError
from dparallel.stages.manifest import Stage, StageError, file_digest, verify
from dparallel.trajectories import store
from tests.conftest import random_model
from tests.dparallel.distillation.conftest import RECIPE, record, training_config, trajectory_rows
from tests.dparallel.models.published import publish
from tests.dparallel.models.test_lora import trained_adapter


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("merging")
    training = write_training(folder / "training", tiny_checkpoint, random_model())
    trajectories = record(folder / "trajectories", tiny_checkpoint, trajectory_rows(10))
    return {"teacher": str(tiny_checkpoint), "trajectories": str(trajectories), "training": str(training)}


def write_training(
    folder: Path, teacher: Path, model: DiffusionTransformer, recipe: RecipeConfig = RECIPE
) -> Path:
    """A finished training stage with an adapter for `model`."""
    config = StudentConfig(training=training_config(), recipe=recipe)
    stage = Stage("training", config, {"teacher": teacher}, folder)
    trained_adapter(model).save_pretrained(str(folder / "adapter"))
    stage.finish(["adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
    return folder


@pytest.mark.slow
def test_merged_model_stands_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    manifest = run_stage(MergingConfig(), inputs, tmp_path / "merged")
    assert 0 < manifest.metrics["max_logit_difference"] < 1e-4
    assert manifest.metrics["max_logit_difference_saved"] == manifest.metrics["max_logit_difference"]
    assert manifest.counts == {"check_prompts": 8}
    expected = save_model(random_model(), tmp_path / "plain", tokenizer=load_tokenizer(inputs["teacher"]))
    assert sorted(manifest.files) == expected
    there = {file.name for file in (tmp_path / "merged").iterdir()}
    assert there == {*expected, "stage.json", "manifest.json"}

    canvas = torch.tensor([[5, 6, 1, 1, 1]])
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", device="cpu")(canvas)
        student = trained_adapter(random_model())(canvas)
    torch.testing.assert_close(merged, student, atol=1e-4, rtol=0)
    assert load_tokenizer(tmp_path / "merged").mask_token_id == 1
    torch.testing.assert_close(plain_transformers_logits(tmp_path / "merged", canvas, tmp_path), merged)


@pytest.mark.parametrize("published", [False, True])
def test_a_merged_model_says_whom_its_student_saw(
    published: bool, inputs: dict[str, str], tmp_path: Path
) -> None:
    """In native format and in LLaDA's, whose other fields are kept."""
    teacher = publish(tmp_path / "teacher", "llada") if published else Path(inputs["teacher"])
    made_for = load_model(teacher, "cpu", torch.float32) if published else random_model()
    recipe = RECIPE.model_copy(update={"attention": "block_causal"})
    training = write_training(tmp_path / "training", teacher, made_for, recipe)
    own = {**inputs, "teacher": str(teacher), "training": str(training)}
    out = tmp_path / "out"
    assert run_stage(MergingConfig(), own, out).details["format"] == ("original" if published else "native")
    assert load_model(out).config.attention_pattern == "block_causal"
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (teacher, out)
    )
    assert after == {**before, "attention_pattern": "block_causal"}
    with pytest.raises(ValueError, match="decoded with mode='pipelined'"):
        generate(load_model(out), [[5]], DecodingConfig(gen_length=8, block_length=8))


def plain_transformers_logits(folder: Path, canvas: torch.Tensor, scratch: Path) -> torch.Tensor:
    """Logits computed in a process with transformers and the folder, without this package."""
    code = f"""
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True).mask_token == "<mask>"
assert "dparallel" not in sys.modules
with torch.no_grad():
    print(json.dumps(model(torch.tensor({canvas.tolist()})).tolist()))
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=scratch,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def test_merging_twice_gives_the_same_files(inputs: dict[str, str], tmp_path: Path) -> None:
    first = run_stage(MergingConfig(), inputs, tmp_path / "first")
    second = run_stage(MergingConfig(), inputs, tmp_path / "second")
    assert first.files == second.files
    assert first.fingerprint == second.fingerprint
    before = (tmp_path / "first" / "model.safetensors").stat().st_mtime_ns
    assert run_stage(MergingConfig(), inputs, tmp_path / "first") == first  # done: nothing is redone
    assert (tmp_path / "first" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "second" / "manifest.json").unlink()  # as a kill before the manifest would leave it
    assert run_stage(MergingConfig(), inputs, tmp_path / "second").files == first.files
    verify(tmp_path / "second", "merging")


def test_a_bf16_teacher_gives_a_bf16_student_and_the_rounding_is_told(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    save_model(random_model().bfloat16(), teacher, tokenizer=load_tokenizer(inputs["teacher"]))
    training = write_training(tmp_path / "training", teacher, random_model())
    manifest = run_stage(
        MergingConfig(), {**inputs, "teacher": str(teacher), "training": str(training)}, tmp_path / "out"
    )
    assert manifest.details == {"dtype": "bfloat16", "format": "native"}
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    rows = store.load(inputs["trajectories"]).slice(0, 8).to_pylist()
    canvases = check_canvases(rows, mask_token_id=1)
    unrounded = trained_adapter(random_model().bfloat16().float())
    expected = masked_logits(unrounded, canvases, mask_token_id=1)
    actual = masked_logits(load_model(tmp_path / "out", device="cpu").float(), canvases, mask_token_id=1)
    assert manifest.metrics["max_logit_difference"] < 1e-4
    assert manifest.metrics["max_logit_difference_saved"] > 1e-2
    assert manifest.metrics["max_logit_difference_saved"] == pytest.approx(max_difference(expected, actual))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_published_teacher_gives_a_student_in_its_publishers_format(
    family: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    teacher, out = publish(tmp_path / "teacher", family), tmp_path / "out"
    theirs = (teacher / GENERATION).read_bytes() if (teacher / GENERATION).exists() else EMPTY
    write_defaults(teacher, {"threshold": 0.3})
    training = write_training(tmp_path / "training", teacher, load_model(teacher, "cpu", torch.float32))
    own = {**inputs, "teacher": str(teacher), "training": str(training)}
    manifest = run_stage(MergingConfig(), own, out)
    assert manifest.details == {"dtype": "bfloat16", "format": "original"}
    copied = {file.name for file in teacher.iterdir()} - {"README.md"}
    assert set(manifest.files) == copied
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (teacher, out)
    )
    assert after == {**before, "attention_pattern": "full"}
    assert (out / GENERATION).read_bytes() == with_defaults(theirs, None), "not the teacher's decode defaults"
    changed = set()
    for shard in teacher.glob("*.safetensors"):
        before, after = load_file(shard), load_file(out / shard.name)
        assert {name: (each.shape, each.dtype) for name, each in after.items()} == {
            name: (each.shape, each.dtype) for name, each in before.items()
        }
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * 7  # layers x matrices: only those with an adapter

    run_stage(MergingConfig(format="native"), own, tmp_path / "native")
    canvas = torch.tensor([[5, 6, 255, 255]])
    with torch.no_grad():
        logits = [load_model(folder, "cpu")(canvas) for folder in (out, tmp_path / "native")]
    assert torch.equal(*logits)


def test_a_teacher_without_an_original_format_is_named_first(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny_checkpoint0, which is in our own format"):
        run_stage(MergingConfig(format="original"), inputs, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["stage.json"]


def test_what_was_saved_is_what_is_compared(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_damaged(model: DiffusionTransformer, path: Path, **options: Any) -> list[str]:
        with torch.no_grad():
            model.lm_head.weight[5] += 1
        return save_model(model, path, **options)

    monkeypatch.setattr(merging, "save_model", save_damaged)
    with pytest.raises(MergeError, match=r"the model saved in .*out \(float32\) differs .* tolerance=0.0001"):
        run_stage(MergingConfig(), inputs, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_difference_above_the_tolerance_saves_nothing(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"differ from base \+ adapter by .* more than tolerance=1e-12"):
        run_stage(MergingConfig(tolerance=1e-12), inputs, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["stage.json"]


def test_what_a_killed_merging_left_is_removed(inputs: dict[str, str], tmp_path: Path) -> None:
    run_stage(MergingConfig(), inputs, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    left = tmp_path / "out" / ".saving-m0pkj0qt"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half a model")
    made = run_stage(MergingConfig(), inputs, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *made.files,
        "stage.json",
        "manifest.json",
    }


def test_a_folder_in_use_is_not_merged_into(inputs: dict[str, str], tmp_path: Path) -> None:
    run_stage(MergingConfig(), inputs, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with lease.held(tmp_path / "out"):
        with pytest.raises(LeaseHeldError, match=f"out is in use by process {os.getpid()} on"):
            run_stage(MergingConfig(), inputs, tmp_path / "out")
        assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("predicts_next", [False, True])
def test_part_by_part_gives_what_the_whole_model_gives_in_float64(predicts_next: bool) -> None:
    model = random_model(predicts_next=predicts_next).eval()
    canvases = [torch.tensor([[1, 5, 6, 1, 1, 7, 1]]), torch.tensor([[8, 9, 1]])]
    actual = masked_logits(model, canvases, mask_token_id=1)
    assert next(model.parameters()).dtype == torch.float32
    model.double()
    with torch.no_grad():
        expected = [model(canvas, logits_at=canvas == 1) for canvas in canvases]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_another_teacher_or_shape_is_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    save_model(random_model(seed=1), tmp_path / "other", tokenizer=load_tokenizer(inputs["teacher"]))
    with pytest.raises(StageError, match="was trained on another teacher"):
        run_stage(MergingConfig(), {**inputs, "teacher": str(tmp_path / "other")}, tmp_path / "out")
    training = write_training(
        tmp_path / "training", Path(inputs["teacher"]), random_model(intermediate_size=96)
    )
    with pytest.raises(AdapterError, match="another shape"):
        run_stage(MergingConfig(), {**inputs, "training": str(training)}, tmp_path / "out2")


def test_a_damaged_adapter_is_named(inputs: dict[str, str], tmp_path: Path) -> None:
    training = write_training(tmp_path / "training", Path(inputs["teacher"]), random_model())
    weights = training / "adapter" / "adapter_model.safetensors"
    digest = file_digest(weights)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert file_digest(weights) != digest
    with pytest.raises(StageError, match=r"adapter_model\.safetensors does not match"):
        run_stage(MergingConfig(), {**inputs, "training": str(training)}, tmp_path / "out")


def test_check_canvases_go_from_light_to_all_masks() -> None:
    rows = [{"prompt_ids": [7, 8], "response_ids": list(range(10, 20))} for _ in range(4)]
    canvases = check_canvases(rows, mask_token_id=1)
    assert [int((canvas == 1).sum()) for canvas in canvases] == [3, 5, 8, 10]
    for canvas in canvases:
        assert canvas[0, :2].tolist() == [7, 8]
        kept = [(i, t) for i, t in enumerate(canvas[0, 2:].tolist()) if t != 1]
        assert all(token == 10 + index for index, token in kept)


@pytest.mark.parametrize(("free", "expected"), [(2**40, "cuda"), (2**10, "cpu")])
def test_a_gpu_too_small_for_the_check_is_left_alone(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(merging, "free_bytes", lambda device: free)
    assert merging.roomy_device(tiny_checkpoint).type == expected


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak since `clear_refs` was written."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
def test_the_check_in_float64_needs_no_wide_copy_of_the_model(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two times a bf16 model: the files as they are mapped, and what was merged. Float64 is four times."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    teacher = random_model(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=2000
    ).bfloat16()
    size = sum(weight.nbytes for weight in teacher.parameters())
    assert size > 60e6
    save_model(teacher, tmp_path / "teacher", tokenizer=load_tokenizer(inputs["teacher"]))
    training = write_training(tmp_path / "training", tmp_path / "teacher", teacher)
    del teacher
    own = {**inputs, "teacher": str(tmp_path / "teacher"), "training": str(training)}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    manifest = run_stage(MergingConfig(check_prompts=2), own, tmp_path / "out")
    assert (resident("VmHWM") - before) / size < 3
    assert manifest.details["dtype"] == "bfloat16"
    assert merging.merging_bytes(tmp_path / "teacher") < 2.5 * size  # a layer is an eighth of it


def test_an_adapter_on_a_narrow_model_keeps_its_own_precision(inputs: dict[str, str], tmp_path: Path) -> None:
    """Merged into bf16 weights, the sum uses the adapter as saved and is rounded once."""
    teacher = random_model().bfloat16()
    training = write_training(tmp_path / "training", Path(inputs["teacher"]), random_model())
    trained = load_file(training / "adapter" / "adapter_model.safetensors")
    student = load_adapter(teacher, training / "adapter")
    loaded = {name.replace(".default", ""): weight for name, weight in student.named_parameters()}
    assert all(torch.equal(loaded[name], weight) for name, weight in trained.items())
    name = "layers.0.attention.q_proj"
    a, b = (trained[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    before = random_model().bfloat16().get_submodule(name).weight.float()
    scaling = student.get_submodule(f"base_model.model.{name}").scaling["default"]
    expected = (before + scaling * (b @ a)).bfloat16()
    assert torch.equal(merge(student).get_submodule(name).weight, expected)


def test_an_adapter_from_elsewhere_is_merged_as_a_trained_one(inputs: dict[str, str], tmp_path: Path) -> None:
    adapter = Path(inputs["training"]) / "adapter"
    given = {"teacher": inputs["teacher"], "adapter": str(adapter)}
    manifest = run_stage(MergingConfig(attention="block_causal"), given, tmp_path / "given")
    assert 0 < manifest.metrics["max_logit_difference"] < 1e-4
    assert load_model(tmp_path / "given").config.attention_pattern == "block_causal"
    run_stage(MergingConfig(), inputs, tmp_path / "trained")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("given", "trained")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.hardware import peak_memory_bytes, reset_peak_memory, weight_count
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.stages import (
    PROBLEMS,
    TRAIN_STEPS,
    Row,
    check_disk,
    finished,
    main,
    make_tokenizer,
    model_config,
    scratch,
)
from dparallel.config.base import ConfigError
from dparallel.models.backbone import DiffusionConfig
from dparallel.stages.manifest import verify
from tests.benchmarks.tables import cells

SMALL = SHAPES["llada-8b-1000th"]
STAGES = ["trajectories", "training", "merging", "benchmark"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the small shape is for CPUs")
@pytest.mark.slow
def test_every_stage_runs_and_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--shape", "llada-8b-1000th", "--folder", "made", "--keep", "--out", "out.json"])

    # 1. The table, line by line
    lines = cells(capsys.readouterr().out)[1:]
    assert [line[0] for line in lines] == ["checkpoint", *STAGES]
    made = ["7,995,392 random weights", f"{PROBLEMS} rows", f"{TRAIN_STEPS} train steps"]
    assert [line[1] for line in lines[:3]] == made

    # 2. Every stage is finished and intact, and its line agrees with its manifest
    made = {path.name.partition("-")[0]: verify(path) for path in Path("made/pipeline").glob("*/")}
    assert sorted(made) == sorted(STAGES)
    rows = {row["stage"]: row for row in json.loads(Path("out.json").read_text(encoding="utf-8"))["rows"]}
    assert all(rows[stage]["seconds"] >= made[stage].seconds for stage in STAGES)
    assert all(row["peak_bytes"] > 4 * weight_count(SMALL.config) for row in rows.values())
    assert rows["trajectories"]["rate"] == made["trajectories"].metrics["rows_per_second"]
    assert rows["training"]["peak_bytes"] == made["training"].metrics["peak_memory_bytes"]
    assert made["trajectories"].metrics["nfe"] == SMALL.steps

    # 3. The benchmark read its 32 prompts with both models, and the sweep took fewer forward passes
    [results] = Path("made/pipeline").glob("benchmark-*/results.json")
    test = [row for row in json.loads(results.read_text(encoding="utf-8"))["rows"] if row["split"] == "test"]
    assert [(row["model"], row["samples"]) for row in test] == [
        ("teacher", PROBLEMS),
        ("teacher", PROBLEMS),
        ("student/certainty_forcing", PROBLEMS),
    ]
    assert all(row["nfe"] < test[0]["nfe"] == SMALL.steps for row in test[1:])


def test_the_small_shape_is_a_thousandth() -> None:
    whole, part = weight_count(SHAPES["llada-8b"].config), weight_count(SMALL.config)
    assert part / whole == pytest.approx(1e-3, rel=0.01)


def test_the_scratch_folder_is_gone_afterwards_whatever_happens() -> None:
    with scratch(None, keep=False) as folder:
        (folder / "file").touch()
    assert folder.parent == Path("runs")
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), scratch(Path("mine"), keep=False) as folder:
        raise KeyboardInterrupt
    assert not folder.exists()
    with scratch(Path("mine"), keep=True) as folder:
        pass
    assert folder.exists()


def test_one_word_for_each_token() -> None:
    config = model_config(SMALL)
    tokenizer = make_tokenizer(config)
    assert len(tokenizer) == config.vocab_size == 2304
    assert tokenizer.encode("w0 w2301 <eos> <mask>") == [0, 2301, 2302, 2303]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (2302, 2302, 2303)
    assert SMALL.config.eos_token_id is None, "the shape itself stays as it was"


def test_peak_memory_of_a_process_counts_anew() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    held = bytearray(2**28)
    assert peak_memory_bytes(cpu) - before > 0.9 * len(held)
    del held
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) - before < 2**26


def test_too_little_disk_is_said_before_anything_is_made() -> None:
    config = DiffusionConfig(vocab_size=10**12, hidden_size=64, mask_token_id=10**12 - 1)
    with pytest.raises(ConfigError, match=r"^made needs \d+\.\d+ GiB of disk, and .* are free"):
        check_disk(Path("made"), Shape(config, 8, 16, 8, steps=4), torch.bfloat16)
    assert not Path("made").exists()


def test_a_folder_with_files_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for folder in (".", "file"):
        with pytest.raises(SystemExit):
            main(["--shape", "llada-8b-1000th", "--folder", folder])
        assert f"--folder {folder} is not an empty folder" in capsys.readouterr().err
    assert Path("file").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_large_shapes_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shape", "llada-8b"])
    assert "--shape llada-8b needs a GPU, and torch sees none" in capsys.readouterr().err


def test_a_finished_stage_is_said_in_one_line() -> None:
    row = Row("training", "20 train steps", 111.62, 27 * 2**30, 4161.2, "tokens")
    assert finished(row) == "training: 20 train steps, 111.6 s, peak memory 27.00 GiB, 4,161.2 tokens/s"
    assert finished(Row("merging", "made", 2.0, 2**29)) == "merging: made, 2.0 s, peak memory 0.50 GiB"

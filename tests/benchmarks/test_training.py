import json

import numpy as np
import pytest
import torch

from benchmarks.common.hardware import activation_bytes
from benchmarks.training import (
    Result,
    Work,
    main,
    make_step_batch,
    make_student,
    marks,
    our_loss,
    step_flops,
    straightforward_loss,
    works,
)
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.recipe import make_batch, make_views
from dparallel.models.backbone import DiffusionConfig
from tests.benchmarks.tables import cells
from tests.conftest import random_model

CPU = torch.device("cpu")
# D 4, two heads of 2, one key/value head (E 2), feed-forward 3, two layers, vocabulary 5.
SMALL = DiffusionConfig(
    vocab_size=5,
    hidden_size=4,
    intermediate_size=3,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mask_token_id=4,
)
WORK = Work("small", SMALL, prompt_length=2, gen_length=4, block_length=2, samples=3, rank=2)


@pytest.mark.parametrize("complement", [True, False])
def test_both_steps_have_one_loss_and_one_gradient(complement: bool) -> None:
    """Prompts of different lengths, and targets of which some are predicted correctly."""
    model = random_model()
    recipe = RecipeConfig(block_length=8, masking="random", complement=complement, certainty_weight=2.0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, length) for length in (3, 9, 5, 6)]
    responses = rng.integers(3, 50, (4, 16))
    views = [make_views(recipe, response, np.arange(16), (2,), rng) for response in responses]
    batch = make_batch(prompts, responses, views, 1)
    said = model(batch.canvas, attention_mask=batch.attention_mask, logits_at=batch.read).argmax(-1)
    batch = batch._replace(targets=torch.where(torch.arange(len(said)) % 2 == 0, said, batch.targets))
    ours, theirs = our_loss(model, batch, recipe), straightforward_loss(model, batch, recipe)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    weights = [model.layers[0].attention.q_proj.weight, model.layers[-1].feed_forward.down_proj.weight]
    for one, other in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_flops_by_hand() -> None:
    """Forward and input gradient of six canvases of six tokens; each adapter pair also its own gradient."""
    batch = make_step_batch(WORK, CPU)
    assert batch.canvas.shape == (6, 6)
    assert len(batch.targets) == 3 * 2  # the two views of a sample share a block
    first_layer = 36 * (2 * 84 + 4 * 6 * 4)
    last_layer = 36 * 2 * 16 + 6 * (2 * (32 + 36) + 4 * 6 * 4)
    head = 6 * 2 * 20
    # rank 2: q, o 8 each; k, v 6 each; gate, up, down 7 each; two layers
    adapter = 2 * 2 * (2 * 8 + 2 * 6 + 3 * 7)
    student = make_student(WORK, CPU, torch.float32)
    expected = 2 * (first_layer + last_layer + head) + 6 * adapter * 36
    assert step_flops(WORK, batch, student, 6) == expected


def test_activation_bytes_by_hand() -> None:
    """A product keeps the input of a trained matrix, counted once for several uses; weights do not count."""
    matrices = torch.nn.ModuleList(torch.nn.Linear(8, 4, bias=False) for _ in range(2))
    inputs = torch.ones(3, 8)

    def forward() -> torch.Tensor:
        return sum(matrix(inputs).sum() for matrix in matrices)

    assert activation_bytes(forward, matrices) == 3 * 8 * 4


def test_marks() -> None:
    def result(name: str, spent: int, held: int, seconds: list[float]) -> Result:
        return Result("x", name, 1, 1, 1, spent, 1.0, held, None, [], seconds)

    slow, fast = result("straightforward", 30, 100, [4.0, 2.0, 9.0]), result("ours", 10, 60, [2.0, 2.0, 3.0])
    speed, memory = marks(slow, fast)
    assert (speed.measured, speed.met, memory.measured, memory.met) == (2.0, True, 0.6, True)
    assert "3.00" in speed.holds


def test_one_command_prints_one_table(tmp_path, capsys) -> None:
    main(["--shape", "tiny-2l", "--repeat", "2", "--samples", "2", "--out", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    titles, *rows = cells(printed)
    assert [row[:2] for row in rows[:2]] == [["tiny-2l", "straightforward"], ["tiny-2l", "ours"]]
    assert all(all(row) for row in rows), "every column is filled in"
    assert {"samples/s", "tokens/s", "peak GiB", "FLOPs utilisation"} < set(titles)
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    theirs, ours = record["rows"]
    assert ours["activation_bytes"] < theirs["activation_bytes"]
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert len(record["marks"]) == 2
    assert all(2**26 < row["peak_bytes"] < 2**36 for row in record["rows"])


def test_a_wide_vocabulary_costs_ours_little(capsys) -> None:
    """The targets for a vocabulary in proportion to that of the published models."""
    main(["--shape", "wide-vocabulary", "--repeat", "1", "--samples", "1"])
    assert [row[3] for row in cells(capsys.readouterr().out)[-2:]] == ["yes", "yes"]


def test_default_work_is_the_tiny_teacher_and_a_wide_vocabulary() -> None:
    assert [each.name for each in works(None, None, False)] == ["tiny teacher", "wide-vocabulary"]
    assert [each.samples for each in works("llada-8b", None, True)] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "0"], "--repeat 0: give at least 1"),
        (["--samples", "-1"], "--samples -1: give at least"),
    ],
)
def test_bad_arguments(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_large_shapes_need_a_gpu(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--shape", "dream-7b"])
    assert "--shape dream-7b needs a GPU, and torch sees none" in capsys.readouterr().err

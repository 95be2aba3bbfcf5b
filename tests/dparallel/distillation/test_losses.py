import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dparallel.config.recipe import RecipeConfig
from dparallel.distillation import losses
from dparallel.distillation.corruption import View
from dparallel.distillation.recipe import Batch, loss, make_batch, make_views
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model
from tests.conftest import GOLDEN

PUBLISHED = RecipeConfig(
    block_length=8, masking="random", complement=True, certainty_weight=2.0, certainty_temperature=0.5
)
# Odds 3 : 1 : 1 and 1 : 3 : 4, one row each
LOGITS = torch.log(torch.tensor([[3.0, 1, 1], [1, 3, 4], [3, 1, 1]]))


def entropy_of(*odds: float) -> float:
    return -sum(odd / sum(odds) * math.log(odd / sum(odds)) for odd in odds)


def test_terms_by_hand() -> None:
    targets, view = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2])
    # view 0 reads two positions, view 1 none, view 2 one
    expected = [-math.log(3 / 5), -math.log(3 / 8), -math.log(1 / 5)]
    assert losses.cross_entropy(LOGITS, targets).tolist() == pytest.approx(expected)
    # T = 0.5 squares the odds; only position 0 is right, so view 0 averages over it alone
    expected = [entropy_of(9, 1, 1), 0.0, 0.0]
    assert losses.certainty(LOGITS, targets, view, 3, temperature=0.5).tolist() == pytest.approx(expected)
    among = torch.tensor([False, True, True])
    assert losses.certainty(LOGITS, targets, view, 3, 0.5, among).tolist() == [0, 0, 0]
    assert losses.entropy(LOGITS)[1].item() == pytest.approx(entropy_of(1, 3, 4))
    # the teacher's odds 2 : 1 : 1, none, and its own distribution, whose cross-entropy is its entropy
    teacher = torch.log(torch.tensor([[2.0, 1, 1], [0, 1, 0], [3, 1, 1]]))
    teacher = teacher.clamp(min=-1e4)
    expected = [
        -(math.log(3 / 5) + math.log(1 / 5)) / 2,
        -math.log(3 / 8),
        entropy_of(3, 1, 1),
    ]
    assert losses.soft_cross_entropy(LOGITS, teacher).tolist() == pytest.approx(expected)


def test_nothing_read_is_zero_and_has_a_gradient() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    total = losses.cross_entropy(logits, nothing).sum()
    total = total + losses.soft_cross_entropy(logits, logits.detach()).sum()
    total = total + losses.certainty(logits, nothing, nothing, 2, 0.5).sum()
    total.backward()
    assert total.item() == 0


def test_bf16_logits_are_read_in_float32() -> None:
    targets, narrow = torch.tensor([0, 1, 1]), LOGITS.bfloat16()
    made = losses.cross_entropy(narrow, targets)
    assert made.dtype == torch.float32
    assert torch.equal(made, losses.cross_entropy(narrow.float(), targets))
    soft = losses.soft_cross_entropy(narrow, narrow.flip(0))
    assert soft.dtype == torch.float32
    assert torch.equal(soft, losses.soft_cross_entropy(narrow.float(), narrow.flip(0).float()))


def test_recipe_sums_views_and_averages_samples() -> None:
    def batch_of(view: list[int]) -> Batch:
        canvas = torch.zeros(2, 4, dtype=torch.long)
        weight = torch.tensor([0.5, 0.5, 1.0])
        return Batch(canvas, None, canvas.bool(), torch.tensor([0, 1, 1]), torch.tensor(view), weight)

    cross_entropies = (-math.log(3 / 5) - math.log(3 / 8)) / 2, -math.log(1 / 5)
    made = loss(LOGITS, batch_of([0, 0, 1]), PUBLISHED)  # one sample, two views
    assert made.cross_entropy.item() == pytest.approx(sum(cross_entropies))
    assert made.certainty.item() == pytest.approx(entropy_of(9, 1, 1))
    assert made.loss.item() == pytest.approx(sum(cross_entropies) + 2 * entropy_of(9, 1, 1))
    # T = 1 leaves the odds as they are, T = 1/3 cubes them
    for temperature, odds in ((1.0, (3, 1, 1)), (1 / 3, (27, 1, 1))):
        warmer = PUBLISHED.model_copy(update={"certainty_temperature": temperature})
        assert loss(LOGITS, batch_of([0, 0, 1]), warmer).certainty.item() == pytest.approx(entropy_of(*odds))
    single = RecipeConfig(block_length=2, masking="trajectory", certainty_weight=0)  # two samples
    made = loss(LOGITS, batch_of([0, 0, 1])._replace(weight=torch.tensor([0.25, 0.25, 0.5])), single)
    assert made.loss.item() == pytest.approx(sum(cross_entropies) / 2)


DREAM = PUBLISHED.model_copy(update={"region": "response", "block_length": None, "certainty_weight": 1.0})


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "vectors", "recipe"),
    [("llada", "certainty_loss", PUBLISHED), ("dream", "dream_certainty_loss", DREAM)],
)
def test_golden(sample: int, family: str, vectors: str, recipe: RecipeConfig) -> None:
    golden = load_file(GOLDEN / f"{vectors}.safetensors")
    tokens, noisy, complement, read, read_complement = (
        golden[f"{sample}.{name}"]
        for name in ("input_ids", "noisy", "noisy_complement", "masked", "masked_complement")
    )
    reads = torch.cat([read, read_complement]).bool()
    batch = Batch(
        canvas=torch.cat([noisy, complement]),
        attention_mask=None,
        read=reads,
        targets=tokens.expand(2, -1)[reads],
        view=reads.nonzero()[:, 0],
        weight=(reads / reads.sum(1, keepdim=True))[reads],
    )
    model = load_model(GOLDEN / f"{family}_tiny", device="cpu")
    assert run_loss(model, batch, recipe).item() == pytest.approx(golden[f"{sample}.loss"].item(), abs=1e-4)


@pytest.mark.parametrize("vectors", ["certainty_loss", "dream_certainty_loss"])
def test_golden_views_are_views_of_ours(vectors: str) -> None:
    """The published canvases equal ours, given the published masks."""
    golden = load_file(GOLDEN / f"{vectors}.safetensors")
    for sample in range(3):
        tokens, prompt_length = (
            golden[f"{sample}.input_ids"][0].numpy(),
            int(golden[f"{sample}.prompt_length"]),
        )
        views = []
        for name in ("masked", "masked_complement"):
            read = golden[f"{sample}.{name}"][0, prompt_length:].bool().numpy()
            region_end = union_end(golden, sample, prompt_length)
            masked = read.copy()
            masked[region_end:] = True
            views.append(View(masked, read, read / read.sum()))
        batch = make_batch([tokens[:prompt_length]], tokens[None, prompt_length:], [views], mask_token_id=255)
        assert batch.attention_mask is None
        assert torch.equal(batch.canvas[:1], golden[f"{sample}.noisy"])
        assert torch.equal(batch.canvas[1:], golden[f"{sample}.noisy_complement"])


def union_end(golden: dict[str, Tensor], sample: int, prompt_length: int) -> int:
    union = golden[f"{sample}.masked"] + golden[f"{sample}.masked_complement"]
    return int(union[0, prompt_length:].nonzero().max()) + 1


def run_loss(model: DiffusionTransformer, batch: Batch, recipe: RecipeConfig = PUBLISHED) -> Tensor:
    with torch.no_grad():
        logits = model(**batch.student_inputs)
        teacher = model(**batch.teacher_inputs) if recipe.targets == "teacher" else None
    return loss(logits, batch, recipe, teacher).loss


recipes = st.sampled_from(
    [
        PUBLISHED,
        RecipeConfig(region="response", masking="trajectory", certainty_weight=1.0),
        RecipeConfig(block_length=4, masking="random", attention="block_causal", targets="teacher"),
    ]
)


@settings(max_examples=20, deadline=None)
@given(recipes, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_batch_equals_its_rows_alone(
    tiny_model: DiffusionTransformer, recipe: RecipeConfig, prompt_lengths: list[int], seed: int
) -> None:
    """Prompts of different lengths: padding must not be attended to."""
    rng = np.random.default_rng(seed)
    mask, eos = tiny_model.config.mask_token_id, tiny_model.config.eos_token_id
    prompts = [rng.integers(3, 50, length) for length in prompt_lengths]
    responses = rng.integers(2, 50, (len(prompts), 16))
    views = [make_views(recipe, response, np.arange(16), (eos,), rng) for response in responses]
    together = run_loss(tiny_model, make_batch(prompts, responses, views, mask), recipe)
    alone = [
        run_loss(tiny_model, make_batch([prompts[i]], responses[i : i + 1], [views[i]], mask), recipe)
        for i in range(len(prompts))
    ]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-4)


@pytest.mark.parametrize("positions", [1, 3])
def test_chunks_change_nothing_and_keep_only_the_logits(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    likeliest = logits.argmax(-1)
    targets = torch.where(torch.arange(7) % 2 == 0, likeliest, (likeliest + 1) % 11)
    view = torch.tensor([0, 0, 0, 1, 1, 1, 1])

    teacher = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    every = torch.arange(1.0, 8)

    def both() -> Tensor:
        certain = losses.certainty(logits, targets, view, 2, 0.5).sum()
        soft = losses.soft_cross_entropy(logits, teacher) @ every
        return losses.cross_entropy(logits, targets) @ every + soft + certain

    whole = both()
    [gradient] = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(losses, "CHUNK_BYTES", positions * 11 * 4)
    wide: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (11,):
            wide.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked = both()
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, logits)[0], gradient)
    assert all(shape[0] <= positions for shape in wide)
    # the logits, again beside the teacher's, and a copy of those that are right
    assert sum(shape[0] for shape in wide) == 7 + 2 * 7 + 4

"""The autoregressive model of the tiny teacher's shape compared with a Llama of equal weights."""

import pytest
import torch

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.teacher import TeacherConfig
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import load_model
from dparallel.problems.embedded import EOS as END
from dparallel.problems.embedded import embedded_task
from dparallel.tiny import pretraining
from dparallel.tiny.objectives import causal_view
from tests.conftest import random_model
from tests.dparallel.tiny.llama import as_llama

EOS = 2
COINS = embedded_task("coins")
SETTINGS = TeacherConfig(out="unused", objective="autoregressive", train_steps=1)
SHAPES = [{}, {"num_key_value_heads": 2, "rope_theta": 500_000.0, "rms_norm_eps": 0.1}]


def causal(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_view_reads_the_response_to_its_first_end_of_text():
    ids = torch.tensor([[5, EOS, 7, 8, EOS, EOS], [5, 6, 7, 8, 9, 10], [5, 6, EOS, EOS, EOS, EOS]])
    view = causal_view(ids, 2, SETTINGS, DiffusionConfig(eos_token_id=EOS), torch.Generator())
    assert torch.equal(view.canvas, ids)
    assert view.read.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]
    assert view.levels is not None
    assert view.levels.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_a_llama(shape):
    """Position i has the logits of the Llama's position i - 1."""
    model = random_model(predicts_next=True, attention_pattern="causal", **shape)
    ids = random_ids(3, 20)
    with torch.inference_mode():
        ours, theirs = model(ids, levels=causal(ids)), as_llama(model)(ids).logits
    assert theirs.abs().max() > 1
    assert torch.allclose(ours[:, 1:], theirs[:, :-1], atol=1e-4)


def test_the_training_loss_is_that_of_a_llama():
    model = random_model(predicts_next=True, attention_pattern="causal")
    ids, prompt_length = pretraining.batch(COINS, 8, step=0, seed=0)
    labels = ids.clone()
    labels[:, :prompt_length] = -100
    for row in labels:
        first = int((row == EOS).nonzero()[0])
        row[first + 1 :] = -100
    with torch.inference_mode():
        ours = pretraining.training_loss(model, ids, prompt_length, SETTINGS, step=0)
        theirs = as_llama(model)(ids, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_gives_the_tokens_of_a_llama(shape):
    """Greedy decoding of prompts of three lengths in one batch, up to the first EOS."""
    model = random_model(
        seed=4, predicts_next=True, attention_pattern="causal", **shape
    )  # which ends most rows early, at several lengths
    llama = as_llama(model)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (12, 7, 10)]
    decoding = DecodingConfig(gen_length=24, mode="autoregressive")
    generations = generate(model, prompts, decoding)
    assert len({generation.nfe for generation in generations}) > 1
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=decoding.gen_length,
            do_sample=False,
            suppress_tokens=[model.config.mask_token_id],  # which is no text
        )[0, len(prompt) :].tolist()
        assert generation.tokens[: len(expected)] == expected
        assert generation.nfe == len(expected)


def test_training_learns_and_saves_a_model_that_predicts_the_next_token(tmp_path):
    config = TeacherConfig(
        **{"out": "unused", "objective": "autoregressive", "train_steps": 60, "batch_size": 16},
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"check_problems": 4, "min_accuracy": 0.0},
    )
    manifest = pretraining.run_stage(config, {}, tmp_path)
    assert manifest.config["objective"] == "autoregressive"
    model = load_model(tmp_path)
    assert model.config.predicts_next
    ids, prompt_length = pretraining.batch(COINS, 64, step=0, seed=1)  # another seed's: not trained on
    untrained = DiffusionTransformer(model.config)
    with torch.inference_mode():
        losses = [
            pretraining.training_loss(each, ids, prompt_length, SETTINGS, 0) for each in (untrained, model)
        ]
    assert losses[1] < losses[0] - 1


def test_settings_of_the_other_objective_are_refused():
    assert TeacherConfig(out="a", train_steps=1).block_length == 12
    assert SETTINGS.block_length is None
    again = TeacherConfig(**SETTINGS.model_dump(mode="json"))
    assert again == SETTINGS
    with pytest.raises(
        ConfigError, match="block_length=12 with objective='autoregressive'.*drop block_length"
    ):
        TeacherConfig(out="a", objective="autoregressive", train_steps=1, block_length=12)


def test_a_finished_teacher_keeps_the_settings_its_folder_states():
    """A manifest written before objectives existed is that of a diffusion teacher."""
    settings = TeacherConfig(out="a", train_steps=1).model_dump(mode="json")
    assert "objective" not in settings
    assert TeacherConfig(**settings).objective == "diffusion"


def test_a_trained_solution_ends_with_one_end_of_text():
    ids, prompt_length = pretraining.batch(COINS, 16, step=0, seed=0)
    view = causal_view(ids, prompt_length, SETTINGS, DiffusionConfig(eos_token_id=EOS), torch.Generator())
    for row, read in zip(ids, view.read, strict=True):
        words = [COINS.vocabulary[token] for token in row[read].tolist()]
        assert words[-1] == END
        assert words.count(END) == 1
        assert words[-3] == "####"

import pytest
import torch

from dparallel.config.base import UserError
from dparallel.config.problems import EMBEDDED
from dparallel.config.teacher import TeacherConfig
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.embedded import EOS, embedded_task, split_of
from dparallel.stages import metrics_log
from dparallel.tiny import pretraining
from dparallel.tiny.objectives import noise
from tests.conftest import random_model

SMALL = {
    "out": "unused",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "batch_size": 16,
    "check_problems": 4,
    "min_accuracy": 0.0,
}


def test_noise_shows_half_of_the_rows_as_decoding_sees_them():
    masked, read = noise(1000, 36, 12, torch.Generator().manual_seed(0))
    assert not (read & ~masked).any()
    view = torch.arange(1000) % 2 == 0
    assert torch.equal(masked[~view], read[~view])  # whole-response rows read every mask
    assert 0.5 < masked[~view].float().mean() < 0.6  # ratios from 0.1 to 1, on average 0.55
    by_block = masked[view].view(-1, 3, 12)
    read_blocks = read[view].view(-1, 3, 12).any(-1)
    assert (read_blocks.sum(1) <= 1).all()
    for row, chosen in zip(by_block, read_blocks, strict=True):
        if chosen.any():
            block = int(chosen.int().argmax())
            assert not row[:block].any()  # earlier blocks are clean
            assert row[block + 1 :].all()  # later ones are all masks


def test_schedule_warms_up_stays_and_falls_to_zero():
    factors = [pretraining.learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert set(factors[50:400]) == {1.0}
    assert factors[700] == pytest.approx(0.5)
    assert factors[999] == pytest.approx(1 / 600)


@pytest.mark.parametrize("name", EMBEDDED)
def test_batches_are_fixed_by_seed_and_step_and_come_from_the_training_split(name):
    task = embedded_task(name)
    ids, prompt_length = pretraining.batch(task, 8, step=3, seed=1)
    assert torch.equal(ids, pretraining.batch(task, 8, step=3, seed=1)[0])
    assert not torch.equal(ids, pretraining.batch(task, 8, step=4, seed=1)[0])
    for row in ids.tolist():
        words = [task.vocabulary[token] for token in row]
        problem = task.parse_prompt(" ".join(words[:prompt_length]))
        assert split_of(problem) == "train"
        assert task.solution_is_valid(problem, " ".join(words[prompt_length:]).replace(f" {EOS}", ""))


def test_training_learns_and_saves_a_loadable_teacher(tmp_path):
    config = TeacherConfig(**SMALL, train_steps=100)
    manifest = pretraining.run_stage(config, {}, tmp_path)
    losses = [record["loss"] for record in metrics_log.read(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3
    assert load_model(tmp_path).config.hidden_size == 32
    assert load_tokenizer(tmp_path).eos_token == EOS
    assert pretraining.run_stage(config, {}, tmp_path) == manifest  # nothing is done twice


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(pretraining, "LOG_EVERY", 2)
    config = TeacherConfig(**SMALL, train_steps=12)
    pretraining.run_stage(config, {}, tmp_path / "whole")
    batch = pretraining.batch

    def stopping(task, rows, step, seed):
        if step == 7:
            raise KeyboardInterrupt
        return batch(task, rows, step, seed)

    monkeypatch.setattr(pretraining, "batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        pretraining.run_stage(config, {}, tmp_path / "stopped")
    monkeypatch.setattr(pretraining, "batch", batch)
    pretraining.run_stage(config, {}, tmp_path / "stopped")
    whole, stopped = load_model(tmp_path / "whole"), load_model(tmp_path / "stopped")
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, stopped.state_dict()[name], atol=1e-6), name
    records = metrics_log.read(tmp_path / "stopped" / "metrics.jsonl")
    assert [record["train_step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert records == metrics_log.read(tmp_path / "whole" / "metrics.jsonl")


def test_a_teacher_that_did_not_learn_is_not_saved(tmp_path):
    config = TeacherConfig(**{**SMALL, "min_accuracy": 0.97}, train_steps=2)
    with pytest.raises(RuntimeError, match="less than min_accuracy=97.0%; raise train_steps=2"):
        pretraining.run_stage(config, {}, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    model = random_model(num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="the loss is nan at train step 1"):
        pretraining.train(model, TeacherConfig(**SMALL, train_steps=5), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "ledger"}, "prompt 0 has 21 tokens; with gen_length=60 this model"),  # the default of 64
        ({"block_length": 7}, "gen_length=36 is not divisible by block_length=7"),
    ],
)
def test_a_shape_that_does_not_fit_the_task_is_refused_before_training(tmp_path, settings, message):
    config = TeacherConfig(**SMALL, train_steps=10**9, **settings)
    with pytest.raises(UserError, match=message):
        pretraining.run_stage(config, {}, tmp_path)


def test_a_ledger_teacher_has_the_words_of_its_task(tmp_path):
    config = TeacherConfig(**SMALL, train_steps=2, task="ledger", max_position_embeddings=96, block_length=30)
    manifest = pretraining.run_stage(config, {}, tmp_path)
    assert manifest.config["task"] == "ledger"
    assert load_model(tmp_path).config.vocab_size == len(embedded_task("ledger").vocabulary)
    assert load_tokenizer(tmp_path)("Ann 9 a triples").input_ids == [15, 13, 22, 33]

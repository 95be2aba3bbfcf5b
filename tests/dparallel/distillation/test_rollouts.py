"""Training on what the student decodes: when it decodes, what it learns from, and resuming."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import LoraSettings
from dparallel.config.recipe import RecipeConfig
from dparallel.config.recipe_parts import Rollouts
from dparallel.decoding.generate import generate
from dparallel.distillation import resuming
from dparallel.distillation.data import Samples, check_samples
from dparallel.distillation.engine import Process
from dparallel.distillation.recipe import make_views
from dparallel.distillation.rollouts import FILE, OwnResponses
from dparallel.distillation.settings import check_rollouts
from dparallel.models.lora import attach
from dparallel.stages.manifest import StageError, verify
from tests.conftest import random_model
from tests.dparallel.distillation.conftest import (
    curve,
    run,
    run_forked,
    shipped,
    torchrun,
    training_config,
    write_plan,
)

DECODING = DecodingConfig(gen_length=12, block_length=6, rule="entropy", threshold=1.5)
ROLLOUTS = Rollouts(every=3, prompts=5, decoding=DECODING)
ALONE = Process(0, 0, 1)


def recorded() -> Samples:
    rng = np.random.default_rng(0)
    return Samples(
        prompts=[rng.integers(3, 50, length) for length in rng.integers(2, 7, 8)],
        responses=rng.integers(3, 50, (8, 12)),
        commit_step=np.array([rng.permutation(12) for _ in range(8)]),
        teacher_prompts=[np.array([row]) for row in range(8)],
    )


def student(dropout: float = 0.0, std: float = 0.3):
    made = attach(random_model(), LoraSettings(rank=4, alpha=4, dropout=dropout))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=std)
    return made.train()


def test_it_decodes_with_the_adapter_every_few_steps(tmp_path: Path) -> None:
    model, samples = student(dropout=0.5), recorded()
    own = OwnResponses(ROLLOUTS, samples, 0, ALONE)
    first = own.at(1, model)
    assert model.training
    assert len(first) == 5
    chosen = own.present.chosen.tolist()
    assert len(set(chosen)) == 5
    model.eval()
    expected = generate(model.get_base_model(), [samples.prompts[row].tolist() for row in chosen], DECODING)
    assert first.responses.tolist() == [made.tokens for made in expected]
    assert first.commit_step.tolist() == [made.commit_step for made in expected]
    assert [prompt.tolist() for prompt in first.prompts] == [samples.prompts[row].tolist() for row in chosen]
    assert [prompt.tolist() for prompt in first.teacher_prompts] == [[row] for row in chosen]
    with model.disable_adapter():
        others = generate(model.get_base_model(), [samples.prompts[row].tolist() for row in chosen], DECODING)
    assert [made.tokens for made in others] != first.responses.tolist()

    model = student(std=0.6)  # as if it had learnt
    for step in (2, 3):
        assert np.array_equal(own.at(step, model).responses, first.responses)
    second = own.at(4, model)
    # The next prompts of the same permutation of all 8: three new ones, then another permutation
    assert set(own.present.chosen[:3].tolist()) == set(range(8)) - set(chosen)
    assert not np.array_equal(second.responses, first.responses)

    own.save(tmp_path)
    resumed = OwnResponses(ROLLOUTS, samples, 0, ALONE)
    resumed.load(tmp_path)
    for step in (5, 6):
        again = resumed.at(step, student())  # whose weights do not matter before step 7
        assert again.responses.tolist() == second.responses.tolist()
        assert again.commit_step.tolist() == second.commit_step.tolist()
        assert (again.responses.dtype, again.commit_step.dtype) == (np.int32, np.int16)
    anew = OwnResponses(ROLLOUTS, samples, 0, ALONE)
    anew.load(tmp_path)
    assert anew.at(7, model).responses.tolist() == own.at(7, model).responses.tolist()
    with pytest.raises(StageError, match=rf"checkpoint of train step 4 holds no {FILE}"):
        OwnResponses(ROLLOUTS, samples, 0, ALONE).at(5, model)


def test_recorded_tokens_are_masked_in_the_students_order() -> None:
    """Views hold the teacher's tokens exactly as far as the student had committed their positions."""
    model, samples = student(), recorded()
    rollouts = ROLLOUTS.model_copy(update={"tokens": "recorded"})
    own = OwnResponses(rollouts, samples, 0, ALONE)
    made = own.at(1, model)
    chosen = own.present.chosen
    assert not np.array_equal(own.present.responses, samples.responses[chosen])
    assert np.array_equal(made.responses, samples.responses[chosen])
    assert np.array_equal(made.commit_step, own.present.commit_step)
    recipe = RecipeConfig(region="response", masking="trajectory", rollouts=rollouts)
    for row in range(len(made)):
        rng = np.random.default_rng(row)
        [view] = make_views(recipe, made.responses[row], made.commit_step[row], [2], rng)
        held = own.present.commit_step[row][~view.masked]
        assert view.masked.any()
        assert held.max(initial=-1) < own.present.commit_step[row][view.masked].min()


def test_processes_share_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = student(), recorded()
    whole = OwnResponses(ROLLOUTS, samples, 0, ALONE).at(1, model)
    parts = []
    for rank in range(2):
        own = OwnResponses(ROLLOUTS, samples, 0, Process(rank, rank, 2))
        monkeypatch.setattr(
            "dparallel.distillation.rollouts._of_all_processes", lambda rows, _: parts.append(rows) or rows
        )
        own.at(1, model)
    assert [[row for row, *_ in part] for part in parts] == [[0, 2, 4], [1, 3]]
    monkeypatch.setattr(
        "dparallel.distillation.rollouts._of_all_processes", lambda rows, _: [*parts[0], *parts[1]]
    )
    joined = OwnResponses(ROLLOUTS, samples, 0, Process(0, 0, 2)).at(1, model)
    assert joined.responses.tolist() == whole.responses.tolist()


def test_what_does_not_fit_is_refused() -> None:
    recipe = shipped("rollouts")
    config = random_model().config
    with pytest.raises(
        ConfigError, match=r"rollouts\.decoding\.gen_length=36 is not .* length 12: set it to 12"
    ):
        check_samples(recorded(), recipe, config)
    check_rollouts(recipe, training_config())
    zero3 = training_config(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ConfigError, match="rollouts with ZeRO stage 3: .*; use stage 2"):
        check_rollouts(recipe, zero3)
    check_rollouts(shipped("near_far"), zero3)
    with pytest.raises(ConfigError, match=r"decoding\.temperature=0\.5 without decoding\.seed: give a seed"):
        Rollouts(every=1, prompts=1, decoding={"temperature": 0.5})


SHORT = RecipeConfig(
    region="response",
    masking="trajectory",
    near_far={"delta": 4, "far_canvas": "later"},
    cross_entropy_weight=0.0,
    rollouts={
        "every": 4,
        "prompts": 16,
        "decoding": {"gen_length": 36, "block_length": 12, "rule": "entropy", "threshold": 2.0},
    },
)
SETTINGS = {"recipe": SHORT, "train_steps": 7, "checkpoint_every": 1, "views_per_step": 8}


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_bit(
    tiny_checkpoint: Path, trajectories: Path, tmp_path: Path
) -> None:
    """Between two times, when the responses come from the checkpoint; and in two processes as in one."""
    for name in ("whole", "killed", "two"):
        (tmp_path / name).mkdir()
    plan, whole = write_plan(tmp_path / "whole", tiny_checkpoint, trajectories, **SETTINGS)
    code, output = run_forked(plan)
    assert code == 0, output
    assert "before train step 1 the student decoded 16 responses" in output
    assert "before train step 5 the student decoded 16 responses" in output
    assert "before train step 4" not in output

    def stop(train_step: int) -> None:
        if train_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    plan, killed = write_plan(tmp_path / "killed", tiny_checkpoint, trajectories, **SETTINGS)
    code, output = run_forked(plan, stop)
    assert code == -signal.SIGKILL, output
    assert (killed / "checkpoints" / resuming.step_tag(6) / FILE).is_file()
    code, output = run_forked(plan)
    assert code == 0, output
    assert "from step 7," in output
    assert "the student decoded" not in output
    assert curve(killed) == curve(whole)
    assert verify(killed).files == verify(whole).files

    plan, two = write_plan(tmp_path / "two", tiny_checkpoint, trajectories, **SETTINGS)
    code, output = run(torchrun(plan, 2))
    assert code == 0, output
    for mine, theirs in zip(curve(two), curve(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)

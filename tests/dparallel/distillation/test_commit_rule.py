"""A commit rule is fitted to what a model predicts on canvases of trajectories."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dparallel import DecodingConfig, generate, load_model
from dparallel.cli.main import main
from dparallel.config.base import UserError
from dparallel.config.experiment import CommitRuleConfig, MergingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.decoding.canvas import Step
from dparallel.distillation.commit_rule import Examples, examples, fit, fit_on, train_network
from dparallel.distillation.merging import run_stage
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.commit_rule import read_commit_rule
from dparallel.models.defaults import write_defaults
from dparallel.rules.declaration import COMMIT_RULE
from dparallel.rules.features import FEATURES, network
from dparallel.stages.manifest import verify
from tests.conftest import random_model
from tests.dparallel.cli.commands import refused
from tests.dparallel.distillation.conftest import record, trajectory_rows
from tests.dparallel.distillation.test_merging import write_training

SMALL = CommitRuleConfig(trajectories=10, canvases=2, hidden=2)


@pytest.mark.parametrize("pattern", [None, "block_causal"])
def test_examples_are_what_decoding_sees(pattern: str | None) -> None:
    """On every canvas of a trajectory that the model itself decodes one token at a time."""
    model = random_model(attention_pattern=pattern)
    shape = {"gen_length": 12, "block_length": 4, "stop_at_eos": False}
    mode = (
        {"mode": "pipelined", "block_add_threshold": 1.0, "decoded_token_threshold": 1.0} if pattern else {}
    )
    decoding = DecodingConfig(**shape, **mode, rule="confidence", threshold=1.0)
    steps: list[Step] = []
    [made] = generate(model, [[5, 6, 7]], decoding, observe=steps.extend)
    row = {"prompt_ids": [5, 6, 7], "response_ids": made.tokens, "commit_step": made.commit_step}
    found = examples(model, row, 4, np.arange(made.nfe))
    tokens = [token for step in steps for token in step.tokens]
    offsets = [offset for step in steps for offset in step.offsets]
    final = [made.tokens[offset] for offset in offsets]
    assert found.final.tolist() == [token == last for token, last in zip(tokens, final, strict=True)]
    probability = [value for step in steps for value in step.probability]
    assert found.probability.tolist() == pytest.approx(probability, abs=1e-5)
    columns = dict(zip(FEATURES, found.features.T, strict=True))
    entropy = torch.tensor([value for step in steps for value in step.entropy]).double().log()
    assert columns["log_entropy"].tolist() == pytest.approx(entropy.tolist(), abs=1e-3)
    assert columns["position"].tolist() == [offset % 4 / 4 for offset in offsets]


@pytest.mark.parametrize("hidden", [0, 4])
def test_the_network_finds_the_rule_that_labels_follow(hidden: int) -> None:
    """Labels drawn by a logistic regression: its log loss is reached, on features of any scale."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, len(FEATURES), generator=generator, dtype=torch.float64) * 5 - 3
    logit = values[:, 0] - 2 * values[:, 5] + 1
    final = torch.rand(4000, generator=generator, dtype=torch.float64) < logit.sigmoid()
    weights = train_network(Examples(values, final, logit.sigmoid()), hidden, seed=0)
    found = network(weights, values)
    assert (found > 0).eq(logit > 0).double().mean() > 0.97
    assert all(not parameter.requires_grad for layer in weights.layers for parameter in layer)


def test_fitting_is_repeatable_and_says_what_it_did(tiny_model: DiffusionTransformer) -> None:
    rows = trajectory_rows(10)
    first, second = (fit(tiny_model, rows, 12, SMALL) for _ in range(2))
    assert first.as_json() == second.as_json()
    assert {"trajectories": 10, "block_length": 12, "hidden": 2}.items() <= first.fitted.items()
    assert first.fitted["log_loss"] > 0
    assert first.fitted["examples"] > 8 * 2
    with pytest.raises(UserError, match="9 trajectories: give at least 10"):
        fit(tiny_model, rows[:9], 12, SMALL)
    with pytest.raises(UserError, match="block_length=5 does not divide trajectories of 36 tokens"):
        fit(tiny_model, rows, 5, SMALL)
    longer = {**rows[0], "response_ids": [5] * 48, "commit_step": list(range(48))}
    with pytest.raises(UserError, match=r"different lengths \[36, 48\]"):
        fit(tiny_model, [*rows, longer], 12, SMALL)
    with pytest.raises(UserError, match="a causal model"):
        fit(random_model(attention_pattern="causal"), rows, 12, SMALL)


def test_trajectories_that_the_model_cannot_read_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recorded = record(tmp_path / "trajectories", tiny_checkpoint, trajectory_rows(10))
    for shape, message in (
        ({"vocab_size": 20}, r"token ids \d+ to \d+, the model knows 0 to 19: .* another tokenizer"),
        ({"max_position_embeddings": 40}, r"\d+ tokens, the model's max_position_embeddings is 40"),
        ({"mask_token_id": 6}, "the trajectories hold mask_token_id=6 in a response"),
    ):
        with pytest.raises(UserError, match=message):
            fit_on(random_model(**shape), recorded, SMALL)


@pytest.mark.parametrize(
    ("pattern", "stated", "blocks"),
    [(None, None, 12), ("block_causal", None, 6), (None, 18, 18), ("block_causal", 6, 6)],
)
def test_a_block_causal_students_rule_is_fitted_in_its_own_blocks(
    tiny_checkpoint: Path, tmp_path: Path, pattern: str | None, stated: int | None, blocks: int
) -> None:
    """Those of its training, where the trajectories were recorded in others."""
    training = write_training(
        tmp_path / "training",
        tiny_checkpoint,
        random_model(),
        RecipeConfig(masking="random", block_length=6, attention=pattern or "full"),
    )
    recorded = record(tmp_path / "trajectories", tiny_checkpoint, trajectory_rows(10))
    inputs = {"teacher": str(tiny_checkpoint), "trajectories": str(recorded), "training": str(training)}
    config = MergingConfig(check_prompts=2, commit_rule=SMALL.model_copy(update={"block_length": stated}))
    run_stage(config, inputs, tmp_path / "merged")
    assert load_model(tmp_path / "merged").commit_rule.fitted["block_length"] == blocks


def test_merging_fits_the_rule_of_the_student_and_the_command_that_of_any_model(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    training = write_training(tmp_path / "training", tiny_checkpoint, random_model())
    recorded = record(tmp_path / "trajectories", tiny_checkpoint, trajectory_rows(10))
    inputs = {"teacher": str(tiny_checkpoint), "trajectories": str(recorded), "training": str(training)}
    merged = tmp_path / "merged"
    manifest = run_stage(MergingConfig(check_prompts=2, commit_rule=SMALL), inputs, merged)
    assert COMMIT_RULE in manifest.files
    assert load_model(merged).commit_rule.fitted["trajectories"] == 10
    arguments = [
        "fit-rule",
        "--trajectories",
        str(recorded),
        "--set",
        "trajectories=10",
        "canvases=2",
        "--model",
    ]
    assert "is a result of its stage; change merging.commit_rule" in refused(
        [*arguments, str(merged)], capsys
    )
    assert "give one of this machine" in refused([*arguments, "org/name"], capsys)
    verify(merged, "merging")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in merged.iterdir():
        if file.name not in ("manifest.json", "stage.json", COMMIT_RULE):
            (copy / file.name).write_bytes(file.read_bytes())
    command = [
        "generate",
        "--model",
        str(copy),
        "--prompt",
        "Tom",
        "--gen-length",
        "12",
        "--block-length",
        "12",
    ]
    command += ["--rule", "learned", "--threshold", "0.5"]
    assert "holds no commit_rule.json" in refused(command, capsys)
    assert main([*arguments, str(copy)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{copy / COMMIT_RULE}, fitted on 10 trajectories: ")
    assert "held-out log loss" in out
    assert read_commit_rule(copy) is not None
    assert main(command) == 0
    by_options = capsys.readouterr().out
    settings = {"gen_length": 12, "block_length": 12, "rule": "learned", "threshold": 0.5}
    write_defaults(copy, settings)
    assert main(command[: command.index("--gen-length")]) == 0
    by_defaults, said = capsys.readouterr()
    assert by_defaults == by_options
    assert "decode defaults gen_length 12, block_length 12, rule learned" in said
    (copy / COMMIT_RULE).unlink()
    assert main(command[: command.index("--gen-length")]) == 2
    assert "holds no commit_rule.json" in capsys.readouterr().err, "defaults that name a rule that is gone"

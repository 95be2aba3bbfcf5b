"""Recordings whose teacher is asked with the reference answer."""

from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import PrivilegedConfig
from dparallel.decoding.generate import generate
from dparallel.distillation.data import load_samples
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.registry import load_problems
from dparallel.problems.sources import ProblemsError
from dparallel.trajectories import record, store
from dparallel.trajectories.record import run_stage
from tests.dparallel.evaluation.oracle import dataset
from tests.dparallel.trajectories.test_record import DECODING, config, inputs

TOLD = PrivilegedConfig(prompt="{prompt} {reference}")


def test_the_reference_is_in_the_teachers_prompt_only(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    problems = load_problems(config(count=3).problems)
    plain = [tokenizer.encode(problem.prompt) for problem in problems]
    told = [tokenizer.encode(f"{problem.prompt} {problem.reference}") for problem in problems]
    made = {}
    for decode in (True, False):
        settings = config(count=3, privileged=TOLD.model_copy(update={"decode": decode}))
        run_stage(settings, inputs(tiny_checkpoint), tmp_path / f"trajectories-{decode}")
        made[decode] = store.load(tmp_path / f"trajectories-{decode}").to_pylist()
        for row, prompt, with_reference in zip(made[decode], plain, told, strict=True):
            assert row["prompt_ids"] == prompt
            assert row["teacher_prompt_ids"] == with_reference
            (expected,) = generate(model, [with_reference if decode else prompt], DECODING)
            assert row["response_ids"] == expected.tokens
            assert row["commit_step"] == expected.commit_step
    assert made[True] != made[False]

    # Samples have the teacher's prompts only for recipes that ask for them
    folder = tmp_path / "trajectories-True"
    samples, _ = load_samples(folder, only_correct=False, max_length=None, privileged=True)
    assert [prompt.tolist() for prompt in samples.teacher_prompts] == told
    assert load_samples(folder, only_correct=False, max_length=None)[0].teacher_prompts is None

    # An ordinary recording takes over what was decoded with ordinary prompts, and nothing else
    monkeypatch.setattr(record, "load_model", lambda _: pytest.fail("decoded again"))
    run_stage(config(count=3), inputs(tiny_checkpoint), tmp_path / "trajectories-plain")
    ordinary = store.load(tmp_path / "trajectories-plain").to_pylist()
    assert "teacher_prompt_ids" not in ordinary[0]
    assert [row["response_ids"] for row in ordinary] == [row["response_ids"] for row in made[False]]
    run_stage(config(count=3, privileged=TOLD), inputs(tiny_checkpoint), tmp_path / "trajectories-again")
    assert store.load(tmp_path / "trajectories-again").to_pylist() == made[True]
    with pytest.raises(
        ConfigError, match="teacher_prompt=privileged, and .* record with trajectories.privil"
    ):
        load_samples(tmp_path / "trajectories-plain", False, None, privileged=True)


def test_problems_without_reference_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom 7"}\n', encoding="utf-8")
    settings = config(problems=dataset(tmp_path / "p.jsonl"), privileged=TOLD)
    with pytest.raises(
        ProblemsError, match=r"problem .* has no reference, with which trajectories\.privileged"
    ):
        run_stage(settings, inputs(tiny_checkpoint), tmp_path / "out")


def test_imported_responses_have_no_privileged_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom 7", "answer": "7"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="imported with privileged: .* drop one of them"):
        config(problems=dataset(tmp_path / "p.jsonl"), privileged=TOLD, imported={"response": "answer"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{prompt}", r"prompt='\{prompt\}': give a text with \{reference\}, and with \{prompt\} where"),
        ("{prompt} {answer} {reference}", r"prompt='.*answer.*': give a text with"),
        ("{reference", "prompt='{reference': "),
    ],
)
def test_prompts_without_sense(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrivilegedConfig(prompt=prompt)

"""What holds for every embedded task: a new one is covered by its name alone."""

import hashlib
import random
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.config.problems import EMBEDDED, ProblemsConfig
from dparallel.problems import embedded
from dparallel.problems.embedded import EmbeddedTask, answer_is_right, embedded_task, split_of
from dparallel.problems.registry import data_of, load_problems, problems_digest
from dparallel.problems.scoring import SCORERS
from dparallel.tiny.tokenizer import build_tokenizer

tasks = st.sampled_from(EMBEDDED).map(embedded_task)
seeds = st.integers(0, 10**9)

# Recordings, samples and teachers were made from these; a changed digest makes them useless.
RECORDED = {
    "coins": (
        "55f10f8536184471c72312dcf5da6498a1dff4bbdf0d40d08166165a45beb9c0",
        "6845dcb5062016d612b3db48332677709171842f93fc54fc2cee593afb233716",
    ),
    "ledger": (
        "a95ee251dfa0837cac49893b135f1e03a0407e39ba1c4a3c7ba231a23ae097ac",
        "77c41e5ccfe25921e298ec5bc2cc7b35ed3391bbeba9a6b963dd706e02111f4a",
    ),
}


def split_problems(name: str, split: str, count: int) -> ProblemsConfig:
    return ProblemsConfig(benchmark=name, split=split, count=count)


@pytest.mark.parametrize("name", EMBEDDED)
def test_problems_solutions_and_token_ids_stay_as_they_are(name: str) -> None:
    problems = [
        problem for split in embedded.SPLITS for problem in load_problems(split_problems(name, split, 50))
    ]
    vocabulary = " ".join(embedded_task(name).vocabulary)
    assert (problems_digest(problems), hashlib.sha256(vocabulary.encode()).hexdigest()) == RECORDED[name]


@given(tasks, seeds)
def test_drawn_solutions_hold(task: EmbeddedTask, seed: int) -> None:
    rng = random.Random(seed)
    problem = task.draw_problem(rng)
    solution = task.draw_solution(problem, rng)
    assert task.mistake(problem, solution) is None
    assert answer_is_right(problem, solution)
    assert task.parse_prompt(problem.prompt) == problem
    assert len(solution.split()) < task.response_length  # leaves room for EOS
    assert task.response_length % task.block_length == 0


@given(tasks, seeds)
def test_a_missing_or_further_word_spoils_the_solution(task: EmbeddedTask, seed: int) -> None:
    rng = random.Random(seed)
    problem = task.draw_problem(rng)
    words = task.draw_solution(problem, rng).split()
    at = rng.randrange(len(words))
    assert task.mistake(problem, " ".join([*words[:at], *words[at + 1 :]])) is not None
    assert task.mistake(problem, " ".join([*words, rng.choice(task.words)])) is not None


@given(tasks, seeds)
def test_all_words_are_tokens_and_all_prompts_of_one_length(task: EmbeddedTask, seed: int) -> None:
    tokenizer, rng = build_tokenizer(task.name), random.Random(seed)
    problem, first = task.draw_problem(rng), task.draw_problem(random.Random(0))
    text = f"{problem.prompt} {task.draw_solution(problem, rng)}"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id} & set(ids)
    assert len(problem.prompt.split()) == len(first.prompt.split())
    assert tokenizer("Tom coughs").input_ids[1] == tokenizer.unk_token_id
    assert len(set(task.vocabulary)) == len(task.vocabulary)


@pytest.mark.parametrize("name", EMBEDDED)
def test_splits_are_disjoint_by_construction_and_large(name: str) -> None:
    task = embedded_task(name)
    drawn = {split: set(islice(task.problems(split, seed=3), 500)) for split in embedded.SPLITS}
    assert len(set.union(*drawn.values())) == 4 * 500
    buckets = [bucket for buckets in embedded.SPLITS.values() for bucket in buckets]
    assert sorted(buckets) == list(range(100))
    for split, problems in drawn.items():
        assert all(split_of(problem) == split for problem in problems)
    rng = random.Random(0)
    assert len({task.draw_problem(rng) for _ in range(5000)}) > 4900, "the problem space is too small"


@pytest.mark.parametrize("name", EMBEDDED)
def test_problems_are_fixed_by_their_seed(name: str) -> None:
    first, again, other = (list(islice(embedded_task(name).problems("test", seed), 5)) for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(ValueError, match="unknown split 'dev'; known: test, validation, distillation, train"):
        next(embedded_task(name).problems("dev", 0))


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_task_is_a_benchmark_with_its_own_scorer(name: str) -> None:
    config = split_problems(name, "validation", 2)
    (problem, _) = load_problems(config)
    assert (problem.problem_id, problem.source) == (f"{name}-validation-0-00000", f"{name}/validation")
    assert data_of(config) == [f"generated: {name}, split validation, seed 0"]
    assert config.protocol.scorers == (name,)
    assert problem.reference is not None
    broken = f"{problem.reference} {problem.reference}"
    verdicts = SCORERS[name].score([problem] * 2, [problem.reference, broken])
    assert [verdict.metrics["solution"] for verdict in verdicts] == [True, False]
    assert verdicts[0].note is None
    assert str(verdicts[1].note).startswith("the end is")


@pytest.mark.parametrize("name", EMBEDDED)
def test_prompts_of_another_task_are_refused(name: str) -> None:
    prompts = ["", "hello", "Tom 7", *(embedded_task(each).example for each in EMBEDDED)]
    prompts += [next(embedded_task(each).problems("test", 0)).prompt for each in EMBEDDED if each != name]
    for prompt in prompts:
        with pytest.raises(embedded.ForeignPrompt, match=f"not a {name} problem"):
            embedded_task(name).parse_prompt(prompt)


def test_a_third_task_is_one_file() -> None:
    """No other module of the package names a task, except the list of them."""
    package = Path(embedded.__file__).parents[1]
    own = {f"problems/{name}.py" for name in EMBEDDED} | {"config/problems.py"}
    for file in package.rglob("*.py"):
        if file.relative_to(package).as_posix() not in own:
            text = file.read_text(encoding="utf-8")
            assert not any(f"problems.{name}" in text or f"import {name}" in text for name in EMBEDDED), file

"""The evaluation sets by name: where their problems come from and how a response is scored."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

from dparallel.config.problems import ProblemsConfig
from dparallel.problems import coins
from dparallel.problems.scoring import NUMBER, SCORINGS, Score, final_answer
from dparallel.problems.sources import Problem, ProblemsError, dataset_problems
from dparallel.stages.manifest import Manifest, StageError, digest


@dataclass(frozen=True)
class Benchmark:
    problems: Callable[[ProblemsConfig], list[Problem]]
    score: Callable[[ProblemsConfig, Problem, str], Score]


def load_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems `config` names, the same ones in the same order every time.

    Raises:
        ProblemsError: a data set that is missing, empty, too short or not as declared.
    """
    problems = BENCHMARKS[config.benchmark].problems(config)
    if config.scoring == "flexible_extract":
        _check_numbers(problems)
    return problems


def score(config: ProblemsConfig, problem: Problem, response: str) -> Score:
    return BENCHMARKS[config.benchmark].score(config, problem, response)


def check_disjoint(sets: Mapping[str, Sequence[Problem]]) -> None:
    """Raise a ProblemsError that names the first two of the named `sets` to share a prompt."""
    prompts = {name: {problem.prompt for problem in problems} for name, problems in sets.items()}
    for one, other in combinations(prompts, 2):
        if shared := prompts[one] & prompts[other]:
            raise ProblemsError(
                f"{one} and {other} share {len(shared)} prompts, such as {min(shared)!r}: "
                "nothing may be learned or chosen on the problems it is measured on; give disjoint sets"
            )


def problems_digest(problems: Sequence[Problem]) -> str:
    """The same for the same problems in the same order, whatever file they came from."""
    return digest([vars(problem) for problem in problems])


def check_unchanged(folder: Path, done: Manifest, digest_now: str) -> None:
    """Refuse a finished stage whose problems file has changed since; its `details` keep the digest."""
    if done.details["problems"] != digest_now:
        raise StageError(f"{folder} was made from other problems (their file changed); choose another folder")


def coins_problems(config: ProblemsConfig) -> list[Problem]:
    return [
        Problem(
            problem_id=f"coins-{config.split}-{config.seed}-{index:05d}",
            source=f"coins/{config.split}",
            prompt=problem.prompt,
            reference=coins.draw_solution(problem, random.Random(problem.prompt)),
        )
        for index, problem in enumerate(islice(coins.problems(config.split, config.seed), config.count))
    ]


def score_coins(config: ProblemsConfig, problem: Problem, response: str) -> Score:
    stated = coins.parse_prompt(problem.prompt)
    return Score(
        solution=coins.solution_is_valid(stated, response), answer=coins.answer_is_right(stated, response)
    )


def score_dataset(config: ProblemsConfig, problem: Problem, response: str) -> Score:
    if problem.reference is None:
        return Score(solution=None)
    return Score(solution=SCORINGS[config.scoring](problem.reference, response))


def _check_numbers(problems: Sequence[Problem]) -> None:
    """No response could score against a reference that ends in no number."""
    for problem in problems:
        if problem.reference is not None and not NUMBER.fullmatch(final_answer(problem.reference)):
            raise ProblemsError(
                f"problem {problem.problem_id} ({problem.source}): scoring='flexible_extract' compares "
                f"numbers, but the reference ends in {final_answer(problem.reference)[-40:]!r}"
            )


BENCHMARKS = {
    "coins": Benchmark(coins_problems, score_coins),
    "dataset": Benchmark(dataset_problems, score_dataset),
}

"""The evaluation sets by name: where their problems come from and how a response is scored."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

from dparallel.config import ProblemsConfig
from dparallel.manifest import Manifest, StageError, digest
from dparallel.tiny import coins


class ProblemsError(ValueError):
    """Problems that cannot be read; the message names the file, the line and the remedy."""


@dataclass(frozen=True)
class Problem:
    """`reference` is one right response; None where none is known."""

    problem_id: str
    source: str
    prompt: str
    reference: str | None


@dataclass(frozen=True)
class Score:
    """`solution` judges the whole response, `answer` its final answer alone; None where unknown."""

    solution: bool | None
    answer: bool | None = None


@dataclass(frozen=True)
class Benchmark:
    problems: Callable[[ProblemsConfig], list[Problem]]
    score: Callable[[Problem, str], Score]


def load_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems `config` names, the same ones in the same order every time.

    Raises:
        ProblemsError: a file that is missing, empty, too short or not as declared.
    """
    return BENCHMARKS[config.benchmark].problems(config)


def score(config: ProblemsConfig, problem: Problem, response: str) -> Score:
    return BENCHMARKS[config.benchmark].score(problem, response)


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


def score_coins(problem: Problem, response: str) -> Score:
    stated = coins.parse_prompt(problem.prompt)
    return Score(
        solution=coins.solution_is_valid(stated, response), answer=coins.answer_is_right(stated, response)
    )


def jsonl_problems(config: ProblemsConfig) -> list[Problem]:
    """One JSON object a line; blank lines are skipped, a missing or null reference is unknown."""
    path = Path(str(config.path))
    if not path.is_file():
        raise ProblemsError(f"{path}: no such problems file (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProblemsError(f"{path}: not a text file (UTF-8): {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    wanted = len(lines) if config.count is None else config.count
    if not lines or wanted > len(lines):
        raise ProblemsError(f"{path} holds {len(lines)} problems, wanted {max(1, wanted)}: lower count")
    return [_jsonl_problem(config, path, number, line) for number, line in lines[:wanted]]


def _jsonl_problem(config: ProblemsConfig, path: Path, number: int, line: str) -> Problem:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ProblemsError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ProblemsError(f"{where}: holds {type(record).__name__}, expected an object")
    prompt, reference = record.get(config.prompt_field), record.get(config.reference_field)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ProblemsError(
            f"{where}: prompt_field={config.prompt_field!r} is not a text there; its fields: {_texts(record)}"
        )
    if reference is not None and not isinstance(reference, str):
        raise ProblemsError(
            f"{where}: reference_field={config.reference_field!r} holds {reference!r}, expected a text"
        )
    if reference is None and config.reference_field not in record and _asked(config, "reference_field"):
        raise ProblemsError(
            f"{where}: no reference_field={config.reference_field!r}; its fields: {_texts(record)}"
        )
    return Problem(f"{path.stem}-{number:05d}", str(path), prompt, reference)


def _asked(config: ProblemsConfig, field: str) -> bool:
    """A field that was named must exist; the default one may be absent."""
    return getattr(config, field) != ProblemsConfig.model_fields[field].default


def _texts(record: dict) -> str:
    return ", ".join(sorted(record)) or "none"


def score_exact(problem: Problem, response: str) -> Score:
    if problem.reference is None:
        return Score(solution=None)
    return Score(solution=response.strip() == problem.reference.strip())


BENCHMARKS = {
    "coins": Benchmark(coins_problems, score_coins),
    "jsonl": Benchmark(jsonl_problems, score_exact),
}

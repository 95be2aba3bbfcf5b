"""Load sets of problems, check that they are disjoint, and identify them by digests."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path

from dparallel.config.problems import EMBEDDED, LM_EVAL, ColumnText, ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.embedded import embedded_task
from dparallel.problems.scoring import check_scorable, scorers_of
from dparallel.problems.sources import Problem, ProblemsError, dataset_problems
from dparallel.problems.splits import hub_revision
from dparallel.stages.manifest import Manifest, StageError, digest


def load_problems(config: ProblemsConfig) -> list[Problem]:
    """Load the problems of `config`, in the same order every time.

    Raises:
        ProblemsError: a data set is missing, empty, too short or not as declared; a scorer is unknown or
            cannot judge responses to one of the problems.
    """
    scorers_of(config.protocol)  # raises before data are read
    problems = LOADERS[config.benchmark](config)
    check_scorable(problems, config.protocol, need_references=False)
    return problems


def protocol_of(config: ProblemsConfig) -> ProtocolConfig:
    """The protocol by which the problems of `config` are asked and judged.

    Raises:
        ProblemsError: the task of lm-eval that says it is unknown.
    """
    if config.benchmark != LM_EVAL:
        return config.protocol
    from dparallel.problems.lm_eval_tasks import protocol_of_task  # imported here because lm-eval is optional

    return protocol_of_task(config)


def check_disjoint(sets: Mapping[str, Sequence[Problem]]) -> None:
    """Raise a ProblemsError that names the first two of the `sets` that share a prompt."""
    prompts = {name: {problem.prompt for problem in problems} for name, problems in sets.items()}
    for one, other in combinations(prompts, 2):
        if shared := prompts[one] & prompts[other]:
            raise ProblemsError(
                f"{one} and {other} share {len(shared)} prompts, such as {min(shared)!r}: "
                "problems for measuring must not be used for training or selection; give disjoint sets"
            )


def problems_digest(problems: Sequence[Problem], extra: bool = False) -> str:
    """Digest of problems in their order, independent of the files they came from.

    Args:
        extra: include columns that only scorers read. Without them, the digest covers prompts and references,
            and further columns do not change it.
    """
    return digest([_content(problem, extra) for problem in problems])


def _content(problem: Problem, extra: bool) -> dict:
    content: dict = {
        "problem_id": problem.problem_id,
        "source": problem.source,
        "prompt": problem.prompt,
        "reference": problem.reference,
    }
    if problem.prefill:
        content["prefill"] = problem.prefill
    if problem.turns:
        content["turns"] = problem.turns
    if extra and problem.extra:
        content["extra"] = problem.extra
    return content


def data_of(config: ProblemsConfig) -> list[str]:
    """Where problems come from: files, folders, or data sets on the Hub with their commit; with splits."""
    if config.benchmark in EMBEDDED:
        return [f"generated: {config.benchmark}, split {config.split}, seed {config.seed}"]
    if config.benchmark == LM_EVAL:
        local = [f"{file} {split}" for split, file in config.data_files.items()]
        return local or [f"the data set of lm-eval's task {config.task}"]
    commits = [(read, hub_revision(read)) for read, _ in config.reads()]
    return [read.label if commit is None else f"{read.label} @{commit}" for read, commit in commits]


def check_unchanged(folder: Path, done: Manifest, digest_now: str) -> None:
    """Raise a StageError if the problems of a finished stage changed; `done.details` holds their digest."""
    if done.details["problems"] != digest_now:
        raise StageError(
            f"{folder} was made from other problems (their file changed, or the code that reads it): move it "
            "aside and rerun"
        )


def generated_problems(config: ProblemsConfig) -> list[Problem]:
    """The first `config.count` problems of a split of an embedded task."""
    task = embedded_task(config.benchmark)
    drawn = islice(task.problems(config.split, config.seed or 0), config.count)
    return [
        Problem(
            problem_id=f"{task.name}-{config.split}-{config.seed}-{index:05d}",
            source=f"{task.name}/{config.split}",
            prompt=problem.prompt,
            prefill=ColumnText(config.protocol.prefill).fill({}),
            reference=task.draw_solution(problem, random.Random(problem.prompt)),
        )
        for index, problem in enumerate(drawn)
    ]


def lm_eval_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of a task of lm-eval."""
    from dparallel.problems.lm_eval_tasks import task_problems  # imported here because lm-eval is optional

    return task_problems(config)


LOADERS = {
    **dict.fromkeys(EMBEDDED, generated_problems),
    "dataset": dataset_problems,
    LM_EVAL: lm_eval_problems,
}

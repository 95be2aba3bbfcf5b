"""Prompts of the teacher that hold the reference answer."""

from collections.abc import Sequence
from dataclasses import replace

from dparallel.config.experiment import PrivilegedConfig
from dparallel.config.sources import ColumnText
from dparallel.problems.sources import Problem, ProblemsError


def with_reference(problems: Sequence[Problem], privileged: PrivilegedConfig) -> list[Problem]:
    """The problems with questions that hold their reference answers.

    Raises:
        ProblemsError: names the first problem without a reference.
    """
    text, asked = ColumnText(privileged.prompt), []
    for problem in problems:
        if problem.reference is None:
            raise ProblemsError(
                f"{problem.where} has no reference, with which trajectories.privileged asks: name "
                "the column of the references, or drop trajectories.privileged"
            )
        question = text.fill({"prompt": problem.prompt, "reference": problem.reference})
        asked.append(replace(problem, prompt=question))
    return asked

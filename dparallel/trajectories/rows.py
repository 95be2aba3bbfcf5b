"""The rows of a trajectory shard, one per decoded prompt."""

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dparallel.config.experiment import TrajectoriesConfig
from dparallel.decoding.canvas import Generation
from dparallel.problems.judging import judged
from dparallel.problems.prompts import finish
from dparallel.problems.registry import protocol_of
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import Problem
from dparallel.trajectories.schema import TEACHER_PROMPT

FROM_ROW = ("commit_step", "confidence", "nfe", "num_tokens")  # of a Generation, named as the columns


def identity(problem: Problem) -> dict[str, str | None]:
    """Columns that a shard stores of a problem, for comparison with the requested problem."""
    return {
        "problem_id": problem.problem_id,
        "source": problem.source,
        "prompt": problem.prompt,
        "reference": problem.reference,
    }


def rows(
    config: TrajectoriesConfig,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    generations: Sequence[Generation],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    teacher_prompts: Sequence[list[int]] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a shard, in the columns of `schema.SCHEMA`; the responses are ended and judged here.

    Args:
        teacher_prompts: the prompts with the reference answers, if they are recorded.
    """
    protocol = protocol_of(config.problems)
    responses = [
        finish(generation.tokens, tokenizer, end_token_ids, protocol.stops) for generation in generations
    ]
    scorer, metric = scorers_of(protocol)[0], accuracy_metric(protocol)
    verdicts = dict(judged(scorer, problems, responses))
    return [
        {
            **identity(problem),
            "prompt_ids": prompt,
            "response_ids": generation.tokens,
            "commit_step": generation.commit_step,
            "confidence": generation.confidence,
            "response": response,
            "correct": verdicts[place].metrics[metric],
            "nfe": generation.nfe,
            "num_tokens": generation.num_tokens,
            "seed": config.decoding.seed,
            **({} if teacher_prompts is None else {TEACHER_PROMPT: teacher_prompts[place]}),
        }
        for place, (problem, prompt, generation, response) in enumerate(
            zip(problems, prompts, generations, responses, strict=True)
        )
    ]


def generations_of(table: pa.Table) -> list[Generation]:
    """What the model decoded, from the rows of a shard."""
    names = {"tokens": "response_ids", **{name: name for name in FROM_ROW}}
    columns = {name: table[column].to_pylist() for name, column in names.items()}
    return [Generation(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

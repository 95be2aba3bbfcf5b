"""The rows of a trajectory shard, one per decoded prompt."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dparallel.config.experiment import TrajectoriesConfig
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.judging import score
from dparallel.problems.prompts import finish
from dparallel.problems.scoring import accuracy_metric
from dparallel.problems.sources import Problem


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
    model: DiffusionTransformer,
) -> list[dict[str, Any]]:
    """The rows of a shard, in the columns of `schema.COLUMNS`."""
    protocol = config.problems.protocol
    ends = model.config.end_token_ids
    responses = [finish(generation.tokens, tokenizer, ends, protocol.stops) for generation in generations]
    verdicts = score(problems, responses, protocol)
    metric = accuracy_metric(protocol)
    return [
        {
            **identity(problem),
            "prompt_ids": prompt,
            "response_ids": generation.tokens,
            "commit_step": generation.commit_step,
            "confidence": generation.confidence,
            "response": response,
            "correct": verdict.metrics[metric],
            "nfe": generation.nfe,
            "num_tokens": generation.num_tokens,
            "seed": config.decoding.seed,
        }
        for problem, prompt, generation, response, verdict in zip(
            problems, prompts, generations, responses, verdicts, strict=True
        )
    ]

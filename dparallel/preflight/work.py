"""Estimate the forward passes that an experiment still needs, at most and roughly at least.

How many tokens a rule with a threshold commits in a forward pass is not known before: at most, it commits one
token, and at least, a whole block. All canvases of a set are taken to be as long as its longest one, and all
responses to be decoded to their end.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dparallel.config.benchmark import BenchmarkConfig, Split
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import DistillConfig
from dparallel.evaluation.bench import responses_to_each
from dparallel.evaluation.decode import LATENCY_SAMPLES
from dparallel.preflight.progress import Progress
from dparallel.preflight.prompts import PromptLengths
from dparallel.problems.registry import protocol_of


@dataclass(frozen=True)
class Forwards:
    """Number of rows, and of canvas tokens, in forward passes; a backward pass counts as forward passes."""

    rows: int
    tokens: int


def forwards_by_stage(
    config: DistillConfig, lengths: PromptLengths, trained_length: int, done: Progress, most: bool = True
) -> dict[str, Forwards]:
    """Forward passes that every stage that runs a model still needs.

    A training and a benchmark that have begun are counted whole.

    Args:
        trained_length: tokens of the longest training canvas.
        done: what is there already.
        most: whether thresholds commit one token in a forward pass, or else a whole block.
    """
    left = lengths.trajectories[done.rows :] if config.trajectories.imported is None else []
    return {
        "trajectories": _decoded(left, config.trajectories.decoding, most),
        "training": _trained(config, len(lengths.trajectories), trained_length, done, most),
        **_fitted(config, lengths.trajectories, done),
        **{
            f"benchmark {name}": _total(
                []
                if name in done.benchmarks
                else _measured(config.benchmarks[name], by_split, config.students, most)
            )
            for name, by_split in lengths.benchmarks.items()
        },
    }


def _trained(config: DistillConfig, trajectories: int, length: int, done: Progress, most: bool) -> Forwards:
    training, rows = config.training, 0
    for student, recipe in config.recipes.items():
        if student in done.students:
            continue
        samples = training.views_per_step // recipe.views
        steps = training.train_steps or math.ceil((training.epochs or 0) * trajectories / samples)
        # The backward pass multiplies with each frozen matrix once, like a forward pass.
        passes = (
            (3 if training.gradient_checkpointing else 2) + recipe.asks_teacher + (recipe.own_tokens or 0)
        )
        rows += math.ceil(steps * training.views_per_step * passes)
        if (own := recipe.rollouts) is not None:
            prompts = math.ceil(steps / own.every) * min(own.prompts, trajectories)
            rows += _decoded([length - own.decoding.gen_length] * prompts, own.decoding, most).rows
    return Forwards(rows, rows * length)


def _fitted(config: DistillConfig, trajectories: Sequence[int], done: Progress) -> dict[str, Forwards]:
    """Merging, if a commit rule is fitted then; merging itself runs the model on a few prompts only."""
    if (fitted := config.merging.commit_rule) is None:
        return {}
    students = len(config.students) - done.merged
    rows = students * min(fitted.trajectories, len(trajectories)) * fitted.canvases
    longest = max(trajectories, default=0) + config.trajectories.decoding.gen_length
    return {"commit rules": Forwards(rows, rows * longest)}


def _measured(
    benchmark: BenchmarkConfig, lengths: Mapping[Split, Sequence[int]], students: Iterable[str], most: bool
) -> Iterator[Forwards]:
    """Forward passes of all measurements, including the timing of single prompts.

    Sweeps are decoded on the validation problems, and on the test problems at one threshold. At most, the
    teacher's sweeps are decoded there at all thresholds, if none of them keeps the accuracy.
    """
    fixed = [benchmark.reference, *benchmark.fixed.values()]
    fixed += benchmark.baseline_decodings.values()
    students = list(students)
    fixed += [decoding for student in students for decoding in benchmark.fixed_of(student).values()]
    protocols = {split: protocol_of(problems) for split, problems in benchmark.splits().items()}

    def decoded(split: Split, decoding: DecodingConfig) -> Forwards:
        responses = responses_to_each(protocols[split], decoding)
        return _decoded(lengths[split], decoding, most, LATENCY_SAMPLES, responses)

    for decoding in fixed:
        yield from (decoded(split, decoding) for split in lengths)
    models = [(benchmark.teacher_sweeps, most or benchmark.sweep_test)]
    models += [(benchmark.sweeps_of(student), benchmark.sweep_test) for student in students]
    for names, all_on_test in models:
        for name in names:
            decodings = benchmark.sweeps[name].decodings()
            on_test = decodings if all_on_test else decodings[:1]
            on_split = {"validation": decodings, "test": on_test}
            for split in lengths:
                yield from (decoded(split, decoding) for decoding in on_split[split])


def _decoded(
    prompts: Sequence[int], decoding: DecodingConfig, most: bool, timed: int = 0, responses: int = 1
) -> Forwards:
    """As many responses to all prompts, each decoded once, and of the first `timed` a second time."""
    if not prompts:
        return Forwards(0, 0)
    passes = decoding.most_forwards if most else decoding.steps or decoding.blocks
    rows = responses * (len(prompts) + min(timed, len(prompts))) * passes
    return Forwards(rows, rows * (max(prompts) + decoding.gen_length))


def _total(parts: Iterable[Forwards]) -> Forwards:
    every = list(parts)
    return Forwards(sum(part.rows for part in every), sum(part.tokens for part in every))

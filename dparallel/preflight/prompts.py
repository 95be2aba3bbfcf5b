"""How long the prompts are, and which of them are decoded how: what every estimate starts from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, DistillConfig


@dataclass(frozen=True)
class PromptLengths:
    """Lengths in tokens of the prompts of each set of problems; a set that was not looked at is empty."""

    trajectories: Sequence[int] = ()
    test: Sequence[int] = ()
    validation: Sequence[int] = ()


def measured_decodings(benchmark: BenchmarkConfig) -> dict[str, DecodingConfig]:
    """Each way in which the teacher or a student is measured, at any one threshold, by its setting's name."""
    sweeps = dict.fromkeys((*benchmark.teacher_sweeps, *benchmark.all_student_sweeps))
    return {
        "benchmark.reference": benchmark.reference,
        **{f"benchmark.fixed.{name}": decoding for name, decoding in benchmark.fixed.items()},
        **{f"benchmark.sweeps.{name}.decoding": benchmark.sweeps[name].decoding for name in sweeps},
    }


def decodings(
    config: DistillConfig, lengths: PromptLengths
) -> Iterator[tuple[Sequence[int], DecodingConfig]]:
    """The prompts' lengths of every set, with each decoding that the set is decoded by."""
    if lengths.trajectories:
        yield lengths.trajectories, config.trajectories.decoding
    baselines = [baseline.decoding for baseline in config.benchmark.baselines.values()]
    for prompts in filter(None, (lengths.test, lengths.validation)):
        for decoding in (*measured_decodings(config.benchmark).values(), *baselines):
            yield prompts, decoding

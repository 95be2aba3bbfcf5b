"""Prompt lengths and the decodings applied to them, the basis of all estimates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, DistillConfig


@dataclass(frozen=True)
class PromptLengths:
    """Prompt lengths in tokens by set of problems; empty for a set that was not read."""

    trajectories: Sequence[int] = ()
    test: Sequence[int] = ()
    validation: Sequence[int] = ()


def measured_decodings(benchmark: BenchmarkConfig) -> dict[str, DecodingConfig]:
    """The decodings with which teacher and students are measured (one threshold each), by setting name."""
    sweeps = dict.fromkeys((*benchmark.teacher_sweeps, *benchmark.all_student_sweeps))
    return {
        "benchmark.reference": benchmark.reference,
        **{f"benchmark.fixed.{name}": decoding for name, decoding in benchmark.fixed.items()},
        **{f"benchmark.sweeps.{name}.decoding": benchmark.sweeps[name].decoding for name in sweeps},
    }


def decodings(
    config: DistillConfig, lengths: PromptLengths
) -> Iterator[tuple[Sequence[int], DecodingConfig]]:
    """Pairs of a set's prompt lengths and a decoding applied to this set."""
    if lengths.trajectories:
        yield lengths.trajectories, config.trajectories.decoding
    baselines = [baseline.decoding for baseline in config.benchmark.baselines.values()]
    for prompts in filter(None, (lengths.test, lengths.validation)):
        for decoding in (*measured_decodings(config.benchmark).values(), *baselines):
            yield prompts, decoding

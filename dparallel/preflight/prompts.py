"""Prompt lengths and the decodings applied to them, the basis of all estimates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dparallel.config.benchmark import BenchmarkConfig, Split
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import DistillConfig


@dataclass(frozen=True)
class PromptLengths:
    """Prompt lengths in tokens by set of problems; empty for a set that was not read.

    Attributes:
        trajectories: of the problems of the recording.
        benchmarks: by name of the benchmark and split.
    """

    trajectories: Sequence[int] = ()
    benchmarks: Mapping[str, Mapping[Split, Sequence[int]]] = field(default_factory=dict)


def measured_decodings(
    benchmark: BenchmarkConfig, setting: str, students: Iterable[str]
) -> dict[str, DecodingConfig]:
    """The decodings with which teacher and students are measured (one threshold each), by setting name.

    Args:
        setting: name of the setting that `benchmark` is.
    """
    sweeps = dict.fromkeys((*benchmark.teacher_sweeps, *benchmark.sweeps_of_any(students)))
    return {
        f"{setting}.reference": benchmark.reference,
        **{f"{setting}.fixed.{name}": decoding for name, decoding in benchmark.fixed.items()},
        **{f"{setting}.sweeps.{name}.decoding": benchmark.sweeps[name].decoding for name in sweeps},
    }


def decodings(
    config: DistillConfig, lengths: PromptLengths
) -> Iterator[tuple[Sequence[int], DecodingConfig]]:
    """Pairs of a set's prompt lengths and a decoding applied to this set."""
    if lengths.trajectories:
        yield lengths.trajectories, config.trajectories.decoding
    for name, by_split in lengths.benchmarks.items():
        benchmark = config.benchmarks[name]
        measured = measured_decodings(benchmark, name, config.students).values()
        baselines = benchmark.baseline_decodings.values()
        for prompts in by_split.values():
            for decoding in (*measured, *baselines):
                yield prompts, decoding

"""Which student becomes candidate and champion, and why: decided from finished benchmarks, without MLflow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dparallel.config.experiment import PromotionConfig
from dparallel.evaluation.cases import STUDENT
from dparallel.reporting.paired import Paired, PairedMeans, PairedResamples, paired_values
from dparallel.reporting.read import Benchmark, benchmark_name, read_benchmark
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, digest

CANDIDATE, CHAMPION = "candidate", "champion"
KEEPING = "students_that_keep_the_accuracy"  # detail of a benchmark's manifest
SIGNIFICANT = 0.05  # p-value of the paired test, below which an accuracy is higher
ROUNDING = 1e-9


class Evidence(BaseModel):
    """How a student did on the test problems of a benchmark; kept with the run for later comparisons.

    Attributes:
        fingerprint: of the student's merged model.
        protocol, problems: digests of how problems are asked and judged, and of their ids and prompts.
        verdicts: for each problem 0, 1 or a value between; None if unknown.
        pooled: whether the accuracy is a number of all responses together, without verdicts.
        resamples: that number of random selections, see `Measurement`.
        decoding: the student's.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str
    student: str
    fingerprint: str
    protocol: str
    problems: str
    verdicts: list[float | None]
    pooled: bool = False
    resamples: list[float | None] = []
    accuracy: float
    nfe: float
    teacher_accuracy: float
    teacher_nfe: float
    decoding: dict[str, Any]


class Undecided(Exception):
    """No student is nominated; the message says why."""


def nominated(folders: Sequence[str]) -> list[Evidence]:
    """The evidence on the default student, one for each benchmark of the experiment.

    It must be the default student of every benchmark, and keep the accuracy on the test problems of each.

    Raises:
        Undecided: there is no such student, or a benchmark is not finished.
    """
    unfinished = [folder for folder in folders if not is_there(Path(folder) / MANIFEST)]
    if unfinished:
        raise Undecided(f"{', '.join(Path(folder).name for folder in unfinished)} is not finished")
    benchmarks = [read_benchmark(benchmark_name(Path(folder)), folder) for folder in folders]
    for benchmark in benchmarks:
        if benchmark.default_student is None:
            raise Undecided(f"no student is the default on {benchmark.name}")
    chosen = {benchmark.name: str(benchmark.default_student) for benchmark in benchmarks}
    if len(set(chosen.values())) > 1:
        named = ", ".join(f"{name}: {student.removeprefix(STUDENT)}" for name, student in chosen.items())
        raise Undecided(f"the benchmarks have different default students ({named})")
    for benchmark in benchmarks:
        student = chosen[benchmark.name]
        if benchmark.best.measurement.accuracy == 0:
            raise Undecided(f"{student} solves none of the test problems of {benchmark.name}")
        if student not in benchmark.manifest.details[KEEPING]:
            raise Undecided(
                f"{student} loses more than {benchmark.max_loss * 100:.1f} points on the test problems of "
                f"{benchmark.name}"
            )
    return [evidence(benchmark) for benchmark in benchmarks]


def evidence(benchmark: Benchmark) -> Evidence:
    """The evidence on the best student of a benchmark."""
    row, teacher = benchmark.best, benchmark.reference.measurement
    answers = benchmark.answers(row)
    return Evidence(
        benchmark=benchmark.name,
        student=row.model.removeprefix(STUDENT),
        fingerprint=benchmark.manifest.inputs[row.model],
        protocol=digest(benchmark.protocol),
        problems=digest([[*key] for key in answers.places]),
        verdicts=[None if verdict is None else float(verdict) for verdict in answers.verdicts],
        pooled=answers.pooled,
        resamples=list(row.measurement.resamples),
        accuracy=row.measurement.accuracy,
        nfe=row.measurement.nfe,
        teacher_accuracy=teacher.accuracy,
        teacher_nfe=teacher.nfe,
        decoding=row.measurement.decoding.model_dump(mode="json", exclude_none=True),
    )


def beats_teacher(found: Sequence[Evidence], settings: PromotionConfig) -> tuple[bool, str]:
    """Whether a student keeps the teacher's accuracy with fewer forwards, on each benchmark; and why."""
    reasons = []
    for one in found:
        change = one.accuracy - one.teacher_accuracy
        numbers = (
            f"{change * 100:+.1f} points from the teacher's accuracy ({settings.max_loss * 100:.1f} may be "
            f"lost), NFE {one.nfe:.1f} against {one.teacher_nfe:.1f} on {one.benchmark}"
        )
        if change < -settings.max_loss - ROUNDING or one.nfe >= one.teacher_nfe:
            return False, numbers
        reasons.append(numbers)
    return True, "; ".join(reasons)


def beats_champion(
    found: Sequence[Evidence], champion: Mapping[str, Evidence], settings: PromotionConfig
) -> tuple[bool, str]:
    """Whether a student is better than the champion on the same problems; and why.

    On each benchmark it must lose at most the margin and take no more forwards, and on one of them it must
    take fewer, or have an accuracy that is higher by a paired test.

    Args:
        champion: evidence on the champion by benchmark.
    """
    reasons, better = [], False
    missing = sorted(set(champion) - {one.benchmark for one in found})
    if missing and not settings.replace_other_samples:
        text = f"the champion was also measured on {', '.join(missing)}"
        return False, f"{text}; promotion.replace_other_samples=true replaces it"
    for one in found:
        other = champion.get(one.benchmark)
        differs = _different_samples(one, other)
        if differs or other is None:
            replaced = settings.replace_other_samples
            text = f"the champion was measured on {differs} {one.benchmark}"
            return replaced, text if replaced else f"{text}; promotion.replace_other_samples=true replaces it"
        paired = _paired(other, one)
        reasons.append(
            f"{paired.difference * 100:+.1f} points from the champion's accuracy (p {paired.p_value:.2g}), "
            f"NFE {one.nfe:.1f} against {other.nfe:.1f} on the same {paired.samples:,} problems of "
            f"{one.benchmark}"
        )
        if paired.difference < -settings.max_loss - ROUNDING or one.nfe > other.nfe + ROUNDING:
            return False, reasons[-1]
        higher = paired.difference > 0 and paired.p_value < SIGNIFICANT
        better = better or higher or one.nfe < other.nfe - ROUNDING
    return better, "; ".join(reasons)


def _different_samples(one: Evidence, other: Evidence | None) -> str | None:
    """What of the samples differs, in words that the benchmark's name follows; None if they are the same."""
    if other is None:
        return "other benchmarks, without"
    if one.protocol != other.protocol:
        return "another protocol of"
    return "other problems of" if one.problems != other.problems else None


def _paired(before: Evidence, after: Evidence) -> Paired | PairedMeans | PairedResamples:
    if before.pooled or after.pooled:
        draws = zip(before.resamples, after.resamples, strict=False)
        return PairedResamples.of(len(after.verdicts), (before.accuracy, after.accuracy), draws)
    return paired_values(list(zip(before.verdicts, after.verdicts, strict=True)))

"""The content of reports as JSON values: the papers' table, AUP, and paired comparisons.

All times, which differ between repetitions, lie under the keys `times`.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.cases import STUDENT
from dparallel.evaluation.plots import plain
from dparallel.evaluation.selection import Row
from dparallel.reporting.aup import MEANING, Aup, anchor, aup, aup_2
from dparallel.reporting.paired import Paired, PairedMeans, PairedResamples, paired_values
from dparallel.reporting.read import Benchmark

Json = dict[str, Any]
Measured = tuple[Benchmark, Row]
Pair = tuple[Measured, Measured]  # before, after
Comparison = Paired | PairedMeans | PairedResamples


def summary(benchmarks: Sequence[Benchmark]) -> list[Json]:
    """A section for each benchmark, with the rows of all its runs.

    Args:
        benchmarks: in the order of their sections; those of the same name are runs of the same benchmark.
    """
    return [_section(name, of_name) for name, of_name in by_name(benchmarks).items()]


def by_name(benchmarks: Iterable[Benchmark]) -> dict[str, list[Benchmark]]:
    """Benchmarks by name, in order."""
    groups: dict[str, list[Benchmark]] = {}
    for benchmark in benchmarks:
        groups.setdefault(benchmark.name, []).append(benchmark)
    return groups


def compared(runs: Sequence[Benchmark]) -> list[Pair]:
    """Pairs of rows whose accuracies are compared, each as (before, after).

    Rows of later runs with those of the first run: the best students, equal models and methods, and other
    students with its best one. Then every row with the reference of its run, and the students of a run that
    are decoded by the same method with each other.
    """
    first, *later = runs
    pairs: list[Pair] = []
    before = {(row.model, row.method): row for row in first.reported}
    for run in later:
        for row in run.reported:
            named = before.get((row.model, row.method), first.best if _is_student(row) else None)
            other = first.best if row == run.best else named
            if other is not None:
                pairs.append(((first, other), (run, row)))
    for run in runs:
        pairs += [((run, run.reference), (run, row)) for row in run.reported if row != run.reference]
        students = filter(_is_student, run.reported)
        pairs += [
            ((run, one), (run, other))
            for one, other in combinations(students, 2)
            if one.method == other.method
        ]
    return pairs


def _is_student(row: Row) -> bool:
    return row.model.startswith(STUDENT)


def paired(before: Measured, after: Measured) -> Comparison | None:
    """Compare two rows on the problems that both have; equal ids and prompts make equal problems.

    Returns:
        None if the accuracies are different metrics; or numbers of all responses together, and those are to
        different problems.
    """
    first, second = (benchmark.answers(row) for benchmark, row in (before, after))
    if (first.metric, first.pooled) != (second.metric, second.pooled):
        return None
    if first.pooled:
        one, other = before[1].measurement, after[1].measurement
        if list(first.places) != list(second.places) or one.problems != other.problems:
            return None
        draws = zip(one.resamples, other.resamples, strict=False)
        return PairedResamples.of(one.problems, (one.accuracy, other.accuracy), draws)
    values = [
        (first.verdicts[place], second.verdicts[second.places[problem]])
        for problem, place in first.places.items()
        if problem in second.places
    ]
    return paired_values(values)


def _section(name: str, runs: Sequence[Benchmark]) -> Json:
    two = aup_2(runs)
    splits = {run.sweep_split for run in runs}
    over_sweeps = aup(runs) if len(splits) == 1 else None
    curves = over_sweeps.values if over_sweeps else {}
    return {
        "benchmark": name,
        "runs": [_run(run) for run in runs],
        "rows": [_row(run, row, two, over_sweeps) for run in runs for row in run.reported],
        "aup_2": {"meaning": MEANING, "split": "test", "y_max": two.y_max},
        "aup": (
            {"meaning": MEANING, "split": splits.pop(), "y_max": over_sweeps.y_max}
            if over_sweeps and curves
            else None
        ),
        "paired": [_pair(*pair) for pair in compared(runs)],
    }


def _run(run: Benchmark) -> Json:
    return {
        "run": run.run,
        "stage": run.folder.name,
        "problems": run.reference.measurement.samples // run.reference.measurement.repeats,
        "outcome": run.outcome,
        "default_student": run.default_student,
        "max_loss": run.max_loss,
        "started_with": run.started,
        "data": run.data,
        "decodings": {
            f"{plain(row.model)}, {plain(row.method)}": _stated(row.measurement.decoding)
            for row in run.reported
        },
        "training": run.training(),
        "protocol": run.protocol,
        "code": run.manifest.code,
        "versions": run.manifest.versions,
        "devices": run.devices,
    }


def _stated(decoding: DecodingConfig) -> Json:
    """The settings of a decoding that shape it, and others that are not at their default."""
    fields = DecodingConfig.model_fields
    return {
        name: value
        for name, value in decoding.model_dump(mode="json").items()
        if name in ("gen_length", "block_length", "rule") or value != fields[name].default
    }


def _row(run: Benchmark, row: Row, two: Aup, over_sweeps: Aup | None) -> Json:
    measured, base = row.measurement, run.reference.measurement
    group = run.run, row.model, row.method
    begins = anchor(run, row)
    return {
        **_named(run, row),
        "threshold": row.threshold,
        "operating_point": row.operating_point,
        "qualifies": row.qualifies,
        "default": run.default_student is not None and row == run.best and row.qualifies,
        "samples": measured.samples,
        "problems": measured.problems,
        "accuracy": measured.accuracy,
        "accuracy_stderr": measured.accuracy_stderr,
        "accuracy_interval": list(measured.accuracy_interval),
        "metrics": measured.metrics,
        "intervals": {name: list(ends) for name, ends in measured.intervals.items()},
        "judged": measured.judged,
        "scores": measured.scores,
        "stderrs": measured.stderrs,
        "graded": list(measured.graded),
        "pooled": list(measured.pooled),
        "lower_is_better": list(measured.lower_is_better),
        "nfe": measured.nfe,
        "nfe_speed_up": base.nfe / measured.nfe,
        "tpf": measured.tpf,
        "aup_2": two.values[group],
        "aup_2_from": {
            "model": begins.model,
            "method": begins.method,
            "tpf": begins.measurement.tpf,
            "accuracy": begins.measurement.accuracy,
        },
        "aup": over_sweeps.values.get(group) if over_sweeps else None,
        "device": measured.hardware,
        "sandbox": measured.sandbox,
        "batch_sizes": list(measured.batch_sizes),
        "decoding": measured.decoding.model_dump(mode="json"),
        "times": {
            "latency": measured.latency,
            "latency_speed_up": (
                base.latency / measured.latency
                if measured.latency and measured.hardware == base.hardware
                else None
            ),
            "tps": measured.tps,
            "measured_on": list(measured.measured_on),
            "reused": measured.reused,
        },
    }


def _pair(before: Measured, after: Measured) -> Json:
    named = {"before": _named(*before), "after": _named(*after)}
    if before[1].keys is not None and before[1].keys == after[1].keys:
        return {**named, **_same(before[1].measurement.problems)}
    found = paired(before, after)
    if found is None:
        unknown = dict.fromkeys(("lost", "gained", "difference", "p_value"))
        return {**named, "test": "none", "problems": 0, **unknown, "interval": [None, None]}
    low, high = found.interval if found.samples else (None, None)
    return {
        **named,
        "test": found.test,
        "problems": found.samples,
        **_counts(found),
        "difference": found.difference if found.samples else None,
        "interval": [low, high],
        "p_value": found.p_value,
    }


def _same(problems: int) -> Json:
    """The comparison of a measurement with itself, in which nothing is tested."""
    counts = {"lost": 0, "gained": 0, "difference": 0.0}
    return {"test": "same", "problems": problems, **counts, "interval": [None, None], "p_value": None}


def _counts(found: Comparison) -> Json:
    """What is counted of problems: none where verdicts are on all of them together."""
    if isinstance(found, Paired):
        return {name: getattr(found, name) for name in ("both", "lost", "gained", "neither")}
    counts = {name: getattr(found, name, None) for name in ("lost", "gained")}
    return {**counts, "stderr": found.stderr if found.samples else None}


def _named(run: Benchmark, row: Row) -> Json:
    return {"run": run.run, "model": row.model, "method": row.method}

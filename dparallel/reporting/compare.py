"""Compare past runs: one table, paired tests on the same problems, and warnings where runs differ."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dparallel.reporting.differing import differing_settings
from dparallel.reporting.document import Document
from dparallel.reporting.find import Found, RunError, find_run
from dparallel.reporting.read import Benchmark, read_benchmark
from dparallel.reporting.summary import by_name

STEM = "comparison"


def compare(given: Sequence[str], runs: Path) -> Document:
    """Compare runs with the first of them.

    Args:
        given: two or more runs as `find.find_run` takes them.
        runs: folder of experiments.

    Raises:
        RunError: one of them is no run, is unfinished or is given twice, or two have nothing in common.
        StageError: results or samples are damaged or missing.
    """
    found = [find_run(name, runs) for name in given]
    _refuse_twice(found)
    labels = _labels(found)
    benchmarks = [
        read_benchmark(name, folder, run=label)
        for run, label in zip(found, labels, strict=True)
        for name, folder in run.stages
    ]
    shared = {name: of_name for name, of_name in by_name(benchmarks).items() if len(of_name) > 1}
    if not shared:
        measured = "; ".join(
            f"{label}: {', '.join(name for name, _ in run.stages)}"
            for run, label in zip(found, labels, strict=True)
        )
        raise RunError(f"the runs have no benchmark in common ({measured}): give runs of the same benchmark")
    notes = [note for run in found for note in run.notes]
    notes += [
        f"{name} was measured by {of_name[0].run} alone and is left out"
        for name, of_name in by_name(benchmarks).items()
        if len(of_name) == 1
    ]
    for of_name in shared.values():
        notes += [text for run in of_name[1:] for text in warnings(of_name[0], run)]
    lead = f"{', '.join(labels[1:])} compared with {labels[0]}, on the same problems."
    return Document(
        "Comparison of runs",
        " and ".join(labels),
        lead,
        compared := [benchmark for of_name in shared.values() for benchmark in of_name],
        warnings=notes,
        settings=differing_settings(compared),
    )


def warnings(first: Benchmark, other: Benchmark) -> list[str]:
    """What to know before the numbers of two runs of a benchmark are compared.

    Raises:
        RunError: they have no problem in common.
    """
    name, runs = first.name, f"{first.run} and {other.run}"
    texts = [_problems(first, other), _metrics(first, other)]
    if first.devices != other.devices:
        on = [f"{run.run} on {' and on '.join(run.devices)}" for run in (first, other)]
        texts.append(
            f"{name}: measured on different devices: {'; '.join(on)}. Latency and TPS do not compare, and "
            "accuracy may depend on the device"
        )
    together = [run.batch_sizes for run in (first, other)]
    if together[0] != together[1]:
        texts.append(f"{name}: different batch sizes ({_listed(together)}): TPS of {runs} do not compare")
    judged_in = [run.reference.measurement.sandbox or "none" for run in (first, other)]
    if len(set(judged_in)) > 1:
        texts.append(f"{name}: the code of {runs} was judged in different sandboxes ({', '.join(judged_in)})")
    if first.protocol["scorers"] == other.protocol["scorers"] and first.judges != other.judges:
        texts.append(
            f"{name}: {runs} were judged by other versions of their scorers, or of the libraries that these "
            "use: run the older one again, which judges its stored responses again and decodes nothing"
        )
    changed = _changed(first.protocol, other.protocol)
    if changed:
        texts.append(f"{name}: {runs} have different protocols ({', '.join(changed)})")
    mine, theirs = first.reference.measurement.decoding, other.reference.measurement.decoding
    if mine != theirs:
        changed = _changed(mine.model_dump(), theirs.model_dump())
        texts.append(f"{name}: the references of {runs} are decoded differently ({', '.join(changed)})")
    if first.selects and other.selects and first.max_loss != other.max_loss:
        texts.append(
            f"{name}: thresholds were chosen with different accepted losses of accuracy "
            f"({first.max_loss * 100:g} points in {first.run}, {other.max_loss * 100:g} in {other.run})"
        )
    started = [run.started for run in (first, other)]
    if started[0] != started[1]:
        texts.append(f"{name}: {first.run} was started with {started[0]}, {other.run} with {started[1]}")
    changed = _changed(first.manifest.versions, other.manifest.versions)
    versions = [
        f"{library} {first.manifest.versions.get(library)} and {other.manifest.versions.get(library)}"
        for library in changed
    ]
    if first.manifest.code != other.manifest.code:
        versions.append(f"code {first.manifest.code} and {other.manifest.code}")
    if versions:
        texts.append(f"{name}: {runs} were measured with different versions ({'; '.join(versions)})")
    if first.sweep_split != other.sweep_split:
        texts.append(
            f"{name}: {first.run} measured whole sweeps on {first.sweep_split} problems, {other.run} on "
            f"{other.sweep_split} problems: AUP is left out, and the picture compares different problems"
        )
    return [text for text in texts if text is not None]


def _problems(first: Benchmark, other: Benchmark) -> str | None:
    mine, theirs = (set(run.answers(run.reference).places) for run in (first, other))
    common = len(mine & theirs)
    if not common:
        raise RunError(
            f"{first.name}: {first.run} and {other.run} have no problem in common (equal ids and prompts): "
            "compare runs with the same test problems and the same prompt"
        )
    if mine == theirs:
        return None
    return (
        f"{first.name}: different problems ({len(mine):,} of {first.run}, {len(theirs):,} of {other.run}, "
        f"{common:,} in both): compare accuracies by the paired differences, which are over those in both"
    )


def _metrics(first: Benchmark, other: Benchmark) -> str | None:
    mine, theirs = first.metric, other.metric
    if mine == theirs:
        return None
    return (
        f"{first.name}: the accuracy of {first.run} is the metric {mine}, that of {other.run} is {theirs}: "
        "accuracies and AUP do not compare, and are not tested"
    )


def _listed(sizes: Iterable[Sequence[int]]) -> str:
    return "; ".join(", ".join(map(str, of_run)) for of_run in sizes)


def _changed(first: dict, other: dict) -> list[str]:
    return [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]


def _refuse_twice(found: Sequence[Found]) -> None:
    seen: dict[Path, str] = {}
    for run in found:
        for _, stage in run.stages:
            if other := seen.get(stage):
                raise RunError(f"{other} and {run.given} are the same run ({stage}): give each run once")
            seen[stage] = run.given


def _labels(found: Sequence[Found]) -> list[str]:
    """Names of the runs in tables: those of their experiments, if these suffice."""
    counts = Counter(run.experiment for run in found)
    labels = [run.experiment if counts[run.experiment] == 1 else run.label for run in found]
    return [
        label if labels.count(label) == 1 else run.given for run, label in zip(found, labels, strict=True)
    ]

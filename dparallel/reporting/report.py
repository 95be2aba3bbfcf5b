"""The report of an experiment: the papers' table over all its benchmarks, samples, and replays."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dparallel.reporting.document import Document
from dparallel.reporting.read import Benchmark, read_benchmark
from dparallel.stages.manifest import digest

STEM = "report"


def report_folder(experiment: str | Path, stages: Sequence[tuple[str, str | Path]]) -> Path:
    """Folder of the report on these stages, `report-<key>`; other results make another folder.

    Args:
        experiment: the experiment's folder.
        stages: name and folder of each benchmark.
    """
    named = [(name, Path(folder).name) for name, folder in stages]
    return Path(experiment) / f"report-{digest(named)[:10]}"


def write_report(
    title: str,
    stages: Sequence[tuple[str, str | Path]],
    store: str | Path,
    models: Mapping[str, str],
    folder: str | Path,
) -> list[Path]:
    """Write the report to `folder`; returns the files: JSON, Markdown, HTML, pictures.

    It depends only on the results and on what lies in the store, so that the report of a resumed experiment
    differs from that of an undisturbed one in its times alone.

    Args:
        title: name of the experiment.
        stages: name and folder of each benchmark, which are finished.
        store: folder of samples and verdicts.
        models: model folders by name of the benchmarks' input.

    Raises:
        StageError: a stage is not finished, or its results or samples are damaged or missing.
    """
    benchmarks = [read_benchmark(name, stage, store, models=models) for name, stage in stages]
    document = Document("Report of an experiment", title, _lead(benchmarks), benchmarks)
    return [Path(folder) / name for name in document.write(Path(folder), STEM)]


def _lead(benchmarks: Sequence[Benchmark]) -> str:
    models = dict.fromkeys(row.model for benchmark in benchmarks for row in benchmark.reported)
    students = sum(model.startswith("student/") for model in models)
    names = ", ".join(benchmark.name for benchmark in benchmarks)
    lead = f"{students} student{'s' if students != 1 else ''} and the teacher on {names}."
    selecting = [benchmark.name for benchmark in benchmarks if benchmark.selects]
    if not selecting:
        return f"{lead} Thresholds are as given, and measured on test problems."
    where = "" if len(selecting) == len(benchmarks) else f" of {', '.join(selecting)}; elsewhere as given"
    return f"{lead} Thresholds are chosen on validation problems{where}, and measured on test problems."

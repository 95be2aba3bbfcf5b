"""`dparallel runs`: the experiments of a folder, how far they came, and their headline numbers."""

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dparallel.config.base import UserError
from dparallel.evaluation.plots import plain
from dparallel.evaluation.texts import INTERVAL, accuracy_text, sandbox_notes
from dparallel.preflight.units import size
from dparallel.reporting.past import PastExperiment, PastStage, made_from, past_experiments, size_of
from dparallel.reporting.read import Benchmark, benchmark_name, read_benchmark, unreadable
from dparallel.stages.manifest import StageError

NO_DEFAULT = "* no student keeps the accuracy: the numbers are those of the best one."
TITLES = ("experiment", "state", "benchmark", "student", "accuracy %", "n", "NFE", "fewer", "TPF", "disk")
NUMBERS = ("accuracy %", "n", "NFE", "fewer", "TPF", "disk")


def print_runs(runs: Path, as_json: bool) -> None:
    """Print a row for each benchmark of each experiment, the latest experiment first.

    Args:
        runs: folder of experiments.
        as_json: a list of JSON objects instead of a table.

    Raises:
        UserError: there is no such folder.
    """
    experiments = past_experiments(runs)
    experiments.sort(key=_last_work, reverse=True)
    rows = [row for experiment in experiments for row in _rows(experiment)]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"No experiments in {runs}.")
    else:
        print(_table(rows))


def _rows(experiment: PastExperiment) -> list[dict[str, Any]]:
    """The latest result of each benchmark, or one row without results."""
    common = {
        "experiment": experiment.name,
        "folder": str(experiment.folder),
        "state": _state(experiment),
        "bytes": size_of(experiment.folder.resolve()),
    }
    rows = []
    for stage in experiment.latest:
        later = _later(stage, experiment)
        known = {**common, **({"later_stages": later} if later else {})}
        try:
            name = benchmark_name(stage.folder)
            known["benchmark"] = name
            rows.append({**known, **_numbers(read_benchmark(name, stage.folder))})
        except UserError as error:
            rows.append({**known, "problem": str(error)})
    return rows or [common]


def _later(result: PastStage, experiment: PastExperiment) -> list[str]:
    """Names of the stages that came after a result, with other settings."""
    used = made_from([result], experiment.stages)
    others = [stage for stage in experiment.stages if not stage.is_benchmark and stage.folder not in used]
    return sorted({stage.name for stage in others if stage.last_work > result.last_work})


def _numbers(benchmark: Benchmark) -> dict[str, Any]:
    """The headline numbers of a benchmark; StageError if they are impossible, so that its file is damaged."""
    try:
        return _computed(benchmark)
    except (ArithmeticError, ValueError, StopIteration) as error:  # no forward pass, a share above 1
        raise StageError(unreadable(benchmark.folder, f"{type(error).__name__}: {error}")) from error


def _computed(benchmark: Benchmark) -> dict[str, Any]:
    best, reference = benchmark.best.measurement, benchmark.reference.measurement
    return {
        "stage": benchmark.folder.name,
        "finished_at": benchmark.manifest.finished_at,
        "default_student": benchmark.default_student,
        "model": benchmark.best.model,
        "method": benchmark.best.method,
        "threshold": benchmark.best.threshold,
        "accuracy": best.accuracy,
        "accuracy_stderr": best.accuracy_stderr,
        "accuracy_interval": list(best.accuracy_interval),
        "sandbox": best.sandbox,
        "problems": best.problems,
        "nfe": best.nfe,
        "tpf": best.tpf,
        "nfe_speed_up": reference.nfe / best.nfe,
        "reference_accuracy": reference.accuracy,
    }


def _state(experiment: PastExperiment) -> str:
    """Whether it runs, was interrupted or is finished, and since when."""
    running = [stage for stage in experiment.stages if stage.holder is not None]
    if running:
        return f"running: {', '.join(stage.name for stage in running)}"
    unfinished = [stage for stage in experiment.stages if stage.manifest is None]
    finished = [stage for stage in experiment.stages if stage.manifest is not None]
    last = max((stage.last_work for stage in finished), default=None)
    open_ones = [stage for stage in unfinished if last is None or stage.last_work > last]
    if open_ones:
        return f"unfinished: {', '.join(map(_named, open_ones))}"
    assert last is not None, "an experiment has stages"
    done = experiment.latest or sorted(finished, key=lambda stage: stage.last_work)[-1:]
    verb = "finished" if experiment.latest else f"{done[0].name} finished"
    return f"{verb} {max(stage.last_work for stage in done).date()}"


def _named(stage: PastStage) -> str:
    return f"{stage.name} (damaged manifest)" if stage.problem else stage.name


def _last_work(experiment: PastExperiment) -> Any:
    return max(stage.last_work for stage in experiment.stages)


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [_cells(row) for row in rows]
    seen = set[str]()
    for row in cells:  # an experiment's name, state and size once
        if row[0] in seen:
            row[0] = row[1] = row[-1] = ""
        seen.add(row[0])
    body = tabulate(
        cells,
        TITLES,
        tablefmt="simple",
        colalign=["right" if title in NUMBERS else "left" for title in TITLES],
        disable_numparse=True,
    )
    notes = []
    if any("accuracy" in row for row in rows):
        notes.append(f"Test problems; fewer: NFE of the reference divided by the student's. {INTERVAL}")
    if any("model" in row and row["default_student"] is None for row in rows):
        notes.append(NO_DEFAULT)
    later = {row["experiment"]: row["later_stages"] for row in rows if "later_stages" in row}
    for name, stages in later.items():
        notes.append(
            f"{name}: the numbers are of an earlier result; {', '.join(stages)} came later, with other "
            "settings."
        )
    notes += sandbox_notes(row.get("sandbox", "") for row in rows)
    notes += [f"{row['experiment']}: {row['problem']}" for row in rows if "problem" in row]
    return "\n".join([body, *([""] if notes else []), *notes])


def _cells(row: dict[str, Any]) -> list[str]:
    front, disk = [row["experiment"], row["state"], row.get("benchmark", "")], size(row["bytes"])
    if "accuracy" not in row:
        return [*front, "damaged" if "problem" in row else "", *[""] * 5, disk]
    mark = "" if row["default_student"] else " *"
    accuracy = accuracy_text(
        row["accuracy"], row["accuracy_stderr"], row["accuracy_interval"], row["sandbox"]
    )
    return [
        *front,
        f"{plain(row['model'])}, {plain(row['method'])}{mark}",
        accuracy,
        str(row["problems"]),
        f"{row['nfe']:.1f}",
        f"{row['nfe_speed_up']:.2f}x",
        f"{row['tpf']:.2f}",
        disk,
    ]

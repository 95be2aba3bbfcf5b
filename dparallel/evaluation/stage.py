"""The benchmark stage: measure teacher and students, choose thresholds, report."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation import plots
from dparallel.evaluation.measure import Measurement, ProblemSet, Request, add_up, read_slice, store, stored
from dparallel.evaluation.pieces import (
    MEASUREMENTS,
    Elsewhere,
    Piece,
    Split,
    Work,
    have_pieces_made,
    loader,
    make_here,
    read_certainty,
)
from dparallel.evaluation.report import Results, table
from dparallel.evaluation.selection import (
    BASELINE,
    STUDENT,
    TEACHER,
    Row,
    aup_by_sweep,
    default_student,
    headline,
    keeps_accuracy,
    operating_point,
    slower,
)
from dparallel.problems.registry import check_disjoint, check_unchanged, problems_digest
from dparallel.stages.manifest import Manifest, Stage, StageError

log = logging.getLogger(__name__)

Make = Callable[[list[Piece]], None]


@dataclass(frozen=True)
class Case:
    """One measurement to make: `model` is the name of an input."""

    model: str
    method: str
    decoding: DecodingConfig


def run_stage(
    config: BenchmarkConfig,
    inputs: dict[str, str],
    out_dir: str | Path,
    elsewhere: Elsewhere | None = None,
) -> Manifest:
    """Measure `inputs["teacher"]` and every `inputs["student/<name>"]`.

    Measurements that are already in `out_dir` are not made again, nor slices of them: whatever machine
    made them, and named by it.

    Args:
        elsewhere: has the pieces of these names made by other processes (`make_pieces`), waits for them
            and returns what failed there; unless given, they are made here.

    Raises:
        ValueError: no teacher or no student, names or problems that overlap, prompts that do not fit.
        StageError: `out_dir` belongs to other settings, models or problems; pieces that are still
            missing after three rounds elsewhere.
    """
    students = [name for name in inputs if name.startswith(STUDENT)]
    reference_name = _reference_name(config.reference)
    _check_inputs(config, inputs, reference_name)
    sets = _load_sets(config)
    content = problems_digest([*sets["validation"].problems, *sets["test"].problems])
    stage = Stage("benchmark", config, inputs, out_dir)
    if done := stage.done:
        check_unchanged(stage.folder, done, content)
        return done
    work = Work(config, stage, sets)
    make: Make = partial(make_here, load=loader(inputs))
    if elsewhere is not None:
        make = partial(have_pieces_made, elsewhere=elsewhere)

    # 1. What to measure; the picture shows fixed decodings and sweeps on the same problems.
    reference_case = Case(TEACHER, reference_name, config.reference)
    fixed = [Case(TEACHER, name, decoding) for name, decoding in config.fixed.items()]
    fixed += [Case(BASELINE + name, "baseline", each.decoding) for name, each in config.baselines.items()]
    sweeps = [
        Case(model, name, decoding)
        for model in (TEACHER, *students)
        for name in (
            config.teacher_sweeps if model == TEACHER else config.sweeps_of(model.removeprefix(STUDENT))
        )
        for decoding in config.sweeps[name].decodings()
    ]

    # 2. Sweep the thresholds on the validation problems and choose.
    cases = [reference_case, *([] if config.sweep_test else fixed), *sweeps]
    validation = _measure_all(cases, "validation", work, make)
    groups = dict.fromkeys((case.model, case.method) for case in sweeps)
    chosen = [
        operating_point(
            [row for row in validation if (row.model, row.method) == group], validation[0], config.max_loss
        )
        for group in groups
    ]
    validation = _mark(validation, chosen)
    best_point = default_student(chosen)

    # 3. Report on the test problems.
    points = [Case(row.model, row.method, row.measurement.decoding) for row in chosen]
    cases = [reference_case, *fixed, *(sweeps if config.sweep_test else points)]
    certainty = [
        work.certainty(name, best_point.measurement.decoding) for name in (TEACHER, best_point.model)
    ]
    test = _mark(_measure_all(cases, "test", work, make, certainty), chosen)
    if not config.sweep_test:
        test += _slower_teachers(validation, test, work, make)
    reported = [row for row in test if row.operating_point or row.method not in config.sweeps]
    best = next(
        row
        for row in test
        if row.operating_point and (row.model, row.method) == (best_point.model, best_point.method)
    )
    swept = test if config.sweep_test else validation
    results = Results(
        rows=[*validation, *test],
        reference=test[0],
        chosen=chosen,
        reported=reported,
        aup=aup_by_sweep(swept, config.sweeps),
        sweep_split=swept[0].split,
        default_student=best,
        headline=headline(best, test[0], [row for row in test if row.model == TEACHER], config.max_loss),
    )

    # 4. Write.
    folder = stage.folder
    (folder / "results.json").write_text(json.dumps(results.as_json(), indent=1), encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    plots.tradeoff(swept, list(config.sweeps), swept[0], config.max_loss, folder / "tradeoff.png")
    _plot_certainty(certainty, best, folder / "certainty.png")
    shutil.rmtree(work.folder, ignore_errors=True)  # they are added up
    measured = {row.samples_file for row in results.rows}
    if len(results.hardware) > 1:
        log.warning(
            "TPS and latency are of different hardware, see each row: %s", "; ".join(results.hardware)
        )
    return stage.finish(
        files=[
            *("results.json", "table.md", "tradeoff.png", "certainty.png"),
            *measured,
            *(str(Path(name).with_suffix(".json")) for name in measured),
        ],
        counts={"measurements": len(results.rows), "students": len(students)},
        metrics=results.as_metrics(),
        details={"problems": content, "default_student": best.model, "hardware": results.hardware},
    )


def make_pieces(
    config: BenchmarkConfig, inputs: dict[str, str], out_dir: str | Path, names: Sequence[str]
) -> None:
    """Make the pieces of these names that are not there yet; `run_stage` finishes the stage.

    Any number of processes may do so at once.

    Raises:
        ValueError: a name that no piece has; and whatever `run_stage` raises.
    """
    sets = _load_sets(config)
    stage = Stage("benchmark", config, inputs, out_dir)
    every = Work(config, stage, sets).every()
    unknown = sorted(set(names) - set(every))
    if unknown:
        raise ValueError(
            f"no piece {unknown[0]!r} among the {len(every)} of {stage.folder}: give names that its stage "
            "asks for, and the same config"
        )
    if stage.done:
        log.info("%s is finished: nothing to make", stage.folder)
        return
    make_here([every[name] for name in names], loader(inputs))


def _load_sets(config: BenchmarkConfig) -> dict[Split, ProblemSet]:
    validation, test = ProblemSet.load(config.validation), ProblemSet.load(config.test)
    check_disjoint({"benchmark.validation": validation.problems, "benchmark.test": test.problems})
    return {"validation": validation, "test": test}


def _measure_all(
    cases: Sequence[Case], split: Split, work: Work, make: Make, more: Sequence[Piece] = ()
) -> list[Row]:
    """A row for each case; what is missing of them, and of `more`, is made at one go."""
    pieces = [piece for case in cases for piece in work.missing(case.model, case.decoding, split)]
    pieces += [piece for piece in more if piece.missing]
    make(list({piece.path: piece for piece in pieces}.values()))  # methods may share a decoding
    rows = []
    for case in cases:
        request = work.request(case.model, case.decoding, split)
        measurement = stored(work.measurements, request) or _add_up(work, request)
        samples_file = f"{MEASUREMENTS}/{request.name}.parquet"
        rows.append(Row(case.model, case.method, split, measurement, samples_file=samples_file))
        threshold = "" if case.decoding.threshold is None else f" {case.decoding.threshold:g}"
        log.info(
            "%s: %s, %s%s: %.1f %% right, NFE %.1f, TPF %.2f",
            *(split, case.model, case.method, threshold),
            *(measurement.accuracy * 100, measurement.nfe, measurement.tpf),
        )
    return rows


def _add_up(work: Work, request: Request) -> Measurement:
    slices = []
    for index, rows in enumerate(request.slices):
        path = work.slice_path(request, index)
        found = read_slice(path, request, rows)
        if found is None:
            raise StageError(f"{path} is gone though it was made; run the stage again")
        slices.append(found)
    measurement, samples = add_up(request, slices)
    store(work.measurements, request, measurement, samples)
    return measurement


def _slower_teachers(validation: Sequence[Row], test: Sequence[Row], work: Work, make: Make) -> list[Row]:
    """More test rows of the teacher: one whose chosen threshold just misses must not flatter the students.

    Where a sweep's operating point does not keep the accuracy on the test problems, its slower
    thresholds are measured there until one does, or none is left.
    """
    added = []
    for row in (row for row in test if row.model == TEACHER and row.operating_point):
        sweep = [each for each in validation if (each.model, each.method) == (TEACHER, row.method)]
        left = slower(next(each for each in sweep if each.operating_point), sweep)
        while left and not keeps_accuracy(row, test[0], work.config.max_loss):
            case = Case(TEACHER, row.method, left.pop(0).measurement.decoding)
            [row] = _measure_all([case], "test", work, make)
            added.append(row)
    return added


def _mark(rows: Sequence[Row], chosen: Sequence[Row]) -> list[Row]:
    """`rows` with the chosen thresholds marked, on whichever split."""
    marks = {(row.model, row.method, row.threshold): row.qualifies for row in chosen}
    return [
        replace(row, operating_point=True, qualifies=marks[key])
        if (key := (row.model, row.method, row.threshold)) in marks
        else row
        for row in rows
    ]


def _plot_certainty(pieces: Sequence[Piece], best: Row, out: Path) -> None:
    """Teacher and default student on one problem, both with the student's own decoding."""
    decoding = best.measurement.decoding
    labels = ("teacher", f"student, {plots.plain(best.model)}")
    maps = [read_certainty(piece.path, label) for piece, label in zip(pieces, labels, strict=True)]
    title = f"Certainty while decoding, {decoding.rule} threshold {decoding.threshold:g} (grey: committed)"
    plots.certainty(maps, decoding.block_length, title, out)


def _reference_name(decoding: DecodingConfig) -> str:
    return "one_token_per_step" if decoding.steps == decoding.gen_length else "reference"


def _check_inputs(config: BenchmarkConfig, inputs: dict[str, str], reference_name: str) -> None:
    students = [name.removeprefix(STUDENT) for name in inputs if name.startswith(STUDENT)]
    expected = {
        TEACHER,
        *(STUDENT + name for name in students),
        *(BASELINE + name for name in config.baselines),
    }
    if not students or set(inputs) != expected:
        raise ValueError(
            "the benchmark compares 'teacher' with one or more 'student/<name>' and the config's baselines "
            f"({', '.join(BASELINE + name for name in config.baselines) or 'none'}); "
            f"got {', '.join(inputs) or 'nothing'}"
        )
    config.check_students(students)
    names = [reference_name, *config.fixed, *config.sweeps, *(["baseline"] if config.baselines else [])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"fixed and sweeps share the name {', '.join(twice)}: every method needs its own")

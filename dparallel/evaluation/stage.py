"""The benchmark stage: ask, decode, judge, choose, report.

Samples and verdicts are kept in a store shared by all experiments and are reused. The stage's folder contains
only the results.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.bench import Bench, Split, Unit
from dparallel.evaluation.cases import TEACHER, Case, Cases, cases, first_student
from dparallel.evaluation.judge import verdicts_of
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.report import Results, write_report
from dparallel.evaluation.selection import Row, best_student, keeps_accuracy, mark, operating_points, slower
from dparallel.evaluation.sharing import Delegate, have_units_made, make_here
from dparallel.evaluation.store import Keys, Store
from dparallel.problems.registry import check_unchanged, data_of
from dparallel.problems.scoring import scorers_of
from dparallel.stages import lease
from dparallel.stages.files import sweep
from dparallel.stages.manifest import Manifest, Stage
from dparallel.stages.origin import Origin

log = logging.getLogger(__name__)

Make = Callable[[Sequence[Unit]], None]


def run_stage(
    config: BenchmarkConfig,
    inputs: dict[str, str],
    out_dir: str | Path,
    store: str | Path | Store,
    delegate: Delegate | None = None,
    origin: Origin | None = None,
) -> Manifest:
    """Measure `inputs["teacher"]` and every `inputs["student/<name>"]`, and compare them.

    Args:
        store: samples and verdicts, or their folder; only what is missing there is decoded and judged.
        delegate: has other processes decode and judge units (with `sharing.make_units`), waits for them and
            returns descriptions of failures; by default this process does so.
        origin: the run that the stage belongs to.

    Raises:
        LeaseHeldError: another run works in this folder; processes that make units do not count.
        UserError: teacher or students are missing, names or problems overlap, or prompts do not fit.
        StageError: `out_dir` belongs to other settings, models or problems; or samples are damaged, or still
            missing after three rounds of `delegate`.
    """
    # 1. Ask
    asked = cases(config, inputs)
    bench = Bench(config, inputs, store)
    content = bench.content  # reads and checks the problems
    stage = Stage("benchmark", config, inputs, out_dir, origin)
    bench.begun = stage.begun
    if done := _finished(stage, bench, content):
        return done
    with lease.held(stage.folder):
        if done := _finished(stage, bench, content):  # by another run meanwhile
            return done
        if stage.done:
            log.warning(
                "%s was judged by scorers of another version or environment: judging again", stage.folder
            )
            stage.reopen()
        sweep(bench.store.folder)
        make: Make = partial(make_here, bench)
        if delegate is not None:
            make = partial(have_units_made, bench, delegate)
        return _compare(stage, bench, asked, make, content)


def _finished(stage: Stage, bench: Bench, content: str) -> Manifest | None:
    """The manifest, if the stage is finished and was judged by the scorers of this code and environment."""
    done = stage.done
    if done is None:
        return None
    check_unchanged(stage.folder, done, content)
    if done.details["judges"] != bench.judges:
        return None
    bench.store.check(done.details["measurements"], stage.folder)
    return done


def _compare(stage: Stage, bench: Bench, asked: Cases, make: Make, content: str) -> Manifest:
    config = bench.config

    # 2. Select thresholds and a student on the validation problems, if there are any
    validation: list[Row] = []
    points: list[Row] = []
    best = first_student(asked)
    if config.validation is not None:
        swept = [asked.reference, *([] if config.sweep_test else asked.fixed), *asked.sweeps]
        validation = measure(bench, make, swept, "validation")
        points = operating_points(validation, asked.sweeps, config.max_loss)
        best = best_student(points).case

    # 3. Measure the selection on the test problems
    seen = [bench.certainty_unit(model, best.decoding) for model in (TEACHER, best.model)]
    chosen = [point.case for point in points] if points and not config.sweep_test else asked.sweeps
    test = measure(bench, make, [asked.reference, *asked.fixed, *chosen], "test", seen)
    if config.validation is None:
        points = [replace(row, operating_point=True) for row in test if row.case in asked.sweeps]
    test = mark(test, points)
    if validation and not config.sweep_test:
        test += slower_teachers(bench, make, mark(validation, points), test)

    # 4. Report
    results = Results.of(config, mark(validation, points), test, points, best)
    maps = [bench.certainty(unit) for unit in seen]
    return stage.finish(
        files=write_report(results, maps, stage.folder),
        counts={"measurements": len(results.rows), "students": len(asked.students)},
        metrics=results.as_metrics(),
        details={
            "problems": content,
            "data": {split: data_of(problems) for split, problems in config.splits().items()},
            "judges": bench.judges,
            **results.summary(),
            "models": bench.inputs,
            "measurements": bench.store.digests(row.keys for row in results.rows if row.keys),
        },
    )


def measure(
    bench: Bench, make: Make, asked: Sequence[Case], split: Split, more: Sequence[Unit] = ()
) -> list[Row]:
    """Decode the missing samples of `asked` and the units `more`, judge, and aggregate a row per case."""
    keys = {
        case: [
            bench.samples_key(case.model, split, repeat) for repeat in bench.repeated(split, case.decoding)
        ]
        for case in asked
    }
    scorers = scorers_of(bench.protocol(split))
    sandbox = " + ".join({scorer.sandbox() for scorer in scorers} - {""})
    measures = {metric: measure for scorer in scorers for metric, measure in scorer.measures.items()}
    for note in dict.fromkeys(bench.copies(split, case.decoding) for case in asked):
        if note is not None:
            log.info("%s problems: %s", split, note)
    bench.remember_files()
    make([*bench.missing(asked, split), *filter(bench.is_missing, more)])
    make(bench.unjudged(asked, split))
    rows = []
    for case in asked:
        first, *repeats = keys[case]
        samples = pa.concat_tables([bench.samples(key, split) for key in keys[case]])
        verdicts = verdicts_of(bench, case.model, split, case.decoding)
        metrics = {name: values for by_metric in verdicts.values() for name, values in by_metric.items()}
        row = Row(
            case.model,
            case.method,
            split,
            add_up(case.decoding, samples, metrics, bench.count_reused(samples), sandbox, measures),
            Keys(first, tuple(verdicts), tuple(repeats)),
        )
        log.info("%s", row.label)
        rows.append(row)
    return rows


def slower_teachers(bench: Bench, make: Make, validation: Sequence[Row], test: Sequence[Row]) -> list[Row]:
    """Further test rows of the teacher, so that a threshold that just misses does not flatter the students.

    If a sweep's operating point does not keep the accuracy on the test problems, slower thresholds are
    measured until one keeps it or none is left.
    """
    added = []
    for row in (row for row in test if row.model == TEACHER and row.operating_point):
        sweep = [other for other in validation if (other.model, other.method) == (TEACHER, row.method)]
        left = slower(next(other for other in sweep if other.operating_point), sweep)
        while left and not keeps_accuracy(row, test[0], bench.config.max_loss):
            [row] = measure(bench, make, [left.pop(0).case], "test")
            added.append(row)
    return added

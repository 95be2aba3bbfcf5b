"""The benchmark stage: ask, decode, judge, choose, report.

What is decoded and judged lies in a store that all experiments share, and is found there again. The stage's
own folder holds the results alone.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.bench import Bench, Split, Unit
from dparallel.evaluation.cases import TEACHER, Case, cases
from dparallel.evaluation.decode import Elsewhere, decode_elsewhere, decode_here
from dparallel.evaluation.judge import judge
from dparallel.evaluation.measure import add_up
from dparallel.evaluation.report import Results, write_report
from dparallel.evaluation.selection import Row, best_student, keeps_accuracy, mark, operating_points, slower
from dparallel.evaluation.store import Keys
from dparallel.problems.registry import check_unchanged
from dparallel.stages.manifest import Manifest, Stage

log = logging.getLogger(__name__)

Decode = Callable[[Sequence[Unit]], None]


def run_stage(
    config: BenchmarkConfig,
    inputs: dict[str, str],
    out_dir: str | Path,
    store: str | Path,
    elsewhere: Elsewhere | None = None,
) -> Manifest:
    """Measure `inputs["teacher"]` and every `inputs["student/<name>"]`, and compare them.

    Args:
        store: folder of samples and verdicts; only what is not in it is decoded and judged.
        elsewhere: has units decoded by other processes (`decode.decode_units`), waits for them and returns
            what failed there; by default they are decoded here.

    Raises:
        UserError: no teacher or no student; names or problems that overlap; prompts that do not fit.
        StageError: `out_dir` belongs to other settings, models or problems; samples that are damaged, or
            still missing after three rounds elsewhere.
    """
    # 1. Ask
    asked = cases(config, inputs)
    bench = Bench(config, inputs, store)
    content = bench.content  # reads and checks the problems
    stage = Stage("benchmark", config, inputs, out_dir)
    if done := stage.done:
        check_unchanged(stage.folder, done, content)
        bench.store.check(done.details["measurements"], stage.folder)
        return done
    decode: Decode = partial(decode_here, bench)
    if elsewhere is not None:
        decode = partial(decode_elsewhere, bench, elsewhere)

    # 2. Choose thresholds and a student on the validation problems
    swept = [asked.reference, *([] if config.sweep_test else asked.fixed), *asked.sweeps]
    validation = measure(bench, decode, swept, "validation")
    points = operating_points(validation, asked.sweeps, config.max_loss)
    best = best_student(points)

    # 3. Measure the choice on the test problems
    seen = [bench.certainty_unit(model, best.measurement.decoding) for model in (TEACHER, best.model)]
    chosen = asked.sweeps if config.sweep_test else [point.case for point in points]
    test = mark(measure(bench, decode, [asked.reference, *asked.fixed, *chosen], "test", seen), points)
    if not config.sweep_test:
        test += slower_teachers(bench, decode, mark(validation, points), test)

    # 4. Report
    results = Results.of(config, mark(validation, points), test, points, best)
    maps = [bench.certainty(unit) for unit in seen]
    return stage.finish(
        files=write_report(results, maps, stage.folder),
        counts={"measurements": len(results.rows), "students": len(asked.students)},
        metrics=results.as_metrics(),
        details={
            "problems": content,
            **results.summary(),
            "measurements": bench.store.digests(row.keys for row in results.rows if row.keys),
        },
    )


def measure(
    bench: Bench, decode: Decode, asked: Sequence[Case], split: Split, more: Sequence[Unit] = ()
) -> list[Row]:
    """Decode what is missing of `asked`, and `more`, at one go; judge, and add up a row for each case."""
    decode([*bench.missing(asked, split), *filter(bench.is_missing, more)])
    rows = []
    for case in asked:
        key = bench.samples_key(case.model, split, case.decoding)
        samples = bench.samples(key, split)
        verdicts = judge(bench, case.model, split, key, samples)
        metrics = {name: flags for by_metric in verdicts.values() for name, flags in by_metric.items()}
        row = Row(
            case.model,
            case.method,
            split,
            add_up(case.decoding, samples, metrics),
            Keys(key, tuple(verdicts)),
        )
        log.info("%s", row.label)
        rows.append(row)
    return rows


def slower_teachers(
    bench: Bench, decode: Decode, validation: Sequence[Row], test: Sequence[Row]
) -> list[Row]:
    """More test rows of the teacher: one whose chosen threshold just misses must not flatter the students.

    Where a sweep's operating point does not keep the accuracy on the test problems, its slower
    thresholds are measured there until one does, or none is left.
    """
    added = []
    for row in (row for row in test if row.model == TEACHER and row.operating_point):
        sweep = [other for other in validation if (other.model, other.method) == (TEACHER, row.method)]
        left = slower(next(other for other in sweep if other.operating_point), sweep)
        while left and not keeps_accuracy(row, test[0], bench.config.max_loss):
            [row] = measure(bench, decode, [left.pop(0).case], "test")
            added.append(row)
    return added

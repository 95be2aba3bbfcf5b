"""The benchmark stage: measure teacher and students, choose thresholds, report."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dparallel.config import BenchmarkConfig, DecodingConfig, ProblemsConfig
from dparallel.decoding import generate
from dparallel.evaluation import plots
from dparallel.evaluation.benchmarks import (
    Problem,
    check_disjoint,
    check_unchanged,
    load_problems,
    problems_digest,
)
from dparallel.evaluation.certainty import CertaintyMap, replay
from dparallel.evaluation.measure import measure_once
from dparallel.evaluation.report import Results, table
from dparallel.evaluation.selection import (
    TEACHER,
    Row,
    aup_by_sweep,
    default_student,
    headline,
    keeps_accuracy,
    operating_point,
    slower,
)
from dparallel.evaluation.text import encode_problems
from dparallel.manifest import Manifest, Stage
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer

log = logging.getLogger(__name__)

MEASUREMENTS = "measurements"
Load = Callable[[str], tuple[DiffusionTransformer, Any]]


@dataclass(frozen=True)
class Case:
    """One measurement to make: `model` is the name of an input."""

    model: str
    method: str
    decoding: DecodingConfig


def run_stage(config: BenchmarkConfig, inputs: dict[str, str], out_dir: str | Path) -> Manifest:
    """Measure `inputs["teacher"]` and every `inputs["student/<name>"]`.

    Measurements that are already in `out_dir` are not made again.

    Raises:
        ValueError: no teacher or no student, names or problems that overlap, prompts that do not fit.
        StageError: `out_dir` belongs to other settings, models or problems.
    """
    students = [name for name in inputs if name != TEACHER]
    reference_name = _reference_name(config.reference)
    _check_inputs(config, inputs, reference_name)
    validation_problems, test_problems = load_problems(config.validation), load_problems(config.test)
    check_disjoint({"benchmark.validation": validation_problems, "benchmark.test": test_problems})
    content = problems_digest([*validation_problems, *test_problems])
    stage = Stage("benchmark", config, inputs, out_dir)
    if done := stage.done:
        check_unchanged(stage.folder, done, content)
        return done
    load = _loader(inputs)

    # 1. What to measure; the picture shows fixed decodings and sweeps on the same problems.
    reference_case = Case(TEACHER, reference_name, config.reference)
    fixed = [Case(TEACHER, name, decoding) for name, decoding in config.fixed.items()]
    sweeps = [
        Case(model, name, decoding)
        for model in (TEACHER, *students)
        for name in (config.teacher_sweeps if model == TEACHER else config.student_sweeps)
        for decoding in config.sweeps[name].decodings()
    ]

    # 2. Sweep the thresholds on the validation problems and choose.
    cases = [reference_case, *([] if config.sweep_test else fixed), *sweeps]
    validation = _measure_all(cases, "validation", config.validation, config, stage, load)
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
    test = _mark(_measure_all(cases, "test", config.test, config, stage, load), chosen)
    if not config.sweep_test:
        test += _slower_teachers(validation, test, config, stage, load)
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
    (folder / "results.json").write_text(json.dumps(results.as_json(), indent=1))
    (folder / "table.md").write_text(table(results))
    plots.tradeoff(swept, list(config.sweeps), swept[0], config.max_loss, folder / "tradeoff.png")
    _plot_certainty(config.validation, validation_problems[0], best, load, folder / "certainty.png")
    measured = {row.samples_file for row in results.rows}
    return stage.finish(
        files=[
            *("results.json", "table.md", "tradeoff.png", "certainty.png"),
            *measured,
            *(str(Path(name).with_suffix(".json")) for name in measured),
        ],
        counts={"measurements": len(results.rows), "students": len(students)},
        metrics=results.as_metrics(),
        details={"problems": content, "default_student": best.model},
    )


def _measure_all(
    cases: Sequence[Case],
    split: str,
    problems: ProblemsConfig,
    config: BenchmarkConfig,
    stage: Stage,
    load: Load,
) -> list[Row]:
    rows = []
    began = time.perf_counter()
    for count, case in enumerate(cases, 1):
        measurement, name = measure_once(
            stage.folder / MEASUREMENTS,
            stage.inputs[case.model],
            lambda case=case: load(case.model),  # type: ignore[misc]
            problems,
            case.decoding,
            config.batch_size,
        )
        rows.append(
            Row(case.model, case.method, split, measurement, samples_file=f"{MEASUREMENTS}/{name}.parquet")
        )
        threshold = "" if case.decoding.threshold is None else f" {case.decoding.threshold:g}"
        log.info(
            "%s %d/%d: %s, %s%s: %.1f %% right, NFE %.1f, TPF %.2f; about %.0f s left",
            *(split, count, len(cases), case.model, case.method, threshold),
            *(measurement.accuracy * 100, measurement.nfe, measurement.tpf),
            (time.perf_counter() - began) / count * (len(cases) - count),
        )
    return rows


def _slower_teachers(
    validation: Sequence[Row], test: Sequence[Row], config: BenchmarkConfig, stage: Stage, load: Load
) -> list[Row]:
    """More test rows of the teacher: one whose chosen threshold just misses must not flatter the students.

    Where a sweep's operating point does not keep the accuracy on the test problems, its slower
    thresholds are measured there until one does, or none is left.
    """
    added = []
    for row in (row for row in test if row.model == TEACHER and row.operating_point):
        sweep = [each for each in validation if (each.model, each.method) == (TEACHER, row.method)]
        left = slower(next(each for each in sweep if each.operating_point), sweep)
        while left and not keeps_accuracy(row, test[0], config.max_loss):
            case = Case(TEACHER, row.method, left.pop(0).measurement.decoding)
            [row] = _measure_all([case], "test", config.test, config, stage, load)
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


def _plot_certainty(problems: ProblemsConfig, problem: Problem, best: Row, load: Load, out: Path) -> None:
    """Teacher and default student decode one problem with the student's own decoding."""
    decoding = best.measurement.decoding
    maps = []
    for name, label in ((TEACHER, "teacher"), (best.model, f"student, {plots.plain(best.model)}")):
        model, tokenizer = load(name)
        [prompt] = encode_problems(problems, [problem], tokenizer, model, decoding)
        generation = generate(model, [prompt], decoding)[0]
        maps.append(
            CertaintyMap(
                label=label,
                probability=replay(model, prompt, generation),
                commit_step=generation.commit_step,
                tokens=[tokenizer.decode([token]) for token in generation.tokens],
            )
        )
    title = f"Certainty while decoding, {decoding.rule} threshold {decoding.threshold:g} (grey: committed)"
    plots.certainty(maps, decoding.block_length, title, out)


def _loader(inputs: dict[str, str]) -> Load:
    @lru_cache(maxsize=1)  # one model in memory at a time
    def load(name: str) -> tuple[DiffusionTransformer, Any]:
        return load_model(inputs[name]), load_tokenizer(inputs[name])

    return load


def _reference_name(decoding: DecodingConfig) -> str:
    return "one_token_per_step" if decoding.steps == decoding.gen_length else "reference"


def _check_inputs(config: BenchmarkConfig, inputs: dict[str, str], reference_name: str) -> None:
    strangers = [name for name in inputs if name != TEACHER and not name.startswith("student/")]
    if TEACHER not in inputs or len(inputs) < 2 or strangers:
        raise ValueError(
            "the benchmark compares 'teacher' with one or more 'student/<name>'; "
            f"got {', '.join(inputs) or 'nothing'}"
        )
    names = [reference_name, *config.fixed, *config.sweeps]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"fixed and sweeps share the name {', '.join(twice)}: every method needs its own")

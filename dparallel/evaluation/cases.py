"""Ask: the models, methods and decodings that a benchmark measures."""

from collections.abc import Collection
from dataclasses import dataclass

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig

TEACHER, STUDENT, BASELINE = "teacher", "student/", "baseline/"  # names of inputs, or their prefixes


@dataclass(frozen=True)
class Case:
    """A row of the results: `model` is the name of an input, `method` the name of its decoding."""

    model: str
    method: str
    decoding: DecodingConfig


@dataclass(frozen=True)
class Cases:
    """Everything that a benchmark compares.

    Attributes:
        students: names of the students' inputs.
        reference: the teacher's decoding that accuracy is compared with.
        fixed: the teacher's other fixed decodings, the students' ones, then the baselines.
        sweeps: all thresholds of all sweeps of the teacher, then of each student.
    """

    students: list[str]
    reference: Case
    fixed: list[Case]
    sweeps: list[Case]


def cases(config: BenchmarkConfig, models: Collection[str]) -> Cases:
    """The cases of `config` for these models, given by the names of the stage's inputs.

    Raises:
        ConfigError: teacher or students are missing, a model is unexpected, or method names are not unique.
    """
    students = [name for name in models if name.startswith(STUDENT)]
    reference = Case(TEACHER, _reference_name(config.reference), config.reference)
    _check_models(config, models, students)
    _check_methods(config, reference.method)
    fixed = [Case(TEACHER, name, decoding) for name, decoding in config.fixed.items()]
    for student in students:
        named = config.fixed_of(student.removeprefix(STUDENT))
        fixed += [Case(student, name, decoding) for name, decoding in named.items()]
    baselines = config.baseline_decodings
    fixed += [Case(BASELINE + name, "baseline", decoding) for name, decoding in baselines.items()]
    sweeps = {TEACHER: config.teacher_sweeps}
    sweeps |= {student: config.sweeps_of(student.removeprefix(STUDENT)) for student in students}
    swept = [
        Case(model, name, decoding)
        for model, names in sweeps.items()
        for name in names
        for decoding in config.sweeps[name].decodings()
    ]
    return Cases(students, reference, fixed, swept)


def first_student(asked: Cases) -> Case:
    """The first sweep of the first student, which is compared with the teacher if nothing is selected."""
    return next(case for case in asked.sweeps if case.model in asked.students)


def _reference_name(decoding: DecodingConfig) -> str:
    return "one_token_per_step" if decoding.steps == decoding.gen_length else "reference"


def _check_models(config: BenchmarkConfig, models: Collection[str], students: list[str]) -> None:
    baselines = [BASELINE + name for name in config.baselines]
    if not students or set(models) != {TEACHER, *students, *baselines}:
        raise ConfigError(
            "the benchmark compares 'teacher' with one or more 'student/<name>' and the config's baselines "
            f"({', '.join(baselines) or 'none'}); got {', '.join(models) or 'nothing'}"
        )
    config.check_students([student.removeprefix(STUDENT) for student in students])


def _check_methods(config: BenchmarkConfig, reference: str) -> None:
    names = [reference, *config.fixed, *config.sweeps, *(["baseline"] if config.baselines else [])]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"fixed and sweeps share the name {', '.join(twice)}: every method needs its own")

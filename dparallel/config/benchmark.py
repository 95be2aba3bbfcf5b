"""Settings of a benchmark: what is measured, with which decodings, and how thresholds are chosen."""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveInt, Tag, model_validator

from dparallel.config.base import HOW, LIST, NAME_PATTERN, SECTION, Config, ConfigError, form, nearest
from dparallel.config.decoding import DecodingConfig
from dparallel.config.paths import PathOrHubId
from dparallel.config.problems import ProblemsConfig

# Used in folder names, metric names and names of registered models, which have at most 255 characters.
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=100)]


Split = Literal["validation", "test"]


def refuse_unrepeatable(decodings: Mapping[str, DecodingConfig]) -> None:
    """Raise if a decoding samples without a seed; `decodings` is keyed by the setting's name."""
    for place, decoding in decodings.items():
        if decoding.temperature > 0 and decoding.seed is None:
            raise ValueError(
                f"{place}.temperature={decoding.temperature} without {place}.seed: give a seed; otherwise a "
                "stage that was interrupted would go on with other draws"
            )


def refuse_same_names(names: Iterable[tuple[str, str]]) -> None:
    """Raise if two names are equal up to case; `names` holds pairs (description, name)."""
    seen: dict[str, str] = {}
    for what, name in names:
        if other := seen.get(name.lower()):
            raise ValueError(
                f"{what} {name!r} and {other} have the same name in folders and metrics; rename one of them"
            )
        seen[name.lower()] = f"{what} {name!r}"


class Sweep(Config):
    """A decoding at several thresholds.

    Args:
        decoding: its other settings.
        thresholds: of its rule.
    """

    decoding: DecodingConfig
    thresholds: tuple[NonNegativeFloat, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_threshold_makes_sense(self) -> "Sweep":
        self.decodings()
        return self

    def decodings(self) -> list[DecodingConfig]:
        """The decoding at each threshold, in the order given."""
        settings = self.decoding.model_dump()
        return [DecodingConfig(**{**settings, "threshold": threshold}) for threshold in self.thresholds]


Loss = Annotated[float, Field(ge=0, le=1)]  # of accuracy, as a share
SweepNames = Annotated[tuple[str, ...], Field(min_length=1)]


class Baseline(Config):
    """Another model to compare with, such as an autoregressive one, and how it is decoded.

    Args:
        model: checkpoint folder or Hugging Face Hub id.
        decoding: how it is decoded; by default as its checkpoint says (its decode defaults).
    """

    model: Annotated[PathOrHubId, HOW]  # its fingerprint is an input
    decoding: DecodingConfig | None = None


class BenchmarkConfig(Config):
    """Measure teacher and students; select thresholds on validation problems, report on test problems.

    Args:
        test: problems for the reported numbers.
        validation: problems for the selection of thresholds and students. Without them, nothing is selected:
            every sweep has exactly one threshold, such as the published one, and no student is the default.
        reference: the teacher's decoding that accuracy is compared with: one token per step.
        fixed: further decodings of the teacher by name, such as one with few steps.
        sweeps: decodings at several thresholds, by name. The operating point of a sweep is the threshold
            with the highest TPF (tokens per forward pass) whose accuracy on the validation problems is at
            most `max_loss` below the reference's.
        teacher_sweeps: names of the sweeps measured with the teacher.
        student_sweeps: names of the sweeps measured with the students: one list for all students, or a
            list per student name; names that the experiment does not have are ignored.
        student_fixed: decodings that students are measured with as well, by student: names of `fixed`, or of
            the reference (`one_token_per_step`, with which the student's own `aup_2` begins).
        baselines: other models by name, measured on the same problems without selection.
        max_loss: accepted loss of accuracy; 0.01 is one percentage point.
        sweep_test: also decode all sweeps on the test problems, for AUP and the plot. Otherwise AUP and
            plot use the validation problems and are labelled so, and a teacher's sweep is decoded on the
            test problems only from its operating point to a threshold that keeps the accuracy.
        batch_size: responses decoded together.
    """

    file_kind: ClassVar[str] = "a benchmark: give it as `benchmarks: {NAME: FILE}` of an experiment"

    test: ProblemsConfig
    validation: ProblemsConfig | None = None
    reference: DecodingConfig
    fixed: dict[Name, DecodingConfig] = {}
    sweeps: dict[Name, Sweep] = {}
    teacher_sweeps: tuple[str, ...] = ()
    student_sweeps: Annotated[
        Annotated[tuple[str, ...], Tag(LIST)] | Annotated[dict[Name, SweepNames], Tag(SECTION)],
        Discriminator(form, "wrong_form", "Give a list of sweeps, or such a list for every student by name"),
    ] = ()
    student_fixed: dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    baselines: dict[Name, Baseline] = {}
    max_loss: Loss = 0.01
    sweep_test: bool = False
    batch_size: Annotated[PositiveInt, HOW] = 64

    @model_validator(mode="after")
    def _consistent(self) -> "BenchmarkConfig":
        of_students = self.student_sweeps
        if isinstance(of_students, dict):
            of_students = tuple(name for names in of_students.values() for name in names)
        unknown = {*self.teacher_sweeps, *of_students} - set(self.sweeps)
        if unknown:
            hint = nearest(sorted(unknown)[0], list(self.sweeps))
            raise ValueError(f"unknown sweep {sorted(unknown)}; {hint}sweeps defines {sorted(self.sweeps)}")
        for student, names in self.student_fixed.items():
            known = {self.reference_name: self.reference, **self.fixed}
            if missing := set(names) - set(known):
                name = sorted(missing)[0]
                raise ValueError(
                    f"student_fixed.{student}: unknown {name!r}; {nearest(name, list(known))}known: "
                    f"{', '.join(known)}"
                )
        judged = [problems.protocol.scorers for problems in self.splits().values()]
        if any(scorers[0] != judged[0][0] for scorers in judged):
            raise ValueError(
                f"test is judged by {judged[0][0]!r} and validation by {judged[1][0]!r}: what chooses a "
                "threshold must be what is reported; name the same first scorer in both protocols"
            )
        several = {name: sweep.thresholds for name, sweep in self.sweeps.items() if len(sweep.thresholds) > 1}
        if self.validation is None and several:
            name, thresholds = next(iter(several.items()))
            raise ValueError(
                f"sweeps.{name}.thresholds={list(thresholds)} without validation: give validation problems "
                "to choose a threshold with, or one threshold: the test problems must not choose it"
            )
        methods = [("the reference", self.reference_name)]
        methods += [("fixed", name) for name in self.fixed] + [("sweeps", name) for name in self.sweeps]
        refuse_same_names(methods + ([("the baselines' method", "baseline")] if self.baselines else []))
        refuse_same_names(("baselines", name) for name in self.baselines)
        decodings = {"reference": self.reference}
        decodings |= {f"fixed.{name}": decoding for name, decoding in self.fixed.items()}
        decodings |= {f"sweeps.{name}.decoding": sweep.decoding for name, sweep in self.sweeps.items()}
        decodings |= {
            f"baselines.{name}.decoding": rival.decoding
            for name, rival in self.baselines.items()
            if rival.decoding is not None
        }
        refuse_unrepeatable(decodings)
        return self

    @property
    def reference_name(self) -> str:
        """Method name of the reference in tables and metrics."""
        one_token = self.reference.steps == self.reference.gen_length
        return "one_token_per_step" if one_token else "reference"

    def sweeps_of(self, student: str) -> tuple[str, ...]:
        """The sweeps measured with a student."""
        return self.student_sweeps[student] if isinstance(self.student_sweeps, dict) else self.student_sweeps

    def sweeps_of_any(self, students: Iterable[str]) -> tuple[str, ...]:
        """The sweeps measured with at least one of these students."""
        return tuple(dict.fromkeys(name for student in students for name in self.sweeps_of(student)))

    def fixed_of(self, student: str) -> dict[str, DecodingConfig]:
        """The fixed decodings measured with a student, by name."""
        known = {self.reference_name: self.reference, **self.fixed}
        return {name: known[name] for name in self.student_fixed.get(student, ())}

    @property
    def baseline_decodings(self) -> dict[str, DecodingConfig]:
        """How the baselines are decoded, by name.

        Raises:
            ConfigError: one is not stated, and was not completed by the decode defaults of its checkpoint.
        """
        stated = {name: rival.decoding for name, rival in self.baselines.items()}
        found = {name: decoding for name, decoding in stated.items() if decoding is not None}
        if missing := stated.keys() - found.keys():
            raise ConfigError(f"baselines.{min(missing)}.decoding: required key is missing")
        return found

    def splits(self) -> dict[Split, ProblemsConfig]:
        """The sets of problems by name."""
        if self.validation is None:
            return {"test": self.test}
        return {"test": self.test, "validation": self.validation}

    def check_students(self, students: Iterable[str], setting: str = "benchmark") -> None:
        """Raise a ConfigError unless `student_sweeps` is one list or has one for each of these students.

        Lists of further students are allowed, so that a file may serve experiments with fewer.
        """
        if not self.student_sweeps:
            raise ConfigError(
                f"{setting}.student_sweeps is empty, so no student would be measured: name sweeps of "
                f"{setting}.sweeps"
            )
        names = list(students)
        listed = self.student_sweeps if isinstance(self.student_sweeps, dict) else {}
        if unknown := set(self.student_fixed) - {*names, *listed}:
            name = sorted(unknown)[0]
            raise ConfigError(
                f"{setting}.student_fixed lists {name!r}; {nearest(name, names)}the students are "
                f"{', '.join(names)}"
            )
        missing = [name for name in names if name not in listed]
        if listed and missing:
            raise ConfigError(
                f"{setting}.student_sweeps lists {', '.join(listed)}, and not {', '.join(missing)}: give a "
                "list for every student, or one list for all"
            )

"""What parts of recipes are worth: differences of AUP between pairs of students, paired by seed."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.common.tables import markdown
from benchmarks.recipes_report import mean_and_spread, methods
from dparallel.config.base import ConfigError, nearest
from dparallel.config.experiment import BenchmarkConfig

STUDENT = "student/"
DIVIDED = "difference / its standard error"
MEANING = (
    "What parts are worth: each student is shown with the method of its highest mean AUP unless one is "
    "named, so the two may have different ones. ± is the standard deviation over seeds, and for differences, "
    "which are taken by seed, the standard error."
)


def as_pairs(parts: Sequence[str], config: BenchmarkConfig, students: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of students or their methods, from texts such as `consistency:d3llm` or `d3llm/entropy:d3llm`.

    Raises:
        ConfigError: a text names no two students or methods, or one without AUP.
    """
    pairs = []
    for part in parts:
        without, _, with_it = part.partition(":")
        if not with_it or without == with_it:
            raise ConfigError(
                f"--parts {part}: give two students or methods, as WITHOUT:WITH; students are "
                f"{', '.join(students)}"
            )
        for named in (without, with_it):
            name, slash, method = named.partition("/")
            if slash and not method:
                raise ConfigError(f"--parts {part}: {named} names no method; give one, or drop the slash")
            if name not in students:
                raise ConfigError(
                    f"--parts {part}: no student {name!r}; {nearest(name, students)}give WITHOUT:WITH of "
                    f"{', '.join(students)}"
                )
            swept = [sweep for sweep in config.sweeps_of(name) if len(config.sweeps[sweep].thresholds) > 1]
            if not swept:
                raise ConfigError(
                    f"--parts {part}: {name} has no sweep of several thresholds, and so no AUP; give it one "
                    "in student_sweeps, or leave the pair out"
                )
            if method and method not in swept:
                raise ConfigError(
                    f"--parts {part}: {name} has no sweep {method!r} of several thresholds; it has "
                    f"{', '.join(swept)}"
                )
        pairs.append((without, with_it))
    return pairs


def best_method(runs: Sequence[dict[str, float]], named: str) -> str:
    """The `model/method` that is named, or of a student the one with the highest mean AUP over seeds."""
    student, _, method = named.partition("/")
    own = [name for name in methods(runs) if name.rpartition("/")[0] == f"{STUDENT}{student}"]
    own = [name for name in own if f"{name}/aup" in runs[0] and method in ("", name.rpartition("/")[2])]
    return max(own, key=lambda name: statistics.mean(run[f"{name}/aup"] for run in runs))


def parts_table(runs: Sequence[dict[str, float]], pairs: Sequence[tuple[str, str]]) -> str:
    """A row for each pair: AUP of both students' best methods, and their difference.

    The difference is the mean over seeds of the differences of each seed, ± its standard error, and then in
    standard errors; both need several seeds.

    Args:
        runs: flat benchmark metrics of every seed.
        pairs: students, or their methods, without and with a part.
    """
    titles = ["without", "with", "AUP without", "AUP with", "difference", DIVIDED, "AUP with / without"]
    rows = []
    for pair in pairs:
        names = [best_method(runs, student) for student in pair]
        values = [[run[f"{name}/aup"] for run in runs] for name in names]
        differences = [after - before for before, after in zip(*values, strict=True)]
        mean, error, ratio = statistics.mean(differences), "", ""
        difference = f"{mean:+.0f}"
        if len(runs) > 1:
            standard_error = statistics.stdev(differences) / math.sqrt(len(runs))
            difference += f" ± {standard_error:.0f}"
            equal = standard_error <= 1e-9 * abs(mean)  # the same in all seeds but for rounding
            error = "" if equal else f"{mean / standard_error:+.1f}"
        if statistics.mean(values[0]):
            ratio = f"{statistics.mean(values[1]) / statistics.mean(values[0]):.2f}"
        rows.append(
            [
                *(name.removeprefix(STUDENT).replace("/", ", ").replace("_", " ") for name in names),
                *(mean_and_spread(of_seeds, 0) for of_seeds in values),
                difference,
                error,
                ratio,
            ]
        )
    return markdown(titles, rows, texts=["without", "with"])

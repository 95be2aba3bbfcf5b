"""Commit rules of one model compared at equal accuracy. One command, one table.

    python -m benchmarks.rules --model teachers/ledger --config configs/benchmarks/ledger_rules.yaml

The config is that of a benchmark; its `teacher_sweeps` are the rules. For each, the threshold with the
highest TPF that keeps the reference's accuracy is chosen on the validation problems, and reported on the test
problems. A rule that needs weights reads those beside the model (`dparallel fit-rule`). What is decoded is
kept in `--runs`; the same command again continues.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.tables import table
from dparallel.config.base import UserError
from dparallel.config.benchmark import BenchmarkConfig
from dparallel.config.experiment import MEASUREMENTS
from dparallel.config.files import load_config
from dparallel.evaluation.bench import Bench
from dparallel.evaluation.cases import TEACHER, Case
from dparallel.evaluation.selection import Row, mark, operating_points
from dparallel.evaluation.sharing import make_here
from dparallel.evaluation.stage import measure
from dparallel.models.commit_rule import check_commit_rule, read_commit_rule
from dparallel.models.hub import checkpoint_folder
from dparallel.stages.streams import set_encodings

TEXTS = ("rule",)
COLUMNS: dict[str, Callable[[Row], str]] = {
    "rule": lambda row: row.method,
    "threshold": lambda row: "" if row.threshold is None else f"{row.threshold:g}",
    "accuracy %": lambda row: (
        f"{row.measurement.accuracy * 100:.1f} ± {row.measurement.accuracy_stderr * 100:.1f}"
        + ("" if row.qualifies else " †")
    ),
    "n": lambda row: str(row.measurement.problems),
    "NFE": lambda row: f"{row.measurement.nfe:.2f}",
    "TPF": lambda row: f"{row.measurement.tpf:.2f}",
}


def compare(model: str, config: BenchmarkConfig, runs: Path) -> tuple[list[Row], list[Row]]:
    """All rows of the validation problems, with the chosen ones marked, and these on the test problems.

    The first row of both is the reference.

    Raises:
        UserError: the model, the problems or a rule cannot be used.
    """
    folder = checkpoint_folder(model)
    reference = Case(TEACHER, config.reference_name, config.reference)
    swept = [
        Case(TEACHER, name, decoding)
        for name in config.teacher_sweeps
        for decoding in config.sweeps[name].decodings()
    ]
    rule = read_commit_rule(folder)
    for case in swept:
        check_commit_rule(case.decoding, rule)
    bench = Bench(config, {TEACHER: str(folder)}, runs / MEASUREMENTS)
    make = partial(make_here, bench)
    validation = measure(bench, make, [reference, *swept], "validation")
    points = operating_points(validation, swept, config.max_loss)
    test = measure(bench, make, [reference, *(point.case for point in points)], "test")
    return mark(validation, points), mark(test, points)


def report(model: str, validation: Sequence[Row], test: Sequence[Row], max_loss: float) -> str:
    """Two tables: the choice on the validation problems, and the chosen thresholds on the test problems."""
    chosen = [f"{row.method} {row.threshold:g}" for row in validation if row.operating_point]
    lines = [
        f"{model}: test problems, thresholds chosen on {validation[0].measurement.problems} validation "
        f"problems (at most {max_loss * 100:g} points lost; † none kept the accuracy)",
        table(test, COLUMNS, TEXTS),
        f"Validation problems; chosen: {', '.join(chosen)}",
        table(validation, COLUMNS, TEXTS),
    ]
    return "\n\n".join(lines)


def main() -> int:
    set_encodings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="checkpoint folder, or Hugging Face Hub id")
    parser.add_argument("--config", required=True, help="YAML file of a benchmark with validation problems")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where samples are kept")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dparallel").setLevel(logging.INFO)
    try:
        config = load_config(BenchmarkConfig, options.config, options.set)
        if config.validation is None:
            raise UserError(
                f"{options.config} has no validation problems, which choose the thresholds: add some"
            )
        print(report(options.model, *compare(options.model, config, options.runs), config.max_loss))
    except UserError as error:
        print(f"python -m benchmarks.rules: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The numbers by which experiments are compared at a glance: the best student's and the teacher's."""

from dparallel.evaluation.selection import Row
from dparallel.reporting.read import Benchmark

NUMBERS = ("accuracy", "nfe", "tpf", "tps", "latency")


def headline(benchmark: Benchmark) -> dict[str, float]:
    """Numbers of the default student and the teacher's reference on the test problems.

    Without a default student they are those of the best student, which `Benchmark.default_student` tells.
    Ratios of times are left out where the hardware or the batch sizes differ; ratios above 1 favour the
    student.
    """
    student, teacher = benchmark.best.measurement, benchmark.reference.measurement
    numbers = {name: float(getattr(student, name)) for name in NUMBERS}
    numbers |= {f"teacher_{name}": float(getattr(teacher, name)) for name in NUMBERS}
    if student.hardware == teacher.hardware:
        if student.latency:
            numbers["latency_speed_up"] = teacher.latency / student.latency
        if student.batch_sizes == teacher.batch_sizes and teacher.tps:
            numbers["tps_speed_up"] = student.tps / teacher.tps
    return numbers


def tokens(rows: list[Row]) -> int:
    """Number of tokens that were decoded for these rows."""
    return round(sum(row.measurement.tpf * row.measurement.nfe * row.measurement.samples for row in rows))

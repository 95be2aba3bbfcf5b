"""Write the decodings that a benchmark chose into the students' checkpoints, as their decode defaults.

Thresholds are chosen on validation problems with merged models, so this comes after the benchmark stage. It
changes neither the fingerprint nor the manifest of a merged model (see `stages.generation_file`), and gives
the same file whenever it is repeated.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from dparallel.evaluation.cases import STUDENT
from dparallel.evaluation.selection import Row, best_student
from dparallel.models.defaults import write_defaults
from dparallel.reporting.read import Benchmark
from dparallel.stages.files import is_there
from dparallel.stages.generation_file import GENERATION, with_defaults
from dparallel.stages.manifest import MANIFEST, FileRecord, matches, read_manifest

log = logging.getLogger(__name__)


def write_choices(benchmark: Benchmark) -> list[str]:
    """Make the decoding chosen for each student the default of its checkpoint.

    Of several sweeps of a student, the one counts that keeps the accuracy at the highest TPF on the
    validation problems; if none keeps it, the most accurate one. Without validation problems nothing is
    chosen, and the student's first sweep counts, as the config gives it.

    Returns:
        The folders of the students whose defaults changed.

    Raises:
        StageError: a student's manifest is damaged.
        FileError: its folder cannot be written.
    """
    changed = []
    for student, row in choices(benchmark):
        folder = Path(benchmark.models[student])
        if not is_there(folder / MANIFEST) or not _may_change(folder):
            continue
        origin = {"benchmark": benchmark.name, **({"split": row.split} if benchmark.selects else {})}
        measured = row.measurement
        numbers = {"problems": measured.problems, "accuracy": measured.accuracy, "nfe": measured.nfe}
        chosen = {**origin, **numbers, "keeps_accuracy": row.qualifies}
        if write_defaults(folder, measured.decoding.portable(), chosen):
            log.info("%s: decode defaults as chosen in benchmark %s: %s", student, benchmark.name, row.label)
            changed.append(str(folder))
    return changed


def choices(benchmark: Benchmark) -> Iterator[tuple[str, Row]]:
    """Each student of a benchmark whose folder is known, and the operating point that is its default."""
    split = "validation" if benchmark.selects else "test"
    points = [row for row in benchmark.rows if row.split == split and row.operating_point]
    for student in dict.fromkeys(row.model for row in points):
        if student.startswith(STUDENT) and student in benchmark.models:
            own = [row for row in points if row.model == student]
            yield student, best_student(own) if benchmark.selects else own[0]


def _may_change(folder: Path) -> bool:
    """Whether a merged model still is what its manifest says with decode defaults in generation_config.json.

    It is not if the file has another layout than the one in which the merging stage writes it today.
    """
    record, file = read_manifest(folder).files.get(GENERATION), folder / GENERATION
    if record is None:
        return True
    if matches(file, record):
        content = with_defaults(file.read_bytes(), None)
        if record == FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()):
            return True
    log.warning("%s was edited, or merged by an earlier version: its decode defaults stay as they are", file)
    return False

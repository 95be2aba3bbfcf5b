"""`metrics.jsonl`: the metrics of a training run, one JSON object per line with its `train_step`.

Each line also has the time at which it was written. The time is no metric: `read` leaves it out, so that the
records of a resumed run are those of an undisturbed one.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from dparallel.stages.files import is_there, naming_the_file, write_atomically

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TIME = "time"  # key of the seconds since 1970


def append(file: Path, record: dict[str, float]) -> None:
    """Append a record, with its `train_step`, as a line of JSON."""
    with naming_the_file(file), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**record, TIME: round(time.time(), 3)}) + "\n")


def read(file: Path) -> list[dict[str, float]]:
    """Read the records in order, skipping a truncated last line, and with a warning other damaged lines."""
    return [{key: line[key] for key in line if key != TIME} for line in read_with_times(file)]


def read_with_times(file: Path) -> list[dict[str, float]]:
    """As `read`, with the seconds since 1970 under `TIME`, which files of earlier versions lack."""
    data = file.read_bytes() if is_there(file) else b""
    records = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        record = _record(line)
        if record is None:
            log.warning("%s, line %d is damaged and left out", file, number)
        else:
            records.append(record)
    return records


def cut_back(file: Path, train_step: int) -> None:
    """Drop damaged records and those after `train_step`, for resuming from an earlier checkpoint."""
    kept = [record for record in read_with_times(file) if record["train_step"] <= train_step]
    write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("train_step"), int) else None

"""`metrics.jsonl`: the metrics of a training run, one JSON object per line with its `train_step`."""

import json
import logging
from pathlib import Path
from typing import Any

from dparallel.stages.files import is_there, naming_the_file, write_atomically

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def append(file: Path, record: dict[str, float]) -> None:
    """Append a record, with its `train_step`, as a line of JSON."""
    with naming_the_file(file), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict[str, float]]:
    """Read the records in order, skipping a truncated last line, and with a warning other damaged lines."""
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
    kept = [record for record in read(file) if record["train_step"] <= train_step]
    write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("train_step"), int) else None

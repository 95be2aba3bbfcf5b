"""`metrics.jsonl`: what a training run measured, one JSON object a line with its `train_step`."""

import json
from pathlib import Path

from dparallel.stages.files import write_atomically

METRICS = "metrics.jsonl"


def append(file: Path, record: dict[str, float]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict[str, float]]:
    """The records in order; a last line that a kill cut short is left out."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def cut_back(file: Path, train_step: int) -> None:
    """Drop the records after `train_step`: a killed run was ahead of its checkpoint."""
    kept = [record for record in read(file) if record["train_step"] <= train_step]
    write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))

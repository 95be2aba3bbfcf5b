"""Times of the metrics log, which are no metrics."""

import json
import time
from pathlib import Path

from dparallel.stages import metrics_log


def test_lines_have_the_time_at_which_they_were_written(tmp_path: Path) -> None:
    file, before = tmp_path / "metrics.jsonl", time.time()
    metrics_log.append(file, {"train_step": 1, "loss": 0.5})
    [line] = metrics_log.read_with_times(file)
    assert before - 0.001 <= line[metrics_log.TIME] <= time.time() + 0.001
    assert metrics_log.read(file) == [{"train_step": 1, "loss": 0.5}]


def test_cutting_back_keeps_times_and_lines_without(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"train_step": 1, "loss": 0.5}, {"train_step": 2, "loss": 0.4, "time": 12.5}, {"train_step": 3}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    metrics_log.cut_back(file, 2)
    assert metrics_log.read_with_times(file) == lines[:2]

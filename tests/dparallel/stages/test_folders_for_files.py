"""A folder in place of a file is named with the remedy, wherever the file is read."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from dparallel.config.base import UserError
from dparallel.config.experiment import MergingConfig
from dparallel.distillation import resuming
from dparallel.evaluation.certainty import read_certainty
from dparallel.evaluation.store import SAMPLES, Keys, Store
from dparallel.stages import lease, manifest, metrics_log
from dparallel.stages.files import write_atomically, write_table
from dparallel.trajectories import store as trajectories

Read = Callable[[Path], object]

READERS: dict[str, tuple[str, Read]] = {
    "manifest": ("manifest.json", manifest.read_manifest),
    "fingerprint by manifest": ("manifest.json", manifest.fingerprint),
    "fingerprint by claim": ("stage.json", manifest.fingerprint),
    "fingerprint by weights": ("config.json", manifest.fingerprint),
    "claim": ("stage.json", lambda folder: manifest.Stage("merging", MergingConfig(), {}, folder)),
    "lease": ("lease.json", lambda folder: lease.held(folder).__enter__()),
    "lease of another run": ("lease.json", lambda folder: lease.wait_until_free(folder, print)),
    "metrics": ("metrics.jsonl", lambda folder: metrics_log.read(folder / "metrics.jsonl")),
    "new metrics": ("metrics.jsonl", lambda folder: metrics_log.append(folder / "metrics.jsonl", {})),
    "trajectories": ("manifest.json", trajectories.load),
    "unfinished trajectories": ("stage.json", trajectories.load),
    "shard": ("part-00000.parquet", lambda folder: trajectories.read_shard(folder / "part-00000.parquet")),
    "samples": ("samples/k/00000-00001.parquet", lambda folder: Store(folder).samples("k")),
    "digest": ("samples/k/00000-00001.parquet", lambda folder: Store(folder).digests([Keys("k", ())])),
    "verdicts": ("verdicts/k/00000-00001.parquet", lambda folder: Store(folder).verdicts("k")),
    "certainty": ("certainty/k.json", lambda folder: read_certainty(Store(folder).certainty("k"), "teacher")),
    "written text": ("table.md", lambda folder: write_atomically(folder / "table.md", "text")),
    "written table": ("k.parquet", lambda folder: write_table(folder / "k.parquet", SAMPLES.empty_table())),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_in_place_of_a_file_is_named(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "move" in str(error.value) or "delete" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_whose_description_is_a_folder_is_passed_over(tmp_path: Path, caplog) -> None:
    for step in (1, 2):
        (tmp_path / resuming.UNFINISHED).mkdir()
        (tmp_path / resuming.UNFINISHED / resuming.STATE).write_bytes(b"state")
        resuming.keep(tmp_path, step, "fp32")
    (tmp_path / "step-00000002" / "checkpoint.json").unlink()
    (tmp_path / "step-00000002" / "checkpoint.json").mkdir()
    with caplog.at_level(logging.WARNING):
        found = resuming.newest_whole(tmp_path)
    assert found is not None
    assert found.train_step == 1
    assert "step-00000002/checkpoint.json cannot be read (Is a directory)" in caplog.text

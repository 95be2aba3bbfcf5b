"""A recording is shared out over machines that share only a store, and equals that of one machine."""

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.experiment import TrajectoriesConfig
from dparallel.stages.manifest import Manifest, verify
from dparallel.stages.storage import exchange
from dparallel.stages.storage.folders import Storage
from dparallel.stages.storage.remote import Remote, StorageError
from dparallel.trajectories import record
from tests.dparallel.stages.storage.conftest import NewStorage, content_of

NAME = "small/trajectories-0123456789"
CONFIG = TrajectoriesConfig(
    problems={"benchmark": "coins", "count": 8},  # type: ignore[arg-type]
    decoding={"gen_length": 12, "block_length": 12, "rule": "steps", "steps": 2},  # type: ignore[arg-type]
    shard_size=2,
)


def silent(message: str) -> None:
    pass


def run_on(storage: Storage, inputs: dict[str, str], delegate: Any = None) -> Manifest:
    """Record, as a task does, on a machine."""
    folder = storage.runs / NAME
    if delegate is not None:
        delegate = exchange.through(delegate, storage, folder)
    work = partial(record.run_stage, CONFIG, inputs, folder, delegate)
    return exchange.run(storage, folder, inputs.values(), work, silent)


def test_shards_of_several_machines(
    new_storage: NewStorage, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"teacher": str(tiny_checkpoint)}
    here, others = new_storage("here"), [new_storage("a"), new_storage("b")]
    asked: list[list[int]] = []

    def delegate(numbers: list[int]) -> list[str]:
        asked.append(numbers)
        for storage, part in zip(others, (numbers[::2], numbers[1::2]), strict=True):
            work = partial(record.record_shards, CONFIG, inputs, storage.runs / NAME, part)
            exchange.help_with(storage, storage.runs / NAME, work)
        return []

    made = run_on(here, inputs, delegate)
    assert asked == [[0, 1, 2, 3]]
    alone = record.run_stage(CONFIG, inputs, tmp_path / "alone" / NAME)
    assert made.fingerprint == alone.fingerprint

    late = new_storage("late")
    monkeypatch.setattr(record, "_decode", None)  # nothing is left to do
    assert run_on(late, inputs).fingerprint == alone.fingerprint
    left = set(content_of(late.runs / NAME)) ^ set(content_of(here.runs / NAME))
    assert left <= {"lease.json"}
    verify(late.runs / NAME)


def test_what_a_run_made_before_it_was_killed_serves_the_next_one(
    new_storage: NewStorage, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"teacher": str(tiny_checkpoint)}
    here, there = new_storage("here"), new_storage("there")
    write, written = record.write_shard, list[Path]()

    def dies_at_the_third(path: Path, *arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(record, "write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_on(here, inputs)
    assert there.manifest(there.runs / NAME) is None
    written.clear()
    monkeypatch.setattr(record, "write_shard", lambda path, *rest: (written.append(path), write(path, *rest)))
    run_on(there, inputs)
    assert [path.name for path in written] == ["part-00002.parquet", "part-00003.parquet"]


def test_of_two_machines_one_records_and_the_other_takes_its_result(
    new_storage: NewStorage, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"teacher": str(tiny_checkpoint)}
    decode, decoded = record._decode, list[int]()

    def slowly(shards: Any, *arguments: Any) -> None:
        decoded.append(len(shards))
        time.sleep(0.3)
        decode(shards, *arguments)

    monkeypatch.setattr(record, "_decode", slowly)
    made: list[Manifest] = []
    machines = [new_storage("a"), new_storage("b")]
    threads = [
        threading.Thread(target=lambda storage=machine: made.append(run_on(storage, inputs)))
        for machine in machines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decoded == [4]
    assert len({one.fingerprint for one in made}) == 1


def test_a_store_that_is_away_for_a_moment_costs_nothing(
    new_storage: NewStorage, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "PUSHED_EVERY", 0.01)
    here, calls = new_storage("here"), 0
    push = here.push_unfinished

    def away_at_first(folder: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise StorageError(f"{Remote.__name__} is away")
        push(folder)

    monkeypatch.setattr(here, "push_unfinished", away_at_first)
    with exchange.pushing(here, here.runs / NAME):
        while calls < 3:
            time.sleep(0.01)
    assert calls >= 3

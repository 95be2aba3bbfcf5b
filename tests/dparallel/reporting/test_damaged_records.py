"""`dparallel runs` and `dparallel clean` on records that are damaged, or were written to mislead."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dparallel.cli.main import main
from dparallel.config.experiment import MEASUREMENTS
from dparallel.reporting.find import REPORT
from dparallel.stages.files import write_atomically
from dparallel.stages.lease import LEASE, this_process
from dparallel.stages.manifest import CLAIM, MANIFEST
from tests.dparallel.reporting.made import finished_benchmark
from tests.dparallel.reporting.made_runs import clean, made, run_of, stages_in


@pytest.mark.parametrize("form", ["../../out/victim", "{}", "samples/../../../out/victim", "link/victim"])
def test_only_files_of_the_store_are_removed_whatever_a_manifest_names(tmp_path: Path, form: str) -> None:
    runs, victim = tmp_path / "runs", tmp_path / "out" / "victim"
    victim.parent.mkdir()
    victim.touch()
    whole = run_of(runs / "sums", 1, 0)
    (runs / MEASUREMENTS / "link").symlink_to(victim.parent)
    change(whole[3] / MANIFEST, ("details", "measurements", form.format(victim)), "")
    clean(runs, set(whole))
    assert victim.exists()
    assert not (runs / "sums").exists()
    assert not (runs / MEASUREMENTS / "samples/1/0.parquet").exists()


@pytest.mark.parametrize("name", ["./samples/shared/0.parquet", "samples/../samples//shared/0.parquet"])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_kept_result_keeps_its_files_under_other_names_too(tmp_path: Path, name: str, odd: int) -> None:
    runs_of = [run_of(tmp_path / "sums", 1, 0), run_of(tmp_path / "sums", 2, 10)]
    change(runs_of[odd][3] / MANIFEST, ("details", "measurements"), {name: ""})
    clean(tmp_path, {runs_of[0][3]})
    assert (tmp_path / MEASUREMENTS / "samples/shared/0.parquet").is_file()
    assert stages_in(tmp_path) == set(runs_of[1])


@pytest.mark.parametrize("recorded", [5, [1, 2], None, "samples/1/0.parquet"])
def test_a_damaged_record_of_measurements_keeps_all(tmp_path: Path, capsys, recorded: object) -> None:
    old, new = run_of(tmp_path / "sums", 1, 0), run_of(tmp_path / "sums", 2, 10)
    change(new[3] / MANIFEST, ("details", "measurements"), recorded)
    [note] = clean(tmp_path, {old[3]})
    assert "2 files of measurements are kept" in note
    assert str(new[3]) in note
    assert (tmp_path / MEASUREMENTS / "samples/1/0.parquet").is_file()
    assert main(["clean", "sums", "--runs", str(tmp_path), "--yes"]) == 0
    assert "Removed " in capsys.readouterr().out
    assert not (tmp_path / "sums").exists()


def test_a_damaged_result_does_not_hide_the_others(tmp_path: Path, tiny_checkpoint: Path, capsys) -> None:
    finished_benchmark(tmp_path, tiny_checkpoint)
    damaged = finished_benchmark(tmp_path, tiny_checkpoint, experiment="damaged")
    (damaged / "results.json").write_text("{", encoding="utf-8")
    torn = made(tmp_path / "torn", "merging-fast", 1)
    os.truncate(torn / MANIFEST, 5)
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "results.json is damaged" in table
    assert "merging fast (damaged manifest)" in table
    assert "sums" in table


@pytest.mark.parametrize("finished_at", ["2026-11-26T12:41:35", "2026-11-26", "yesterday", "", 5, None])
def test_a_manifest_without_a_time_is_damaged(tmp_path: Path, capsys, finished_at: object) -> None:
    whole = run_of(tmp_path / "sums", 1, 0)
    made(tmp_path / "other", "trajectories", 2)
    change(whole[3] / MANIFEST, ["finished_at"], finished_at)
    assert main(["clean", "--runs", str(tmp_path)]) == 0
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "benchmark sums (damaged manifest)" in table
    assert "trajectories finished 2026-11-01" in table


@pytest.mark.parametrize("value", [5, [1], {"a": 1}, None, "../../other", "a\0b", "x" * 5_000])
def test_a_damaged_report_hides_nothing(tmp_path: Path, capsys, value: object) -> None:
    run_of(tmp_path / "sums", 1, 0)
    report = tmp_path / "sums" / "report-1" / REPORT
    write_atomically(report, json.dumps({"benchmarks": [{"runs": [{"stage": value}]}]}))
    assert main(["clean", str(report.parent), "--runs", str(tmp_path)]) == 0
    assert main(["clean", "sums", "--runs", str(tmp_path), "--yes"]) == 0
    assert "Removed " in capsys.readouterr().out
    assert stages_in(tmp_path) == set()


def test_something_else_with_the_name_of_a_lease_keeps_the_stage(tmp_path: Path, capsys) -> None:
    stage = made(tmp_path / "sums", "trajectories", 1)
    made(tmp_path / "other", "trajectories", 2)
    (stage / LEASE).mkdir()
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert "trajectories finished 2026-11-01" in capsys.readouterr().out
    assert main(["clean", "sums", "--runs", str(tmp_path), "--yes"]) == 0
    assert stage.is_dir()


@pytest.fixture(scope="module")
def records(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Any]:
    """A record of each kind, each in a copy of an experiment, and what they hold; all in a folder of runs."""
    runs = tmp_path_factory.mktemp("runs")
    home, stage = runs / "sums", finished_benchmark(runs, tiny_checkpoint)
    unfinished = made(home, "training-fast", 1, hour=None)
    recorded = made(home, "trajectories", 3)
    report = {"benchmarks": [{"benchmark": "sums", "runs": [{"stage": stage.name}]}]}
    write_atomically(home / "report-1" / REPORT, json.dumps(report))
    write_atomically(home / "tracking" / "a.json", json.dumps({"uploaded": None, "files": []}))
    write_atomically(
        home / "configs" / "0.yaml", json.dumps({"name": "sums", "store": "s3://bucket/results"})
    )
    files = [stage / MANIFEST, stage / CLAIM, stage / "results.json", unfinished / CLAIM]
    files += [home / "report-1" / REPORT, home / "tracking" / "a.json", home / "configs" / "0.yaml"]
    copies = []
    for number, file in enumerate(files):
        shutil.copytree(home, runs / f"copy{number}")
        copies.append(runs / f"copy{number}" / file.relative_to(home))
    lease = recorded / LEASE
    write_atomically(lease, this_process().model_dump_json())
    made(runs / "other", "trajectories", 2)
    return {file: json.loads(file.read_text(encoding="utf-8")) for file in [lease, *copies]}


ODD_TEXTS = ["", "..", "../../out", "/", "~nobody", "a\0b", "a\0.yaml", "\ud800", "x" * 5_000 + ".yaml"]
TEXTS = st.text() | st.sampled_from(ODD_TEXTS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, 10**400]) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_damaged_record_hides_the_other_experiments(records: dict[Path, Any], data: st.DataObject) -> None:
    """Whatever JSON is at whatever place of a record."""
    [report] = [file.parent for file in records if file.name == REPORT]
    runs = ["--runs", str(report.parents[1])]
    for file, content in records.items():
        changed = replaced(content, data.draw(st.sampled_from(places(content))), data.draw(VALUES))
        file.write_text(json.dumps(changed), encoding="utf-8")
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as listed:
        assert main(["runs", *runs]) == 0
        assert main(["clean", *runs, "--checkpoints"]) == 0
        assert main(["clean", *runs, "--keep", "1", "sums", str(report), str(report.parent)]) == 0
        listed.seek(0)
        assert "trajectories finished 2026-11-01" in listed.read()


def change(file: Path, place: Sequence[str | int], value: object) -> None:
    """Put a value at a place of a JSON file."""
    content = replaced(json.loads(file.read_text(encoding="utf-8")), place, value)
    file.write_text(json.dumps(content), encoding="utf-8")


def replaced(content: Any, place: Sequence[str | int], value: object) -> Any:
    """A JSON value with another one at a place."""
    if not place:
        return value
    copy: Any = list(content) if isinstance(content, list) else dict(content)
    copy[place[0]] = replaced(copy[place[0]], place[1:], value) if len(place) > 1 else value
    return copy


def places(content: Any) -> list[tuple[str | int, ...]]:
    """The places of a JSON value, itself first; of lists, those of the first item."""
    parts: Any = ()
    if isinstance(content, dict):
        parts = content.items()
    elif isinstance(content, list):
        parts = enumerate(content[:1])
    return [(), *((key, *rest) for key, part in parts for rest in places(part))]

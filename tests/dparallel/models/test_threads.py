import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dparallel.models import threads
from dparallel.models.threads import fitting_threads, threads_for, usable_cores

SMALL = torch.nn.Linear(10, 10)


@pytest.fixture
def torchs_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing is set, on a machine of 4 cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: (8, 4))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("parameters", "rows", "cores", "number"),
    [
        (800_000, 1, 2, 1),
        (800_000, 64, 2, 2),
        (800_000, 12, 64, 2),
        (5_000_000, 1, 64, 1),
        (5_000_001, 1, 64, 2),
        (50_000_000, 1, 64, 10),
        (8_000_000_000, 1, 64, 64),
    ],
)
def test_the_number_grows_with_the_work_up_to_the_cores(
    parameters: int, rows: int, cores: int, number: int
) -> None:
    assert threads_for(parameters, cores, rows) == number


@pytest.mark.usefixtures("torchs_choice")
def test_a_small_model_gets_one_thread_and_the_number_is_restored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with fitting_threads(SMALL):
        assert torch.get_num_threads() == 1
        with fitting_threads(SMALL):
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "computing with 1 of 4 CPU cores, which fits a model of 0.00011 M parameters at batch size 1 (O"
    )


@pytest.mark.usefixtures("torchs_choice")
def test_what_a_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    with fitting_threads(SMALL):
        assert torch.get_num_threads() == 3
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with fitting_threads(SMALL):
        assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("torchs_choice")
def test_a_model_elsewhere_is_none_of_it() -> None:
    with fitting_threads(SMALL.to("meta")):
        assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quotas_of_control_groups(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert threads._quota(tmp_path) == quota


def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: (8, 4))
    for quota, cores in ((None, 4), (2.5, 2), (0.5, 1), (100.0, 4)):
        monkeypatch.setattr(threads, "_quota", lambda quota=quota: quota)
        assert usable_cores() == cores


@pytest.mark.slow
def test_importing_the_library_changes_nothing() -> None:
    count = "print(t.get_num_threads())"
    code = f"import torch as t; {count}; import dparallel; dparallel.load_model; {count}"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True
    )
    before, after = said.stdout.split()
    assert before == after

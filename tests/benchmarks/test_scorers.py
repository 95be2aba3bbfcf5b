"""The check of scorers on a few rows of each benchmark, in the published files' names."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import scorers
from benchmarks.scorers import BENCHMARKS, CHECKS, Check, main
from dparallel.config.problems import EMBEDDED
from dparallel.problems.scoring import SCORERS
from tests.dparallel.problems.rows import rows
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP
from tests.dparallel.problems.test_mathematics import needs_parser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, file in (
        ("gsm8k", "gsm8k_test.jsonl"),
        ("math500", "math500_test.jsonl"),
        ("mbpp", "mbpp.jsonl"),
    ):
        examples = rows(name)
        before = examples[:1] * 10 if name == "mbpp" else []  # rows of other splits
        (tmp_path / file).write_text(
            "".join(json.dumps(row) + "\n" for row in [*before, *examples]), encoding="utf-8"
        )
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as written:
        written.writelines(json.dumps(row) + "\n" for row in rows("humaneval"))
    return tmp_path


def test_all_scorers_of_the_benchmarks_are_checked() -> None:
    assert {check.scorer for check in CHECKS} == SCORERS.keys() - {"exact", *EMBEDDED}
    for check in CHECKS:
        assert check.scorer in BENCHMARKS[check.benchmark].protocol.scorers


def test_references_are_right_and_corrupted_responses_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(folder), "--benchmarks", "gsm8k"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:6]] for line in table[2:6]] == [
        ["GSM8K", "flexible_extract", "11 / 11", "0 / 11", "the number + 1"],
        ["GSM8K", "strict_match", "11 / 11", "0 / 11", "the number + 1"],
        ["GSM8K", "strict_match_cot", "11 / 11", "0 / 11", "the number + 1"],
        ["GSM8K", "boxed", "11 / 11", "0 / 11", "the number + 1"],
    ]


@pytest.mark.slow
@needs_parser
@BUBBLEWRAP
def test_all_benchmarks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(folder)]) == 0
    assert " 18 / 18 |" in capsys.readouterr().out


def test_verdicts_that_are_not_as_expected_are_listed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(
        "gsm8k", "strict_match", lambda problems: ["?"] * len(problems), CHECKS[0].canonical, "not at all"
    )
    monkeypatch.setattr(scorers, "CHECKS", [check])
    assert main(["--data", str(folder), "--benchmarks", "gsm8k"]) == 1
    printed = capsys.readouterr().out
    assert "strict_match, gsm8k_test-00001: reference judged False (no note): '?'" in printed
    assert "strict_match, gsm8k_test-00011: not at all judged True (no note): " in printed


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path), "--benchmarks", "mbpp"])
    assert "mbpp.jsonl" in capsys.readouterr().err

"""`dparallel eval` with metrics that are no simple right or wrong, of a scorer of one's own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.cli.main import main
from dparallel.problems.scorer import Measure, Scorer, Verdict
from dparallel.problems.scoring import SCORERS
from dparallel.problems.sources import Problem

SHAPE = ["--gen-length", "8", "--block-length", "8", "--threshold", "10"]


def judge(problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    """The reference is the value."""
    return [
        Verdict(
            {
                "value": {"1": True, "0": False}.get(str(problem.reference), float(problem.reference or 0)),
                "exact": problem.reference == "1",
                "pairs": [float(problem.reference or 0), 2],
                "length": len(problem.prompt),
            }
        )
        for problem in problems
    ]


MEASURES = {
    "value": Measure("share"),
    "pairs": Measure("item", whole=lambda items: sum(a for a, _ in items) / sum(b for _, b in items)),
    "length": Measure("number", full=None, lower_is_better=True),
}


def test_every_kind_of_metric_is_measured_stored_and_shown(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slice of verdicts has truth values alone, the second one values between them."""
    scorer = Scorer("own", 1, ("value", "exact", "pairs", "length"), judge, measures=MEASURES)
    monkeypatch.setitem(SCORERS, "own", scorer)
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_VERDICTS", 2)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"Tom {n} coins", "answer": a}) + "\n" for n, a in enumerate("10")]
    lines += [json.dumps({"prompt": "Tom 12 coins", "answer": a}) + "\n" for a in ("0.5", "0.25")]
    Path("own.jsonl").write_text("".join(lines), encoding="utf-8")
    protocol: dict[str, Any] = {"data": [{"path": "a/b", "reference": "answer"}], "scorers": ["own"]}
    Path("own.json").write_text(json.dumps(protocol), encoding="utf-8")
    arguments = [
        "eval",
        "--model",
        str(tiny_checkpoint),
        "--protocol",
        "own.json",
        "--path",
        "own.jsonl",
        *SHAPE,
    ]
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    metrics = found["metrics"]
    # 1, 0, 0.5, 0.25: mean 0.4375, squares 0.546875, s.e. sqrt(0.546875 / 3 / 4) = 0.213478
    assert metrics["value"] == {
        "share": 0.4375,
        "stderr": pytest.approx(0.213478, abs=1e-6),
        "interval": [0.0, 1.0],
        "judged": 4,
        "kind": "mean",
    }
    assert (metrics["exact"]["share"], metrics["exact"]["kind"]) == (0.25, "correct")
    assert (metrics["pairs"]["share"], metrics["pairs"]["kind"]) == (1.75 / 8, "pooled")
    assert metrics["length"]["score"] == (11 + 11 + 12 + 12) / 4
    assert metrics["length"]["lower_is_better"] is True
    files = sorted(Path(found["files"]["verdicts"]["own"]).glob("*.parquet"))
    kinds = [pq.read_schema(file).field("value").type for file in files]
    assert kinds == [pa.bool_(), pa.float64()]
    assert pq.read_table(files[0])["pairs"].to_pylist() == ["[1.0, 2]", "[0.0, 2]"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "value 43.8 ± 21.3 [0.0, 100.0]" in out
    assert "length 11.5 ± 0.29 (no %)" in out
    for note in (
        "value: the mean of values between 0 and the best one",
        "pairs: one number of all responses together, in % of its best value;",
        "length: on a scale without a best value",
        "length: less is better.",
        "± is one standard error; in brackets Wilson's",
    ):
        assert note in out


def vote(problems: Sequence[Problem], responses: Sequence[str | list[str]]) -> list[Verdict]:
    """Whether there are three responses, and whether they differ."""
    said = [[response] * 3 if isinstance(response, str) else response for response in responses]
    return [Verdict({"three": len(texts) == 3, "differ": len(set(texts)) > 1}) for texts in said]


@pytest.mark.slow
def test_repeats_are_decoded_with_other_seeds_and_judged_together(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORERS, "vote", Scorer("vote", 1, ("three", "differ"), vote, repeats=3))
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"Tom {n} coins", "answer": "any"}) + "\n" for n in range(4)]
    Path("own.jsonl").write_text("".join(lines), encoding="utf-8")
    protocol: dict[str, Any] = {"data": [{"path": "a/b", "reference": "answer"}], "scorers": ["vote"]}
    Path("own.json").write_text(json.dumps(protocol), encoding="utf-8")
    model = ["eval", "--model", str(tiny_checkpoint), "--protocol", "own.json", "--path", "own.jsonl", *SHAPE]
    sampled = [*model, "--temperature", "2", "--seed", "5"]
    assert main([*sampled, "--json"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "own: 12 of 12 responses to decode" in err
    assert (found["samples"], found["repeats"]) == (12, 3)
    assert (found["metrics"]["three"]["share"], found["metrics"]["three"]["judged"]) == (1.0, 4)
    assert found["metrics"]["differ"]["share"] == 1.0
    folders = [found["files"]["samples"], *found["files"]["repeats"]]
    texts = [pq.read_table(folder)["text"].to_pylist() for folder in folders]
    [verdicts] = found["files"]["verdicts"].values()
    [first, *_] = pq.read_table(verdicts)["response"].to_pylist()
    assert first.startswith("----- response 1 of 3 -----\n" + texts[0][0])
    assert first.endswith("----- response 3 of 3 -----\n" + texts[2][0])
    assert main(sampled) == 0
    out, err = capsys.readouterr()
    assert "own: 0 of 12 responses to decode; 12 are in runs" in err
    assert "own.jsonl; 4 problems, 3 responses to each" in out

    assert main([*model, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["samples"], found["repeats"]) == (4, 1)
    assert [found["metrics"][name]["share"] for name in ("three", "differ")] == [1.0, 0.0]
    assert "without a temperature all are equal, so one is decoded and counts as all of them" in err

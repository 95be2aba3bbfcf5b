import json
from collections.abc import Sequence

import pytest

from benchmarks.serving import Sample, Timed, arrivals, in_flags, jain, main, percentile, row_of
from dparallel.cli.decoding_arguments import given_decoding
from dparallel.cli.parser import build_parser
from dparallel.config.decoding import DecodingConfig


def test_statistics_of_a_load_by_hand() -> None:
    samples = [Sample(0.1, 1.0, 10, 5), Sample(0.2, 2.0, 20, 10), None]
    row = row_of(Timed("name", samples, 3.0, 2.0, 1), [1000.0, 15.0, 25.0])
    assert (row.tokens_per_second, row.of_generate, row.per_cpu_second, row.refused) == (10.0, 0.5, 15.0, 1)
    assert (row.first_token, row.latency, row.latency_99) == (pytest.approx(0.15), 1.5, 2.0)
    assert row.fairness == pytest.approx(1.0)  # 0.2 s for each forward pass


@pytest.mark.parametrize(
    ("values", "percent", "value"),
    [([3, 1, 2], 50, 2), ([1, 2], 99, 2), ([5], 1, 5), (range(1, 101), 95, 95)],
)
def test_percentiles(values: Sequence[float], percent: int, value: float) -> None:
    assert percentile(values, percent) == value


def test_fairness_is_one_over_the_number_if_one_has_everything() -> None:
    assert jain([2, 2, 2, 2]) == 1
    assert jain([0, 0, 0, 7]) == 0.25


def test_arrivals_have_the_rate_that_is_asked_for() -> None:
    assert arrivals(3, None) == [0.0] * 3
    times = arrivals(4000, 20.0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gen_length": 36, "block_length": 12, "threshold": 0.6, "stop_at_eos": False},
        {"rule": "steps", "steps": 8},
    ],
)
def test_a_server_is_told_the_whole_decoding(settings: dict) -> None:
    decoding = DecodingConfig(**settings)
    options = build_parser().parse_args(["serve", "--model", "any", *in_flags(decoding)])
    assert DecodingConfig(**given_decoding(options)) == decoding


@pytest.mark.slow
def test_every_row_is_measured(tmp_path, capsys) -> None:
    out = tmp_path / "rows.json"
    sizes = ["--requests", "12", "--batch-size", "4", "--loads", "0.5", "--repeat", "1"]
    main([*sizes, "--out", str(out)])
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == [
        "generate, batch of 4",
        "generate, one at a time",
        "server, all at once",
        "server, all at once, streamed",
        "server, 0.5 of generate, streamed",
        "server, one at a time, streamed",
    ]
    printed = capsys.readouterr().out
    assert all(row["name"] in printed and row["tokens_per_second"] > 0 for row in rows)
    assert all(0 < row["first_token"] <= row["latency"] <= row["latency_99"] for row in rows[2:])

"""Two benchmarks in one experiment: equal problems, judged by the solution and by the answer alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dparallel.config.base import ConfigError
from dparallel.config.experiment import MEASUREMENTS
from flows.benchmark import benchmark, measurements, plan
from flows.distill import distill
from tests.flows.test_benchmark import one_student, part, parts, polled_often, results, settings, worker
from tests.test_architecture import deployments

__all__ = ["one_student", "part", "polled_often"]  # fixtures of all tests here

pytestmark = pytest.mark.usefixtures("prefect_server")

FEW = [
    f"benchmarks.{name}.{split}.count=6" for name in ("coins", "answers") for split in ("test", "validation")
]


@pytest.fixture(autouse=True)
def second_benchmark(one_student: None, config_file: Path) -> None:
    experiment = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    of_coins = experiment["benchmarks"]["coins"]
    answers = {"protocol": {"scorers": ["flexible_extract"]}}
    experiment["benchmarks"]["answers"] = {
        **of_coins,
        **{split: {**of_coins[split], **answers} for split in ("test", "validation")},
    }
    config_file.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")


def folders(config_file: Path, runs: str) -> list[str]:
    return sorted(
        path.name.split("-")[1] for path in (config_file.parent / runs / "small").glob("benchmark-*")
    )


def rows_of(folder: str) -> list[dict[str, Any]]:
    return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
def test_one_of_them_is_measured_by_name_and_the_other_judges_its_samples(
    config_file: Path, local_store: str
) -> None:
    overrides = [*settings(config_file, "local"), *FEW]
    [answers] = benchmark(str(config_file), overrides, benchmark="answers")
    assert folders(config_file, "local") == ["answers"]
    assert {row["reused"] for row in rows_of(answers)} == {0}
    samples = config_file.parent / "local" / MEASUREMENTS / "samples"
    decoded = {file: file.stat().st_mtime_ns for file in samples.rglob("*.parquet")}

    both = benchmark(str(config_file), overrides)
    assert folders(config_file, "local") == ["answers", "coins"]
    assert both[1] == answers
    assert {next(iter(row["metrics"])) for row in rows_of(both[0])} == {"solution"}
    assert {next(iter(row["metrics"])) for row in rows_of(answers)} == {"flexible_extract"}
    assert {row["reused"] for row in rows_of(both[0]) if row["split"] == "validation"} == {6}
    assert decoded.items() <= {file: file.stat().st_mtime_ns for file in samples.rglob("*.parquet")}.items()
    with pytest.raises(ConfigError, match="unknown benchmark 'answrs'; did you mean 'answers'"):
        plan(str(config_file), overrides, "answrs")


def test_every_benchmark_is_sent_to_the_pool_by_its_name(
    config_file: Path, local_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, deployed, sent = settings(config_file, "sent"), deployments(), []

    def dispatched(deployment: str, runs: dict[str, dict[str, Any]], *limits: Any) -> None:
        flow, _ = deployed[deployment]
        for name, parameters in runs.items():
            flow.validate_parameters(parameters)
            sent.append((deployment, name.partition(" (")[0], parameters.get("benchmark")))

    monkeypatch.setattr("flows.distill.dispatch", dispatched)
    monkeypatch.setattr("flows.distill.finish", lambda experiment, run: "")
    distill(str(config_file), overrides, ("trajectories", "training", "merging", "benchmark"))
    assert sent[-2:] == [
        ("benchmark/measure", "small: benchmark coins", "coins"),
        ("benchmark/measure", "small: benchmark answers", "answers"),
    ]


@pytest.mark.slow
def test_on_a_pool_every_part_belongs_to_one_benchmark_and_the_results_are_a_local_runs(
    config_file: Path, local_store: str
) -> None:
    overrides = [*settings(config_file, "shared"), *FEW, "launch.parts=2"]
    with worker(config_file, dies_at=set()):
        shared = benchmark(str(config_file), overrides, on_pool=True)
    named = [run.parameters["benchmark"] for run in parts(config_file)]
    assert named[0] == "coins"
    assert set(named) <= {"coins", "answers"}
    local = benchmark(str(config_file), [*settings(config_file, "local"), *FEW])
    assert [results(folder) for folder in shared] == [results(folder) for folder in local]
    unit = next(run.parameters["units"][0] for run in parts(config_file))
    with pytest.raises(ConfigError, match="unknown benchmark 'coin'; did you mean 'coins'"):
        measurements(str(config_file), "coin", [unit], overrides)

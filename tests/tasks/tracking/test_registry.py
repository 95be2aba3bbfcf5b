"""Aliases of merged models: set after the benchmarks, for reasons that are kept."""

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

import dparallel
from dparallel.config.experiment import MergingConfig, PromotionConfig
from dparallel.stages.manifest import Stage
from tasks.tracking.promotion import CANDIDATE, CHAMPION
from tasks.tracking.records import Promotion, tracking_uri
from tasks.tracking.run import track
from tasks.tracking.upload import upload
from tests.conftest import random_model
from tests.dparallel.reporting.made import config, finished_benchmark
from tests.tasks.tracking.helpers import mlflow_server, runs_of

ALL, MOST, FEW = "11111", "11110", "10000"


class Experiment:
    """An experiment whose finished stages are tracked as a run would."""

    def __init__(self, runs: Path, teacher: Path, store: MlflowClient):
        self.runs, self.home, self.teacher, self.store = runs, runs / "sums", teacher, store
        self.count = 0

    def merge(self) -> Path:
        """The folder of another merged model, which is registered."""
        self.count += 1
        folder = self.home / f"merging-fast-{self.count}"
        Stage("merging", MergingConfig(check_prompts=self.count), {}, folder).finish([])
        with track(self.home, "merging", "merging fast", {}, folder=str(folder), student="fast"):
            pass
        return folder

    def merge_a_model(self) -> Path:
        """As `merge`, with a model that can be loaded."""
        folder = self.home / "merging-fast-0"
        stage = Stage("merging", MergingConfig(), {"teacher": self.teacher}, folder)
        tokenizer = dparallel.load_tokenizer(self.teacher)
        stage.finish(dparallel.save_model(random_model(), folder, tokenizer=tokenizer))
        with track(self.home, "merging", "merging fast", {}, folder=str(folder), student="fast"):
            pass
        return folder

    def measure(self, merged: Path, name: str, student: str, steps: int = 3, **more: object) -> Path:
        """The folder of a finished benchmark of a merged model, with the student's verdicts."""
        self.count += 1
        return finished_benchmark(
            self.runs,
            self.teacher,
            key=f"{name}-{self.count:010x}",
            reference=MOST,
            student=student,
            student_steps=steps,
            merged=merged,
            settings=config(max_loss=0.25),
            **more,  # type: ignore[arg-type]
        )

    def end(self, *benchmarks: Path, **settings: object) -> dict[str, str]:
        """Let a run end with these benchmarks; returns its reasons by alias."""
        promotion = Promotion(
            benchmarks=[str(folder) for folder in benchmarks],
            settings=PromotionConfig(**{"max_loss": 0.2, **settings}),
        )
        with track(self.home, "distill", "sums", {}, promotion=promotion):
            pass
        tags = runs_of(self.store, "sums")[-1].data.tags
        return {alias: tags[alias] for alias in (CANDIDATE, CHAMPION) if alias in tags}

    @property
    def aliases(self) -> dict[str, str]:
        found = self.store.get_registered_model("sums").aliases
        return {alias: str(version) for alias, version in found.items()}


@pytest.fixture
def experiment(store: MlflowClient, tmp_path: Path, tiny_checkpoint: Path) -> Experiment:
    return Experiment(tmp_path / "runs", tiny_checkpoint, store)


def test_the_default_student_is_candidate_and_the_first_champion(
    experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    merged, _ = experiment.merge(), experiment.merge()
    with caplog.at_level("INFO", "dparallel.tracking"):
        reasons = experiment.end(experiment.measure(merged, "sums", MOST))
    assert experiment.aliases == {CANDIDATE: "1", CHAMPION: "1"}, "the measured version, not the newest"
    assert reasons[CANDIDATE] == "set: version 1, student fast, is the default student"
    assert reasons[CHAMPION] == (
        "set: version 1, student fast, +0.0 points from the teacher's accuracy (20.0 may be lost), NFE 3.0 "
        "against 12.0 on sums"
    )
    assert f"model sums: candidate {reasons[CANDIDATE]}; champion {reasons[CHAMPION]}" in caplog.messages
    version = experiment.store.get_model_version("sums", "1")
    run = runs_of(experiment.store, "sums")[-1]
    assert version.tags["benchmark_run"] == run.info.run_id
    assert version.tags["sums.accuracy"] == "0.8"
    assert f"runs/{run.info.run_id}" in version.description
    model = experiment.store.get_logged_model(version.tags["logged_model"])
    assert {metric.key: metric.value for metric in model.metrics}["sums/nfe"] == 3.0


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        ("00000", "student/fast solves none of the test problems of sums"),
        (FEW, "student/fast loses more than 25.0 points on the test problems of sums"),
    ],
)
def test_a_student_that_loses_the_accuracy_gets_no_alias(
    experiment: Experiment, student: str, reason: str
) -> None:
    reasons = experiment.end(experiment.measure(experiment.merge(), "sums", student))
    assert set(reasons.values()) == {f"not set: {reason}"}
    assert experiment.aliases == {}


def test_a_student_that_solves_nothing_gets_none_whatever_may_be_lost(
    experiment: Experiment, tiny_checkpoint: Path
) -> None:
    folder = finished_benchmark(
        experiment.runs,
        tiny_checkpoint,
        student="00000",
        merged=experiment.merge(),
        settings=config(max_loss=1.0),
    )
    reasons = experiment.end(folder, max_loss=1.0)
    assert reasons[CANDIDATE] == "not set: student/fast solves none of the test problems of sums"
    assert experiment.aliases == {}


def test_a_candidate_within_the_benchmarks_loss_but_not_the_margin_is_no_champion(
    experiment: Experiment,
) -> None:
    reasons = experiment.end(experiment.measure(experiment.merge(), "sums", "11100"), max_loss=0.1)
    assert experiment.aliases == {CANDIDATE: "1"}
    assert reasons[CHAMPION].startswith("not set: version 1, student fast, is -20.0 points")


def test_a_candidate_without_fewer_forwards_than_the_teacher_is_no_champion(experiment: Experiment) -> None:
    experiment.end(experiment.measure(experiment.merge(), "sums", MOST, steps=12))
    assert experiment.aliases == {CANDIDATE: "1"}


@pytest.mark.parametrize(
    ("student", "steps", "better", "words"),
    [
        (MOST, 2, True, "+0.0 points"),
        (MOST, 3, False, "+0.0 points from the champion's accuracy (p 1), NFE 3.0 against 3.0 on the same 5"),
        (ALL, 4, False, "+20.0 points"),
        ("01110", 2, True, "-20.0 points"),
    ],
)
def test_a_champion_is_replaced_by_a_better_one_on_the_same_problems(
    experiment: Experiment, student: str, steps: int, better: bool, words: str
) -> None:
    experiment.end(experiment.measure(experiment.merge(), "sums", MOST))
    reasons = experiment.end(experiment.measure(experiment.merge(), "sums", student, steps))
    assert experiment.aliases == {CANDIDATE: "2", CHAMPION: "2" if better else "1"}
    assert reasons[CHAMPION].startswith("set" if better else "not set")
    assert f"against version 1: {words}" in reasons[CHAMPION]


def test_a_champion_measured_on_other_problems_is_replaced_only_on_demand(experiment: Experiment) -> None:
    experiment.end(experiment.measure(experiment.merge(), "sums", MOST))
    other = experiment.measure(experiment.merge(), "sums", MOST, 2, first_problem=100)
    reasons = experiment.end(other)
    assert experiment.aliases == {CANDIDATE: "2", CHAMPION: "1"}
    assert "the champion was measured on other problems of sums" in reasons[CHAMPION]
    assert "promotion.replace_other_samples=true replaces it" in reasons[CHAMPION]
    experiment.end(other, replace_other_samples=True)
    assert experiment.aliases == {CANDIDATE: "2", CHAMPION: "2"}


def test_the_champion_stays_when_its_run_is_repeated(experiment: Experiment) -> None:
    folder = experiment.measure(experiment.merge(), "sums", MOST)
    experiment.end(folder)
    assert experiment.end(folder)[CHAMPION] == "kept: version 1, student fast"


def test_a_champion_that_fails_the_gate_later_is_said_to_be_kept(experiment: Experiment) -> None:
    folder = experiment.measure(experiment.merge(), "sums", "11100")
    experiment.end(folder)
    reason = experiment.end(folder, max_loss=0.1)[CHAMPION]
    assert experiment.aliases == {CANDIDATE: "1", CHAMPION: "1"}
    assert reason.startswith("kept, though version 1, student fast, is -20.0 points from the teacher's")


def test_a_champion_of_more_benchmarks_is_not_replaced_by_the_better_one_on_some(
    experiment: Experiment,
) -> None:
    merged = experiment.merge()
    experiment.end(experiment.measure(merged, "easy", MOST), experiment.measure(merged, "hard", MOST))
    easy = experiment.measure(experiment.merge(), "easy", MOST, 2)
    reason = experiment.end(easy)[CHAMPION]
    assert experiment.aliases == {CANDIDATE: "2", CHAMPION: "1"}
    assert "the champion was also measured on hard; promotion.replace_other_samples=true" in reason
    experiment.end(easy, replace_other_samples=True)
    assert experiment.aliases == {CANDIDATE: "2", CHAMPION: "2"}


def test_the_gate_holds_on_every_benchmark(experiment: Experiment) -> None:
    merged = experiment.merge()
    easy, hard = experiment.measure(merged, "easy", MOST), experiment.measure(merged, "hard", FEW)
    reasons = experiment.end(easy, hard)
    assert reasons[CANDIDATE].endswith("loses more than 25.0 points on the test problems of hard")
    assert experiment.end(easy, experiment.measure(merged, "hard", "11100"), max_loss=0.1)[
        CHAMPION
    ].startswith("not set: version 1, student fast, is -20.0 points")
    experiment.end(easy, experiment.measure(merged, "hard", MOST))
    assert experiment.aliases == {CANDIDATE: "1", CHAMPION: "1"}


def test_no_alias_before_all_benchmarks_are_finished(experiment: Experiment) -> None:
    merged = experiment.merge()
    easy, hard = experiment.measure(merged, "easy", MOST), experiment.measure(merged, "hard", MOST)
    manifest = (hard / "manifest.json").rename(hard / "aside")
    assert experiment.end(easy, hard)[CANDIDATE] == f"not set: {hard.name} is not finished"
    manifest.rename(hard / "manifest.json")
    experiment.end(easy, hard)
    assert experiment.aliases == {CANDIDATE: "1", CHAMPION: "1"}


def test_aliases_are_decided_by_a_later_upload(
    experiment: Experiment, store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent waits before the model that it nominates."""
    with monkeypatch.context() as unreachable:
        unreachable.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        merged = experiment.home / "merging-fast-0"
        Stage("merging", MergingConfig(), {}, merged).finish([])
        promotion = Promotion(benchmarks=[str(experiment.measure(merged, "sums", MOST))])
        with (
            track(experiment.home, "distill", "sums", {}, promotion=promotion) as run,
            track(experiment.home, "merging", "m", {}, run.as_parent, str(merged), student="fast"),
        ):
            pass
    assert not store.search_registered_models()
    assert upload(tmp_path) == []
    assert experiment.aliases == {CANDIDATE: "1", CHAMPION: "1"}


def test_mlflow_loads_a_registered_model(
    store: MlflowClient, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pickle; its own decoding is the one with which it was measured."""
    experiment = Experiment(tmp_path / "runs", tiny_checkpoint, store)
    merged = experiment.merge_a_model()
    experiment.end(experiment.measure(merged, "sums", MOST))

    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("cloudpickle.load", None)
    mlflow.set_tracking_uri(tracking_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    model = mlflow.pyfunc.load_model("models:/sums@champion")
    prompts = pd.DataFrame({"prompt": ["Tom has 7 coins", "and buys 2"]})
    found = model.predict(prompts)
    expected = dparallel.complete(
        dparallel.load_model(merged),
        dparallel.load_tokenizer(merged),
        prompts["prompt"].tolist(),
        dparallel.DecodingConfig(gen_length=12, block_length=6, threshold=0.5),
    )
    assert found["response"].tolist() == [completion.text for completion in expected]
    assert found["nfe"].tolist() == [completion.nfe for completion in expected]
    one_each = model.predict(prompts, params={"rule": "steps", "steps": 12, "gen_length": 12})
    assert (one_each["nfe"] >= one_each["tokens"]).all()

    version = store.get_model_version_by_alias("sums", CHAMPION)
    folder = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(tmp_path / "downloaded")))
    assert dparallel.load_model(folder).config == dparallel.load_model(merged).config
    decoding = dparallel.DecodingConfig(gen_length=12, block_length=6, threshold=0.5)
    assert dparallel.load_model(folder).defaults.decoding() == decoding
    assert not list(folder.rglob("*.pkl"))
    assert model.metadata.signature is not None
    assert model.input_example is not None


@pytest.mark.slow
def test_a_server_registers_promotes_and_serves_a_model(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with mlflow_server(free_port, tmp_path):
        experiment = Experiment(tmp_path / "runs", tiny_checkpoint, MlflowClient(tracking_uri=uri))
        merged = experiment.merge_a_model()
        experiment.end(experiment.measure(merged, "sums", MOST))
        assert experiment.aliases == {CANDIDATE: "1", CHAMPION: "1"}
        other = experiment.measure(experiment.merge(), "sums", MOST, 2)
        assert experiment.end(other)[CHAMPION].startswith("set: version 2"), "the evidence was downloaded"
        mlflow.set_tracking_uri(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        model = mlflow.pyfunc.load_model("models:/sums/1")
        assert len(model.predict(pd.DataFrame({"prompt": ["Tom has 7 coins"]}))) == 1


def test_files_of_a_model_cannot_be_named_by_mlflows_address() -> None:
    with pytest.raises(dparallel.CheckpointError, match="mlflow artifacts download"):
        dparallel.load_model("models:/sums@champion")

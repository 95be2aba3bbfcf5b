"""A run's settings and code stay those with which it was started."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig, MergingConfig, StudentConfig
from dparallel.config.files import load_config
from dparallel.stages import code, origin
from dparallel.stages.experiment import Experiment
from dparallel.stages.manifest import Stage, read_manifest
from dparallel.stages.origin import CodeChangedError, Origin
from dparallel.stages.snapshot import Snapshot, code_of, take_snapshot
from tests.conftest import TEACHERS

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config in a folder of its own, with an included file beside it."""
    folder = tmp_path / "configs"
    folder.mkdir()
    text = (CONFIGS / "tiny.yaml").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(text.replace("recipes/consistency", "recipe"), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        "{region: block, block_length: 12, masking: random, mask_ratio: 0.5, certainty_weight: 0.0}",
        encoding="utf-8",
    )
    return folder / "mine.yaml"


def test_a_snapshot_is_independent_of_files_and_working_folder(config: Path, tmp_path: Path) -> None:
    snapshot = take_snapshot("configs/mine.yaml", ["launch.parts=3"])
    sent = json.loads(json.dumps(snapshot.as_parameter()))
    before = load_config(DistillConfig, config, ["launch.parts=3", f"runs={tmp_path}/runs"])
    config.write_text("{}", encoding="utf-8")
    (config.parent / "recipe.yaml").unlink()
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    received = take_snapshot(sent)
    assert received.experiment() == before
    assert (received.config, received.overrides) == ("configs/mine.yaml", ("launch.parts=3",))
    assert received.code == snapshot.code


def test_the_kept_file_starts_the_same_run_again(config: Path, tmp_path: Path) -> None:
    snapshot = take_snapshot(str(config), ["launch.parts=3"])
    kept = snapshot.keep()
    assert kept.parent == Path("runs/tiny/configs")
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {config} launch.parts=3"
    config.unlink()
    again = take_snapshot(str(kept))
    assert again.experiment() == snapshot.experiment().model_copy(update={"runs": f"{tmp_path}/runs"})
    assert again.code == snapshot.code
    changed = os.stat(kept).st_mtime_ns
    assert snapshot.keep() == kept
    assert os.stat(kept).st_mtime_ns == changed


@pytest.mark.parametrize(
    "name",
    [path.name for path in sorted(CONFIGS.glob("*.yaml")) if path not in TEACHERS],
)
def test_every_experiment_survives_as_a_snapshot(name: str) -> None:
    snapshot = take_snapshot(name)
    assert snapshot.experiment() == load_config(DistillConfig, CONFIGS / name)
    students = snapshot.experiment().students
    assert load_config(DistillConfig, snapshot.keep(), ["runs=runs"]).students == students
    assert set(snapshot.code) == {
        "trajectories",
        "training",
        "merging",
        *(
            f"training-{student}"
            for student, recipe in snapshot.experiment().recipes.items()
            if recipe.rollouts
        ),
        *(f"benchmark-{benchmark}" for benchmark in snapshot.experiment().benchmarks),
    }


def test_a_task_of_lm_eval_survives_as_a_snapshot(config: Path) -> None:
    task = "benchmarks.coins.test={benchmark: lm_eval, task: gsm8k, protocol: {chat: true}}"
    rest = ["benchmarks.coins.validation={benchmark: lm_eval, task: gsm8k, count: 3}"]
    snapshot = take_snapshot(str(config), [task, *rest])
    assert take_snapshot(snapshot.as_parameter()).experiment().benchmarks == snapshot.experiment().benchmarks
    plan = Experiment(snapshot.experiment(), snapshot=snapshot)._plan(
        "benchmark", snapshot.experiment().benchmarks["coins"], {}, benchmark="coins"
    )
    assert plan.settings() == snapshot.experiment().benchmarks["coins"]


def test_further_overrides_change_a_snapshot(config: Path) -> None:
    sent = take_snapshot(str(config), ["launch.parts=3"]).as_parameter()
    changed = take_snapshot(sent, ["launch.parts=4", "benchmarks.coins.test.protocol.scorers=[coins,exact]"])
    assert changed.experiment().launch.parts == 4
    assert changed.overrides[:2] == ("launch.parts=3", "launch.parts=4")
    assert changed.code == code_of(changed.experiment()) != sent["code"]


def test_the_code_of_a_student_that_decodes_has_that_of_decoding(config: Path) -> None:
    """And a training without such students keeps its digest when decoding changes."""
    plain = load_config(DistillConfig, config)
    assert "training-consistency" not in code_of(plain)
    recipe = str(CONFIGS / "recipes" / "rollouts.yaml")
    decoding = load_config(DistillConfig, config, [f"students.consistency={recipe}"])
    codes = code_of(decoding)
    assert codes["training"] == code_of(plain)["training"]
    assert codes["training-consistency"] == code.code_digest((*code.MODULES["training"], *code.DECODING))
    settings = StudentConfig(training=decoding.training, recipe=decoding.students["consistency"])
    assert Origin(code=codes["training-consistency"]).accepted_code("training", settings) is not None
    other = StudentConfig(training=decoding.training, recipe=decoding.students["trajectory_ordered"])
    assert Origin(code=codes["training"]).accepted_code("training", other) == codes["training"]


@pytest.mark.parametrize("wrong", [{}, {"config": "a", "settings": {}, "code": {}, "more": 1}])
def test_what_is_no_snapshot_is_named(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="config: neither a file nor a run's snapshot"):
        take_snapshot(wrong)
    sent = Snapshot(config="a.yaml", settings={"name": "a"}, code={}).as_parameter()
    with pytest.raises(ConfigError, match=r"^a\.yaml: teacher: required key is missing"):
        take_snapshot(sent).experiment()


def test_edited_code_is_used_from_the_next_run_on(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process goes on with the modules it has loaded; one that loads other code refuses."""
    snapshot = take_snapshot(str(config))
    monkeypatch.setattr(code, "_digest", lambda file: "another")  # as if every file were edited
    assert take_snapshot(str(config)).code == snapshot.code
    code._own_digest.cache_clear()  # as in a new process
    try:
        assert take_snapshot(str(config)).code != snapshot.code
        plan = Experiment(snapshot.experiment(), snapshot=snapshot).trajectories()
        with pytest.raises(
            CodeChangedError, match=rf"\({snapshot.code['trajectories']}\), and the code here"
        ):
            Stage("trajectories", plan.settings(), plan.inputs, plan.out_dir, plan.origin)
        assert not Path(plan.out_dir).exists()
    finally:
        code._own_digest.cache_clear()


def test_a_manifest_says_where_its_result_comes_from(tmp_path: Path) -> None:
    made = Origin(config="a.yaml", overrides=("b=1",), flow_run="brave-otter (1)")
    manifest = Stage("merging", MergingConfig(), {}, tmp_path / "out", made).finish([])
    assert read_manifest(tmp_path / "out") == manifest
    recorded = manifest.origin
    assert {key: recorded[key] for key in ("config", "overrides", "flow_run")} == {
        "config": "a.yaml",
        "overrides": ["b=1"],
        "flow_run": "brave-otter (1)",
    }
    assert "threads: 1" in recorded["hardware"]
    assert {"python", "torch", "peft", "deepspeed"} <= set(manifest.versions)
    other = Stage("merging", MergingConfig(), {}, tmp_path / "other").finish([])
    assert other.fingerprint == manifest.fingerprint  # who made it is no part of what it is


def test_the_commit_is_that_of_this_repository_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_in(folder: Path) -> dict:
        monkeypatch.setattr(origin, "PACKAGE", folder / "dparallel")
        origin.commit.cache_clear()
        return origin.commit()

    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    installed = tmp_path / ".venv" / "lib"
    for folder in (tmp_path / "dparallel", installed / "dparallel"):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("1", encoding="utf-8")
    subprocess.run([*git, "init", "-q", "."], check=True)
    subprocess.run([*git, "add", "dparallel"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, encoding="utf-8"
    ).stdout.strip()
    assert commit_in(tmp_path) == {"commit": head, "uncommitted_changes": False}
    (tmp_path / "dparallel" / "a.py").write_text("2", encoding="utf-8")
    assert commit_in(tmp_path) == {"commit": head, "uncommitted_changes": True}
    assert commit_in(installed) == {"commit": None, "uncommitted_changes": None}
    monkeypatch.undo()
    origin.commit.cache_clear()

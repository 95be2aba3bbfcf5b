from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig, TrajectoriesConfig
from dparallel.config.files import load_config
from dparallel.stages.experiment import Experiment, StagePlan
from dparallel.stages.manifest import Stage, StageError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def config(tiny_checkpoint, tmp_path):
    overrides = [f"teacher={tiny_checkpoint}", f"runs={tmp_path}"]
    return load_config(DistillConfig, CONFIGS / "tiny.yaml", overrides)


def finish(plan: StagePlan) -> None:
    stage = Stage(plan.stage, plan.settings(), plan.inputs, plan.out_dir)
    (stage.folder / "result").write_text(plan.out_dir, encoding="utf-8")
    stage.finish(["result"])


def test_each_stage_waits_for_the_ones_before_it(config):
    experiment = Experiment(config)
    with pytest.raises(
        StageError, match=r"stage 'training' cannot start: .*trajectories-\w+: no such folder"
    ):
        experiment.training("consistency")
    finish(experiment.trajectories())
    with pytest.raises(StageError, match="stage 'merging' cannot start"):
        experiment.merging("consistency")
    for student in config.students:
        finish(experiment.training(student))
        finish(experiment.merging(student))
    plan = experiment.benchmark()
    assert set(plan.inputs) == {"teacher", *(f"student/{name}" for name in config.students)}
    with pytest.raises(ValueError, match="unknown student 'nobody'; this config trains certainty_forcing"):
        experiment.training("nobody")


def test_a_folder_follows_its_settings_and_inputs_only(config):
    before = Experiment(config).trajectories().out_dir
    other_recipe = config.model_copy(
        update={"training": config.training.model_copy(update={"train_steps": 7})}
    )
    assert Experiment(other_recipe).trajectories().out_dir == before
    more = config.trajectories.model_copy(update={"batch_size": 3})
    assert Experiment(config.model_copy(update={"trajectories": more})).trajectories().out_dir != before
    finish(Experiment(config).trajectories())
    folders = {Experiment(each).training("consistency").out_dir for each in (config, other_recipe)}
    assert len(folders) == 2


def test_a_changed_problems_file_makes_another_folder(config, tmp_path):
    problems = tmp_path / "problems.jsonl"
    settings = {"benchmark": "dataset", "sources": [{"path": str(problems)}]}
    section = TrajectoriesConfig.model_validate({**config.trajectories.model_dump(), "problems": settings})
    folders = set()
    for text in ("1", "2"):
        problems.write_text(text, encoding="utf-8")
        folders.add(Experiment(config.model_copy(update={"trajectories": section})).trajectories().out_dir)
    assert len(folders) == 2


def test_a_plan_crosses_processes_as_json(config):
    plan = Experiment(config).trajectories()
    again = StagePlan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.settings() == config.trajectories
    assert isinstance(again.settings(), TrajectoriesConfig)


def test_settings_are_checked_together(config):
    with pytest.raises(ConfigError, match=r"students\.consistency\.mask_ratio"):
        load_config(DistillConfig, CONFIGS / "tiny.yaml", ["students.consistency.mask_ratio=2"])

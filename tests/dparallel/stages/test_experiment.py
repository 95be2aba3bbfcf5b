from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import Baseline, DistillConfig, TrajectoriesConfig
from dparallel.config.files import load_config
from dparallel.config.teacher import TeacherConfig
from dparallel.stages.experiment import Experiment, StagePlan
from dparallel.stages.manifest import Stage, StageError, fingerprint, read_manifest

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
    plan = experiment.benchmark("coins")
    assert set(plan.inputs) == {"teacher", *(f"student/{name}" for name in config.students)}
    assert plan.sets_defaults


def test_the_first_benchmark_that_chooses_sets_decode_defaults(config):
    coins = config.benchmarks["coins"]
    published = coins.model_copy(update={"validation": None})
    several = {"first": published, "second": coins, "third": coins}
    assert config.model_copy(update={"benchmarks": several}).setting_defaults == "second"
    nothing = {"first": published, "second": published}
    assert config.model_copy(update={"benchmarks": nothing}).setting_defaults == "first"


def test_a_folder_follows_its_settings_and_inputs_only(config):
    before = Experiment(config).trajectories().out_dir
    other_recipe = config.model_copy(
        update={"training": config.training.model_copy(update={"train_steps": 7})}
    )
    assert Experiment(other_recipe).trajectories().out_dir == before
    more = config.trajectories.problems.model_copy(update={"count": 3})
    fewer = config.trajectories.model_copy(update={"problems": more})
    assert Experiment(config.model_copy(update={"trajectories": fewer})).trajectories().out_dir != before
    finish(Experiment(config).trajectories())
    folders = {Experiment(each).training("consistency").out_dir for each in (config, other_recipe)}
    assert len(folders) == 2


def test_how_work_is_done_is_no_part_of_a_folders_name(config):
    """So that the remedies proposed by `plan` continue from the existing checkpoint."""
    finish(Experiment(config).trajectories())
    how = {
        "trajectories": {"batch_size": 3, "shard_size": 7},
        "training": {
            "micro_batch_size": 2,
            "gradient_checkpointing": True,
            "deepspeed": {"zero_optimization": {"stage": 3}},
            "log_every": 3,
            "checkpoint_every": 4,
        },
    }
    changed = config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in how.items()}
    )
    before, after = Experiment(config), Experiment(changed)
    assert before.trajectories().out_dir == after.trajectories().out_dir
    assert before.training("consistency").out_dir == after.training("consistency").out_dir
    assert after.training("consistency").settings().training.micro_batch_size == 2
    finish(after.training("consistency"))
    made = read_manifest(after.training("consistency").out_dir)
    assert made.how["training"] == how["training"]
    assert "micro_batch_size" not in made.config["training"]


@pytest.fixture
def other_code(monkeypatch):
    """As if losses and rules had been corrected."""

    def change() -> None:
        for module in ("origin", "snapshot"):
            monkeypatch.setattr(
                f"dparallel.stages.{module}.stage_digest", lambda stage, config: "c0123456789a"
            )

    return change


def test_a_mended_rule_does_not_return_the_old_result(config, other_code, caplog):
    old = Experiment(config).trajectories()
    finish(old)
    made_by = read_manifest(old.out_dir).code
    other_code()
    new = Experiment(config).trajectories()
    assert new.out_dir != old.out_dir
    assert f"{old.out_dir} was made by other code ({made_by}); to keep using it" in caplog.text
    with pytest.raises(StageError, match=rf"code: '{made_by}' there, 'c0123456789a' now"):
        Stage("trajectories", old.settings(), old.inputs, old.out_dir)

    vouched = Experiment(config.model_copy(update={"code": {"trajectories": made_by}})).trajectories()
    assert (vouched.out_dir, vouched.origin.vouched) == (old.out_dir, made_by)
    assert Stage("trajectories", vouched.settings(), vouched.inputs, old.out_dir, vouched.origin).done


def test_the_same_bytes_by_other_code_leave_later_stages_as_they_are(config, other_code):
    finish(Experiment(config).trajectories())
    one = fingerprint(Experiment(config).trajectories().out_dir)
    text = (Path(Experiment(config).trajectories().out_dir) / "result").read_text(encoding="utf-8")
    other_code()
    plan = Experiment(config).trajectories()
    stage = Stage(plan.stage, plan.settings(), plan.inputs, plan.out_dir)
    (stage.folder / "result").write_text(text, encoding="utf-8")
    stage.finish(["result"])
    assert fingerprint(plan.out_dir) == one


def test_a_baseline_is_found_where_its_name_leads(config, tiny_checkpoint):
    """A Hub id is resolved to a folder when it is needed."""
    [(name, coins)] = config.benchmarks.items()
    baseline = Baseline(model="owner/name", decoding=coins.reference)
    benchmarks = {name: coins.model_copy(update={"baselines": {"other": baseline}})}
    named = config.model_copy(update={"teacher": "owner/teacher", "benchmarks": benchmarks})
    asked = []

    def folder_of(name: str) -> Path:
        asked.append(name)
        return tiny_checkpoint

    experiment = Experiment(named, folder_of)
    finish(experiment.trajectories())
    assert asked == ["owner/teacher"]
    for student in config.students:
        finish(experiment.training(student))
        finish(experiment.merging(student))
    plan = experiment.benchmark("coins")
    assert plan.inputs["baseline/other"] == plan.inputs["teacher"] == str(tiny_checkpoint)
    assert asked == ["owner/teacher", "owner/name"]


def test_stages_and_students_that_are_unknown(config):
    finish(Experiment(config).trajectories())
    with pytest.raises(ConfigError, match="unknown student 'nobody'; this config trains certainty_forcing"):
        Experiment(config).training("nobody")
    with pytest.raises(ConfigError, match="unknown benchmark 'maths'; this config has coins"):
        Experiment(config).benchmark("maths")
    with pytest.raises(ConfigError, match="unknown stage 'tea'; known: teacher, trajectories"):
        StagePlan(stage="tea", config={}, inputs={}, out_dir="out").settings()
    settings = {"out": "out", "train_steps": 3}
    plan = StagePlan(stage="teacher", config=settings, inputs={}, out_dir="out")
    assert plan.settings() == TeacherConfig(**settings)


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


def test_a_student_that_is_trained_already_is_only_merged(config, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "own.yaml").write_text(f"adapter: {adapter}\nattention: block_causal\n", encoding="utf-8")
    overrides = [f"teacher={config.teacher}", f"runs={tmp_path}", f"students.d2f={tmp_path / 'own.yaml'}"]
    config = load_config(DistillConfig, CONFIGS / "tiny.yaml", overrides)
    assert set(config.adapters) == {"d2f"}
    assert {*config.recipes, "d2f"} == set(config.students)
    experiment = Experiment(config)
    plan = experiment.merging("d2f")  # needs no other stage
    assert plan.inputs == {"teacher": config.teacher, "adapter": str(adapter)}
    assert plan.settings().attention == "block_causal"
    assert "attention" not in config.merging.what()  # which keeps the keys of trained students
    with pytest.raises(ConfigError, match="unknown student 'd2f'.*this config trains"):
        experiment.training("d2f")
    (adapter / "adapter_config.json").write_text('{"r": 1}', encoding="utf-8")
    assert Experiment(config).merging("d2f").out_dir != plan.out_dir


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students={d2f: {adapter: ./a}}", "students: d2f: all are adapters, so nothing is trained"),
        (
            "students.d2f={adapter: ./a, masking: random}",
            r"students\.d2f\.masking: unknown key; .*known: adapter",
        ),
        (
            "students.d2f={adapter: ./a, attention: causal}",
            r"students\.d2f\.attention: unknown value 'causal'",
        ),
        ("merging.attention=full", r"merging\.attention='full': a student states its own attention"),
    ],
)
def test_adapters_that_cannot_be_students_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DistillConfig, CONFIGS / "tiny.yaml", [override])

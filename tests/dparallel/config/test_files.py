import json
from pathlib import Path

import pytest

from dparallel.config.base import Config, ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import (
    BenchmarkConfig,
    DistillConfig,
    LoraSettings,
    OptimizerConfig,
    PromotionConfig,
    Sweep,
    TrainingConfig,
    TrajectoriesConfig,
)
from dparallel.config.files import load_config, read_settings
from dparallel.config.paths import PATHS
from dparallel.config.problems import ProblemsConfig, ProtocolConfig, SourceConfig
from dparallel.config.teacher import TeacherConfig

BENCHMARK = {
    "test": {"benchmark": "coins", "count": 1, "split": "test"},
    "validation": {"benchmark": "coins", "count": 1, "split": "validation"},
    "reference": {"rule": "steps", "steps": 8},
    "sweeps": {"entropy": {"decoding": {}, "thresholds": [0.1]}},
    "teacher_sweeps": ["entropy"],
    "student_sweeps": ["entropy"],
}
ONE_TOKEN = {"rule": "steps", "steps": 256}
RIVAL = {"model": "a", "decoding": {"mode": "autoregressive"}}
TRAJECTORIES = """
problems: {benchmark: coins, count: 10}
decoding: decoding.yaml
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "decoding.yaml").write_text(
        "{gen_length: 36, block_length: 12, rule: steps, steps: 36}", encoding="utf-8"
    )
    path = tmp_path / "trajectories.yaml"
    path.write_text(TRAJECTORIES, encoding="utf-8")
    return path


def test_files_are_inlined_and_overrides_laid_on_top(config_file):
    config = load_config(
        TrajectoriesConfig, config_file, ["decoding.steps=18", "problems.split=validation", "batch_size=2"]
    )
    assert config.decoding == DecodingConfig(gen_length=36, block_length=12, rule="steps", steps=18)
    assert (config.problems.split, config.batch_size) == ("validation", 2)


def test_a_path_that_ends_like_a_config_file_is_a_path(tmp_path):
    (tmp_path / "rows.json").write_text('{"question": ["1?"], "answer": ["1"]}', encoding="utf-8")
    given = tmp_path / "problems.yaml"
    given.write_text(
        f"{{benchmark: dataset, path: {tmp_path}/rows.json, protocol: protocol.yaml}}", encoding="utf-8"
    )
    (tmp_path / "protocol.yaml").write_text(
        "{prompt: '{question}', data: [{path: a/b, reference: answer}]}", encoding="utf-8"
    )
    assert load_config(ProblemsConfig, given).path == f"{tmp_path}/rows.json"
    overridden = load_config(ProblemsConfig, given, [f"path={tmp_path}/others.json"])
    assert overridden.path == f"{tmp_path}/others.json"


def test_every_setting_that_is_a_path_is_known_as_one():
    def local_paths(config):
        for name, field in config.model_fields.items():
            if "_located" in repr(field.metadata) + repr(field.annotation):
                yield name

    def configs(kind):
        for below in kind.__subclasses__():
            yield below
            yield from configs(below)

    assert {name for config in configs(Config) for name in local_paths(config)} <= set(PATHS)
    assert "path" in set(local_paths(SourceConfig))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoding.stepz=18"], r"decoding\.stepz: unknown key; did you mean 'steps'\? known: block_add_thr"),
        (["batchsize=1"], r"batchsize: unknown key; did you mean 'batch_size'"),
        (
            ["problems.splat=test", "batch_size=0"],
            r"problems\.splat: .*'split'.*; batch_size: .* greater than 0",
        ),
        (
            ["problems.chat=true"],
            r"problems\.chat: unknown key; did you mean 'protocol\.chat'\? known: be",
        ),
        (["problems.scorer=exact"], r"problems\.scorer: unknown key; did you mean 'protocol\.scorers'"),
        (["problems.chat_template=a"], r"unknown key; did you mean 'protocol\.chat_template'"),
        (["batch_size=many"], r"batch_size: .*valid integer.*got 'many'"),
        (["batch_size=0"], r"batch_size: .*greater than 0, got 0"),
        (["decoding.gen_length=37"], r"gen_length=37 is not divisible by block_length=12.*nearest .* 36"),
        (["decoding.rule=fastest"], r"decoding\.rule: unknown rule='fastest'; .*known rules: steps, confid"),
        (
            ["problems.benchmark=gsm9k"],
            r"problems\.benchmark: unknown value 'gsm9k'; known: coins, ledger, dat",
        ),
        (["problems="], r"problems: .*got None"),
        (["batch_size"], r"override 'batch_size' is not of the form"),
        (["decoding.steps.more=1"], r"lies below a plain value"),
        (["decoding=missing.yaml"], r"missing\.yaml: no such config file"),
        (["problems.protocol=gsm8k"], r"got 'gsm8k'; did you mean 'protocols/gsm8k_d2f\.yaml', .*known: pro"),
        (
            ["decoding=fast"],
            r"decoding: Input should be a section, or the path of a config file, got 'fast'$",
        ),
        (["decoding=reciepes/d2f.yaml"], r"no such config file .*; did you mean 'recipes/d2f\.yaml'\?$"),
        (["batch_size=true"], r"batch_size: Input should be a valid integer, got True"),
        (["batch_size=yes"], r"batch_size: Input should be a valid integer, got 'yes'"),
        (["batch_size='3'"], r"batch_size: Input should be a valid integer, got '3'"),
        (["batch_size=3.5"], r"batch_size: .*valid integer.*, got 3\.5"),
        (["batch_size=1:30"], r"batch_size: .*valid integer.*, got '1:30'"),
        (["decoding.threshold=true"], r"decoding\.threshold: Input should be a valid number, got True"),
        (["decoding.threshold='0.5'"], r"decoding\.threshold: Input should be a valid number, got '0\.5'"),
        (["decoding.threshold=.nan"], r"decoding\.threshold: .*finite number, got nan"),
        (["decoding.threshold=.inf"], r"decoding\.threshold: .*finite number, got inf"),
        (["decoding.compile=2"], r"decoding\.compile: .*valid boolean.*, got 2"),
        (["decoding.rule=3"], r"decoding\.rule: .*valid string, got 3"),
        (["decoding={a: 1, a: 2}"], r"override 'decoding=\{a: 1, a: 2\}': .*duplicate key \"a\""),
        (
            ["batch_size=[1"],
            r"override 'batch_size=\[1': not valid YAML: expected ',' or '\]'.*line 1, column 3",
        ),
    ],
)
def test_mistakes_are_named(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrajectoriesConfig, config_file, overrides)


def test_missing_broken_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(TrajectoriesConfig, tmp_path / "none.yaml")
    for text, message in (
        ("a: [1", "not valid YAML"),
        ("", "holds NoneType"),
        ("{}", "problems: required key"),
    ):
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_config(TrajectoriesConfig, tmp_path / "bad.yaml")


@pytest.mark.parametrize("name", [r"a\0.yaml", "x" * 5_000 + ".yaml"])
def test_a_name_that_no_file_can_have(tmp_path, name):
    (tmp_path / "a.yaml").write_text(f'decoding: "{name}"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no file can have this name|cannot be read"):
        read_settings(tmp_path / "a.yaml")


def test_a_key_given_twice_and_a_file_that_includes_itself(tmp_path):
    (tmp_path / "twice.yaml").write_text("batch_size: 1\nbatch_size: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r'duplicate key "batch_size" .*line 2, column 1'):
        load_config(TrajectoriesConfig, tmp_path / "twice.yaml")
    (tmp_path / "loop.yaml").write_text("problems: loop.yaml", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"loop\.yaml includes itself"):
        load_config(TrajectoriesConfig, tmp_path / "loop.yaml")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (TrainingConfig, {"optimizer": {"learning_rate": 1e-3}}, "give exactly one"),
        (
            TrainingConfig,
            {"optimizer": {"learning_rate": 1e-3, "schedule": "step"}, "epochs": 1},
            "known: constant, linear, cosine",
        ),
        (ProblemsConfig, {"benchmark": "coins"}, "give count"),
        (ProblemsConfig, {"benchmark": "coins", "count": 1, "sources": [{"path": "a"}]}, "it is generated"),
        (ProblemsConfig, {"benchmark": "dataset"}, "needs sources"),
        (ProblemsConfig, {"benchmark": "dataset", "sources": [{"path": "a"}], "seed": 3}, "give count"),
        (
            ProblemsConfig,
            {"benchmark": "coins", "count": 1, "protocol": {"chat_template": "a.jinja"}},
            "no effect with chat=false",
        ),
        (ProblemsConfig, {"benchmark": "coins", "count": 10_000_000_000}, "at most 100000; lower count"),
        (ProblemsConfig, {"benchmark": "coins", "count": 1, "protocol": {"extra": ["a"]}}, "has no columns"),
        (ProtocolConfig, {"stops": [""]}, "would end every response"),
        (ProtocolConfig, {"scorers": ["exact", "exact"]}, "names something twice"),
        (ProtocolConfig, {"examples_as": "text"}, "no effect without chat=true"),
        (ProtocolConfig, {"prompt": "put it in {}"}, "must name the columns"),
        (TeacherConfig, {"out": "a", "check_problems": 10_000_000_000}, "less than or equal to 100000"),
        (SourceConfig, {"path": "a", "prompt": "put it in \\boxed{}"}, "must name the columns"),
        (SourceConfig, {"path": "a", "prompt": "{question"}, "write {{ and }} for braces"),
        (SourceConfig, {"path": "a", "seed": 3}, "give count"),
        (BenchmarkConfig, {**BENCHMARK, "max_loss": 5}, r"max_loss: Input should be less .* 1, got 5"),
        (PromotionConfig, {"max_loss": 1.5}, r"max_loss: Input should be less .* 1, got 1\.5"),
        (
            BenchmarkConfig,
            {**BENCHMARK, "fixed": {"entropy": {}}},
            "sweeps 'entropy' and fixed 'entropy' have the same name .*; rename one of them",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "teacher_sweeps": ["entrpy"]},
            r"unknown sweep \['entrpy'\]; did you mean 'entropy'\? sweeps defines \['entropy'\]",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "student_sweeps": 3},
            "student_sweeps: Give a list of sweeps, or such a list for every student by name, got 3",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "student_sweeps": {"a": ["entropy"], "b": []}},
            r"^student_sweeps\.b: number of entries must be at least 1, got \[\]$",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "reference": ONE_TOKEN, "fixed": {"one_token_per_step": {}}},
            "fixed 'one_token_per_step' and the reference 'one_token_per_step' have the same name",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "fixed": {"Reference": {}}},
            "fixed 'Reference' and the reference 'reference' have the same name in folders and metrics",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "fixed": {"baseline": {}}, "baselines": {"llama": RIVAL}},
            "the baselines' method 'baseline' and fixed 'baseline' have the same name",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "baselines": {"llama": RIVAL, "Llama": RIVAL}},
            "baselines 'Llama' and baselines 'llama' have the same name",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "reference": {"temperature": 0.1}},
            r"reference\.temperature=0\.1 without reference\.seed: give a seed",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "fixed": {"few": {"temperature": 0.1}}},
            r"fixed\.few\.temperature=0\.1 without fixed\.few\.seed: give a seed",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "sweeps": {"entropy": {"decoding": {"temperature": 1}, "thresholds": [0.1]}}},
            r"sweeps\.entropy\.decoding\.temperature=1\.0 without sweeps\.entropy\.decoding\.seed",
        ),
        (
            BenchmarkConfig,
            {**BENCHMARK, "baselines": {"llama": {**RIVAL, "decoding": {"temperature": 1}}}},
            r"baselines\.llama\.decoding\.temperature=1\.0 without baselines\.llama\.decoding\.seed",
        ),
        (DistillConfig, {"name": "a/b"}, "must consist of letters"),
        (DistillConfig, {"name": ".."}, "must consist of letters"),
        (
            DistillConfig,
            {"students": {"a b": {"masking": "trajectory", "region": "response"}}},
            "must consist of letters",
        ),
        (
            Sweep,
            {"decoding": {"rule": "confidence", "threshold": 0.5}, "thresholds": [1.5]},
            "threshold=1.5 for rule=.confidence., where it is .*: give 0 to 1",
        ),
        (
            Sweep,
            {"decoding": {"rule": "steps", "steps": 8}, "thresholds": [0.5]},
            "threshold=0.5 has no effect",
        ),
        (Sweep, {"decoding": {}, "thresholds": [float("inf")]}, "finite number"),
        (LoraSettings, {"targets": []}, "number of entries must be at least 1"),
        (OptimizerConfig, {"learning_rate": 1e-3, "betas": [2, 3]}, "less than 1"),
        (
            TrajectoriesConfig,
            {"problems": {"benchmark": "coins", "count": 1}, "decoding": {"temperature": 1.0}},
            "give a seed",
        ),
    ],
)
def test_other_settings_without_sense(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        model(**settings)


def test_students_that_differ_in_case_alone_are_refused():
    tiny = Path(__file__).parents[3] / "configs" / "tiny.yaml"
    with pytest.raises(
        ConfigError, match="students 'Certainty_forcing' and students 'certainty_forcing' have"
    ):
        load_config(DistillConfig, tiny, ["students.Certainty_forcing={masking: random, block_length: 12}"])


def test_numbers_and_switches_as_yaml_writes_them(config_file):
    overrides = ["batch_size=1e1", "shard_size=3.0", "decoding.compile=yes", "decoding.stop_at_eos=no"]
    config = load_config(TrajectoriesConfig, config_file, [*overrides, "decoding.temperature=0"])
    assert (config.batch_size, config.shard_size) == (10, 3)
    assert (config.decoding.compile, config.decoding.stop_at_eos) == (True, False)
    assert isinstance(config.batch_size, int)
    assert isinstance(config.decoding.temperature, float)


@pytest.mark.parametrize("path", ["a\0b", "a\0b.yaml", "~a\0b", "/tmp/\0", "\ud800.yaml"])
def test_a_path_that_no_config_file_can_have(path, config_file):
    with pytest.raises(ConfigError, match="no file can have this name") as caught:
        load_config(TeacherConfig, path)
    assert "\0" not in str(caught.value), "printed as an escape"
    if path.endswith(".yaml") and "\0" in path:  # included
        with pytest.raises(ConfigError, match="no file can have this name"):
            load_config(TrajectoriesConfig, config_file, [f"decoding={json.dumps(path)}"])


@pytest.mark.parametrize(
    "override",
    [
        'store="/tmp/a\\0b"',
        'store="~a\\0b"',
        'store="s3://bucket/a\\0b"',
        'runs="a\\0b"',
        'runs="~\\0"',
        'teacher="a\\0b"',
        'teacher="../*\\0"',
        'name="a\\0b"',
        'launch.hostfile="a\\0b"',
        'trajectories.problems.protocol.system="a\\0b"',
        'trajectories.problems.sources=[{path: "a\\0b"}]',
        'trajectories.problems.path="a\\0b"',
        'students={"a\\0b": {masking: random}}',
    ],
)
def test_a_null_character_is_refused_in_every_text(override):
    file = Path(__file__).parents[3] / "configs" / "tiny.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(DistillConfig, file, [override])
    message = str(caught.value)
    assert override.partition("=")[0].rpartition(".")[2] in message
    assert "\0" not in message
    assert "\n" not in message
    assert "null" in message or "pattern" in message


def test_a_null_character_is_refused_by_constructors():
    with pytest.raises(ConfigError, match=r"out: '/tmp/a\\x00b' holds a null character, .* take it out"):
        TeacherConfig(out="/tmp/a\0b")

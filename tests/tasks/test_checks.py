"""The published experiments, checked completely with a small teacher from a Hub cache and local data."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dparallel.cli.main import main
from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.models.checkpoints import save_model
from dparallel.models.defaults import write_defaults
from dparallel.models.formats import CheckpointError
from dparallel.preflight.checks import check_experiment
from dparallel.preflight.memory import RESERVED
from dparallel.problems.prompts import ChatTemplateError
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import Stage, StageError
from dparallel.tiny.byte_level import LLADA, QWEN, byte_level
from dparallel.tiny.tokenizer import build_tokenizer
from flows import distill, training
from tasks.checks import checked_experiment
from tests.conftest import random_model
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP

CONFIGS = Path(__file__).parents[2] / "configs"
NUMBERS = range(1, 211)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local copies of the Hub data sets: training questions, and GSM8K's test problems."""
    folder = tmp_path_factory.mktemp("data")
    for name, buys in (("train", "buys"), ("test", "loses")):
        rows = [{"question": f"Tom {buys} {n} pens", "answer": f"so #### {n}"} for n in NUMBERS]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def snapshot(cache: Path, name: str, chat_template: str | None) -> Path:
    """A checkpoint as stored by the Hub client."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    save_model(
        random_model(max_position_embeddings=512), repository / "snapshots" / "abc", tokenizer=tokenizer
    )
    return repository / "snapshots" / "abc"


def overrides(data: Path, tmp_path: Path) -> list[str]:
    test, train = data / "test.parquet", data / "train.parquet"
    source = f"path: {test}, prompt: 'Q {{question}}', reference: answer"
    return [
        f"runs={tmp_path}",
        "launch.processes=1",
        f"trajectories.problems.sources=[{{path: {train}, prompt: '{{question}}'}}]",
        f"benchmarks.gsm8k.test.sources=[{{{source}}}]",  # of which it takes the rows [200:]
        f"benchmarks.gsm8k.validation.sources=[{{{source}}}]",
    ]


@pytest.mark.parametrize(
    ("config", "teacher"),
    [
        ("llada_8b", "GSAI-ML/LLaDA-8B-Instruct"),
        ("llada_8b_d2f", "GSAI-ML/LLaDA-8B-Instruct"),
        ("dream_7b", "Dream-org/Dream-v0-Instruct-7B"),
    ],
)
def test_the_published_experiments_fit_together(
    config: str, teacher: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshot(
        tmp_path, teacher, "{% for each in messages %}Tom has {{ each.content }} then{% endfor %}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    experiment = checked_experiment(str(CONFIGS / f"{config}.yaml"), overrides(data, tmp_path))
    assert experiment.trajectories().inputs == {"teacher": str(folder)}


SAMPLES = CONFIGS.parent / "tests" / "dparallel" / "problems" / "data"
COPIES = {  # of benchmarks: the published file, the rows it is made of here, and their number
    "gsm8k": ("gsm8k_test.jsonl", "gsm8k.jsonl", 3),
    "math": ("math_test.jsonl", "math500.jsonl", 3),
    "humaneval": ("HumanEval.jsonl", "humaneval.jsonl", 3),
    "mbpp": ("mbpp.jsonl", "mbpp.jsonl", 13),  # the test problems follow on 10 others
}


@pytest.fixture
def copies(data: Path, tmp_path: Path) -> list[str]:
    """Overrides with the data of a table's experiment: a few rows of each, in one folder."""
    for file, sample, count in COPIES.values():
        rows = (SAMPLES / sample).read_text(encoding="utf-8").splitlines()
        text = "\n".join(itertools.islice(itertools.cycle(rows), count))
        (tmp_path / file).write_text(text, encoding="utf-8")
    return [
        f"runs={tmp_path / 'runs'}",
        f"trajectories.problems.sources=[{{path: {data / 'train.parquet'}}}]",
        *(f"benchmarks.{name}.test.path={tmp_path}" for name in COPIES),
    ]


@BUBBLEWRAP
@pytest.mark.parametrize(
    ("config", "teacher", "template"),
    [
        ("table1_llada", "GSAI-ML/LLaDA-8B-Instruct", LLADA),
        ("table2_dream", "Dream-org/Dream-v0-Instruct-7B", QWEN),
    ],
)
def test_the_tables_are_planned(
    config: str,
    teacher: str,
    template: str,
    copies: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """On local copies of all data: checked like a run, then its hours for each stage."""
    repository = tmp_path / f"models--{teacher.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    tokenizer = byte_level(template)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = random_model(vocab_size=len(tokenizer), max_position_embeddings=8192, **ids)
    save_model(model, repository / "snapshots" / "abc", tokenizer=tokenizer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = str(CONFIGS / f"{config}.yaml")
    checked_experiment(path, [*copies, "launch.processes=1"])

    assert main(["plan", path, "--set", *copies, "--gpu-memory", "80GB", "--rate", "1000"]) == 0
    printed = capsys.readouterr().out
    stages = [line.strip() for line in printed.splitlines() if line.endswith(("hours", "under a minute"))]
    names = ["trajectories", "training", *(f"benchmark {name}" for name in COPIES), "together"]
    assert [line.startswith(name) for line, name in zip(stages, names, strict=True)] == [True] * len(names)
    # 256 steps three times, 64 twice, and seven thresholds with 8 (blocks) to 256 forwards; of three prompts,
    # all of which are decoded once more, alone, for their latency
    fixed = 3 * 256 + 2 * 64
    least, most = 3 * 2 * (fixed + 7 * 8), 3 * 2 * (fixed + 7 * 256)
    assert all(f" {least:,} to {most:,} " in line for line in stages[2:-1])


@pytest.mark.parametrize("config", ["table1_llada", "table2_dream", "tiny_table"])
def test_the_tables_have_the_rows_of_the_papers(config: str) -> None:
    """Of every benchmark, at exactly the published thresholds."""
    settings = load_config(DistillConfig, CONFIGS / f"{config}.yaml")
    assert list(settings.students) == ["certainty_forcing", "consistency", "d3llm", "d2f"]
    for name, benchmark in settings.benchmarks.items():
        length = benchmark.reference.gen_length
        assert benchmark.reference.steps == length
        assert benchmark.fixed["few_step"].steps == length // 4
        assert (benchmark.fixed["dual_cache"].cache, benchmark.fixed["dual_cache"].steps) == ("dual", length)
        assert benchmark.teacher_sweeps == ("confidence",)
        assert [benchmark.sweeps_of(student) for student in settings.students] == [
            ("entropy", "multi_block"),
            ("entropy",),
            ("entropy", "multi_block"),
            ("pipelined",),
        ]
        assert list(benchmark.fixed_of("consistency")) == ["few_step"]
        assert benchmark.fixed_of("certainty_forcing") == {"one_token_per_step": benchmark.reference}
        assert benchmark.fixed_of("d2f") == {}
        assert benchmark.sweeps["confidence"].thresholds == (0.9,)
        if config != "tiny_table":
            published = benchmark.test.protocol.decoding
            assert published is not None
            assert benchmark.sweeps["entropy"].thresholds == (published.threshold,), name
            assert (length, benchmark.sweeps["entropy"].decoding.block_length) == (256, 32)


def test_a_teacher_without_a_chat_template_is_refused(data: Path, tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "base/model", None)
    settings = [*overrides(data, tmp_path), f"teacher={folder}"]
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        checked_experiment(str(CONFIGS / "llada_8b.yaml"), settings)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU with room for the driver and 16 MiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = SimpleNamespace(total_memory=RESERVED + 2**24)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: device)


@pytest.mark.usefixtures("small_gpu")
def test_a_gpu_too_small_for_training_is_named_before_anything_is_recorded(tmp_path: Path) -> None:
    """Except if training runs on another machine; the tiny teacher itself fits."""
    settings = [f"runs={tmp_path}", f"teacher={CONFIGS.parent / 'teachers' / 'tiny'}"]
    with pytest.raises(ConfigError, match="training needs .* on each GPU"):
        distill.plan(str(CONFIGS / "tiny.yaml"), settings)
    with pytest.raises(ConfigError, match="training needs .* on each GPU"):
        training.plan(str(CONFIGS / "tiny.yaml"), settings)
    distill.plan(str(CONFIGS / "tiny.yaml"), settings, on_pools=("training",))


@pytest.mark.usefixtures("small_gpu")
def test_a_gpu_too_small_to_decode_is_named(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    save_model(random_model(**shape), tmp_path / "teacher", tokenizer=build_tokenizer())
    settings = [f"runs={tmp_path}", f"teacher={tmp_path / 'teacher'}"]
    with pytest.raises(ConfigError, match="recording trajectories and the benchmark need .* one row"):
        distill.plan(str(CONFIGS / "tiny.yaml"), settings, on_pools=("training",))
    distill.plan(str(CONFIGS / "tiny.yaml"), settings, on_pools=("training", "trajectories", "benchmark"))


def finish(plan: StagePlan) -> None:
    stage = Stage(plan.stage, plan.settings(), plan.inputs, plan.out_dir)
    (stage.folder / "adapter").mkdir()
    (stage.folder / "adapter" / "weights").write_bytes(b"weights")
    stage.finish(["adapter/weights"])


def test_a_baseline_on_the_hub_is_found_beforehand_and_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later stages use the same folder, resolved once, as the teacher's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = [
        f"runs={tmp_path}",
        f"teacher={CONFIGS.parent / 'teachers' / 'tiny'}",
        "benchmarks.coins.baselines={rival: {model: org/rival, decoding: {gen_length: 36, "
        "block_length: 12}}}",
    ]
    with pytest.raises(CheckpointError, match="org/rival"):
        checked_experiment(str(CONFIGS / "tiny.yaml"), settings)
    folder = snapshot(tmp_path / "cache", "org/rival", None)
    experiment = checked_experiment(str(CONFIGS / "tiny.yaml"), settings)
    finish(experiment.trajectories())
    for student in experiment.config.students:
        finish(experiment.training(student))
        finish(experiment.merging(student))
    assert experiment.benchmark("coins").inputs["baseline/rival"] == str(folder)


def test_a_baseline_is_decoded_as_its_checkpoint_says_unless_the_config_does(tmp_path: Path) -> None:
    rival = shutil.copytree(CONFIGS.parent / "teachers" / "tiny", tmp_path / "rival")
    for name in ("manifest.json", "stage.json"):
        (rival / name).unlink()
    settings = [f"runs={tmp_path}", f"benchmarks.coins.baselines.rival.model={rival}"]
    with pytest.raises(
        ConfigError, match=r"coins\.baselines\.rival\.decoding: required, since .*/rival states"
    ):
        checked_experiment(str(CONFIGS / "tiny.yaml"), settings, stages=[])
    decoding = DecodingConfig(gen_length=36, block_length=12, rule="confidence", threshold=0.6)
    write_defaults(rival, decoding.portable())
    experiment = checked_experiment(str(CONFIGS / "tiny.yaml"), settings, stages=[])
    assert experiment.config.benchmarks["coins"].baseline_decodings == {"rival": decoding}
    handed_on = checked_experiment(experiment.as_parameter(), stages=[])
    write_defaults(rival, None)
    assert handed_on.config.benchmarks["coins"].baseline_decodings == {"rival": decoding}
    assert handed_on.snapshot.overrides == tuple(settings), "as the user gave them"
    stated = [*settings, "benchmarks.coins.baselines.rival.decoding={gen_length: 36, block_length: 6}"]
    found = checked_experiment(str(CONFIGS / "tiny.yaml"), stated, stages=[])
    assert found.config.benchmarks["coins"].baseline_decodings["rival"].block_length == 6


def test_settings_that_only_a_later_stage_would_refuse(tmp_path: Path) -> None:
    settings = [f"runs={tmp_path}", f"teacher={CONFIGS.parent / 'teachers' / 'tiny'}"]
    with pytest.raises(CheckpointError, match="in our own format"):
        checked_experiment(str(CONFIGS / "tiny.yaml"), [*settings, "merging.format=original"])


@pytest.mark.parametrize(
    ("config", "setting", "message"),
    [
        (
            "tiny",
            "benchmarks.coins.fixed.rival={mode: autoregressive, gen_length: 36}",
            r"mode='autoregressive' with a model that states no attention_pattern",
        ),
        (
            "tiny",
            "students.consistency=../configs/recipes/d2f.yaml",
            r"consistency.attention=block_causal with benchmarks.coins.sweeps.entropy.*give consistency its",
        ),
        (
            "tiny_d2f",
            "students.d2f=../configs/recipes/consistency.yaml",
            r"d2f.attention=full with benchmarks.coins.sweeps.pipelined.decoding.mode=pipelined",
        ),
        (
            "tiny",
            "teacher=teachers/tiny_autoregressive",
            r"attention_pattern='causal': a teacher must have full attention",
        ),
        (
            "tiny_recipes",
            "benchmarks.coins.student_sweeps={d2f: [pipelined]}",
            "student_sweeps lists d2f, and not certainty_forcing, .*, group: give a list for every",
        ),
        (
            "tiny",
            "students.consistency=../configs/recipes/near_far_privileged.yaml",
            r"consistency.teacher_prompt=privileged without trajectories.privileged: set it",
        ),
        (
            "tiny",
            "students.consistency={masking: trajectory, region: response, near_far: {delta: 36}}",
            r"consistency.near_far.delta=36 with trajectories.decoding.steps=36: no token is far",
        ),
        (
            "tiny",
            "students.consistency={masking: random, region: response, targets: teacher, rollouts: {every: 1, "
            "prompts: 1, decoding: {gen_length: 32}}}",
            r"consistency.rollouts.decoding.gen_length=32 is not .* length 36: set it to 36",
        ),
    ],
)
def test_models_are_decoded_as_they_attend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, setting: str, message: str
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    setting = setting.replace("../configs", str(CONFIGS))
    with pytest.raises(ValueError, match=message):
        checked_experiment(str(CONFIGS / f"{config}.yaml"), [f"runs={tmp_path}", setting])


@pytest.mark.parametrize("model", ["teacher", "baseline"])
def test_a_damaged_model_is_refused_before_anything_starts(tmp_path: Path, model: str) -> None:
    tiny, damaged = CONFIGS.parent / "teachers" / "tiny", tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    decoding = "{gen_length: 36, block_length: 12}"
    settings = [
        f"runs={tmp_path / 'runs'}",
        f"teacher={damaged if model == 'teacher' else tiny}",
        f"benchmarks.coins.baselines={{rival: {{model: {damaged}, decoding: {decoding}}}}}",
    ]
    config = str(CONFIGS / "tiny.yaml")
    checked_experiment(config, settings)
    edited = (tiny / "tokenizer_config.json").read_text(encoding="utf-8")
    (damaged / "tokenizer_config.json").write_text(edited.replace("{", "{ ", 1), encoding="utf-8")
    with pytest.raises(StageError, match=r"tokenizer_config\.json does not match manifest\.json"):
        check_experiment(load_config(DistillConfig, config, settings))  # like `plan`, without hashing
    (damaged / "tokenizer_config.json").write_text(edited.replace("\n", " ", 1), encoding="utf-8")
    with pytest.raises(StageError, match=r"tokenizer_config\.json does not match manifest\.json"):
        checked_experiment(config, settings)
    (damaged / "manifest.json").write_bytes(b"")
    with pytest.raises(StageError, match=r"manifest\.json is damaged"):
        check_experiment(load_config(DistillConfig, config, settings))

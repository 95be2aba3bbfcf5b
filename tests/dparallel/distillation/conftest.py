"""A small recording to train on, and real launches of the training stage."""

import json
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import (
    LoraSettings,
    OptimizerConfig,
    StudentConfig,
    TrainingConfig,
    TrajectoriesConfig,
)
from dparallel.config.files import load_config
from dparallel.config.problems import ProblemsConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.distillation.__main__ import main
from dparallel.distillation.data import Samples
from dparallel.distillation.trainer import Trainer, run_stage
from dparallel.problems.embedded import EOS, embedded_task
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import Manifest, Stage
from dparallel.tiny.tokenizer import build_tokenizer
from dparallel.trajectories.schema import ShardMetadata
from dparallel.trajectories.store import shard_name, write_shard

DECODING = DecodingConfig(gen_length=36, block_length=12, rule="steps", steps=36)


def trajectory_rows(count: int) -> list[dict]:
    """Valid solutions in an arbitrary order; every second prompt is shorter, every fifth row incorrect."""
    task = embedded_task("coins")
    rng, tokenizer, rows = random.Random(0), build_tokenizer(), []
    for index, problem in zip(range(count), task.problems("train", seed=0), strict=False):
        words = task.draw_solution(problem, rng).split()
        response = [*words, *[EOS] * (36 - len(words))]
        prompt = problem.prompt.split()[index % 2 :]
        blocks = [rng.sample(range(start, start + 12), 12) for start in (0, 12, 24)]
        rows.append(
            {
                "problem_id": str(index),
                "source": "coins",
                "prompt": " ".join(prompt),
                "prompt_ids": tokenizer.convert_tokens_to_ids(prompt),
                "response_ids": tokenizer.convert_tokens_to_ids(response),
                "commit_step": [step for block in blocks for step in block],
                "confidence": [0.5] * 36,
                "response": " ".join(words),
                "reference": problem.answer,
                "correct": (True, True, True, True, False)[index % 5],
                "nfe": 36,
                "num_tokens": len(words) + 1,
                "seed": None,
            }
        )
    return rows


def record(folder: Path, teacher: Path, rows: list[dict]) -> Path:
    """A finished trajectories stage with the given rows."""
    problems = ProblemsConfig(benchmark="coins", count=len(rows))
    config = TrajectoriesConfig(problems=problems, decoding=DECODING)
    stage = Stage("trajectories", config, {"teacher": teacher}, folder)
    metadata = ShardMetadata(teacher=stage.inputs["teacher"], tokenizer="words", decoding=DECODING)
    write_shard(folder / shard_name(0), rows, metadata)
    stage.finish([shard_name(0)])
    return folder


@pytest.fixture(scope="session")
def trajectories(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("trajectories"), tiny_checkpoint, trajectory_rows(30))


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    responses = rng.integers(3, 50, (24, 12))
    for response, end in zip(responses, rng.integers(3, 13, 24), strict=True):
        response[end:] = 2  # end of sequence
    return Samples(
        prompts=[rng.integers(3, 50, length) for length in rng.integers(2, 7, 24)],
        responses=responses,
        commit_step=np.array([rng.permutation(12) for _ in range(24)]),
    )


CONFIGS = Path(__file__).parents[3] / "configs"


def shipped(recipe: str) -> RecipeConfig:
    """A recipe of `configs/recipes`."""
    return load_config(RecipeConfig, CONFIGS / "recipes" / f"{recipe}.yaml")


RECIPE = RecipeConfig(block_length=12, masking="random", complement=True, certainty_weight=2.0)


def training_config(**changes) -> TrainingConfig:
    settings = {
        "lora": LoraSettings(rank=4, alpha=16),
        "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_ratio=1 / 6),
        "train_steps": 24,
        "views_per_step": 16,
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 5,
    }
    return TrainingConfig(**{**settings, **changes})


def write_plan(
    folder: Path, teacher: Path, trajectories: Path, recipe: RecipeConfig = RECIPE, **changes
) -> tuple[Path, Path]:
    """The plan of a training and its output folder, both in `folder`."""
    config = StudentConfig(training=training_config(**changes), recipe=recipe)
    plan = StagePlan(
        stage="training",
        config=config.model_dump(mode="json"),
        inputs={"teacher": str(teacher), "trajectories": str(trajectories)},
        out_dir=str(folder / "student"),
    )
    (folder / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    return folder / "plan.json", folder / "student"


def torchrun(plan: Path, processes: int = 1) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), "-m", "dparallel.distillation", str(plan)]


# Two processes would need two GPUs, and results of one and two are compared, so everything runs on the CPU.
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], env: dict[str, str] = NO_GPU) -> tuple[int, str]:
    """Exit code, and all output."""
    done = subprocess.run(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        encoding="utf-8",
    )
    return done.returncode, done.stdout


FORK = multiprocessing.get_context("fork")


def run_forked(plan: Path, at_step: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Like `run` for one process without a launcher, which saves importing everything again.

    Args:
        at_step: called in the process before each train step.
    """
    output = plan.with_suffix(".output")
    process = FORK.Process(target=_one_process, args=(plan, output, at_step))
    process.start()
    process.join(timeout=200)
    assert process.exitcode is not None, "still running"
    return process.exitcode, output.read_text(encoding="utf-8")


def _one_process(plan: Path, output: Path, at_step: Callable[[int], None] | None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    if at_step is not None:
        step = Trainer.step

        def stepped(self: Trainer, train_step: int, with_entropies: bool) -> dict[str, float]:
            at_step(train_step)
            return step(self, train_step, with_entropies)

        Trainer.step = stepped  # type: ignore[method-assign]
    sys.argv = ["dparallel.distillation", str(plan)]
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what libraries of earlier tests do at exit, with threads that no fork has, may fail


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


CURVE = (
    "loss",
    "cross_entropy",
    "certainty",
    "teacher_entropy",
    "student_entropy",
    "grad_norm",
    "learning_rate",
)


def curve(folder: Path) -> list[list[float]]:
    return [[record["train_step"], *(record[name] for name in CURVE)] for record in read_metrics(folder)]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment set by a launcher, for what happens before the processes communicate."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def run_plan(file: Path) -> Manifest:
    plan = StagePlan.model_validate_json(file.read_text(encoding="utf-8"))
    return run_stage(plan.settings(), plan.inputs, plan.out_dir)

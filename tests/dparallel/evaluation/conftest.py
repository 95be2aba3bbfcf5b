"""A small benchmark of the embedded teacher and two students, measured once a module."""

from pathlib import Path
from typing import Any

import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig, Sweep
from dparallel.evaluation import decode
from dparallel.evaluation.decode import sample
from dparallel.evaluation.stage import run_stage
from tests.dparallel.evaluation.oracle import disturbed, own_answers

SHAPE = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
REFERENCE = DecodingConfig(**SHAPE, rule="steps", steps=12)


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disturbed(tiny_checkpoint, tmp_path_factory.mktemp("students") / "student")


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkConfig:
    """The teacher's answers at one token per step are the references, so it is always right there."""
    folder = tmp_path_factory.mktemp("problems")
    validation, test = (
        own_answers(tiny_checkpoint, folder / f"{split}.jsonl", REFERENCE, count=6, split=split)
        for split in ("validation", "test")
    )
    return BenchmarkConfig(
        test=test,
        validation=validation,
        reference=REFERENCE,
        fixed={"few_step": DecodingConfig(**SHAPE, rule="steps", steps=4)},
        sweeps={
            "confidence": Sweep(
                decoding=DecodingConfig(**SHAPE, rule="confidence", threshold=0.9), thresholds=(1.0, 0.2)
            ),
            "entropy": Sweep(decoding=DecodingConfig(**SHAPE), thresholds=(0.0, 1.0, 10.0)),
        },
        teacher_sweeps=("confidence", "entropy"),
        student_sweeps=("confidence", "entropy"),
        batch_size=4,
    )


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, student: Path) -> dict[str, str]:
    return {
        "teacher": str(tiny_checkpoint),
        "student/copy": str(tiny_checkpoint),
        "student/other": str(student),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples and verdicts shared by all tests of this module."""
    return tmp_path_factory.mktemp("measurements")


@pytest.fixture(scope="module")
def finished(
    settings: BenchmarkConfig, inputs: dict[str, str], store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "benchmark"
    run_stage(settings, inputs, folder, store)
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each unit decoded from now on."""
    counts: list[int] = []

    def counted(model: Any, tokenizer: Any, prompts: Any, *arguments: Any) -> Any:
        counts.append(len(prompts))
        return sample(model, tokenizer, prompts, *arguments)

    monkeypatch.setattr(decode, "sample", counted)
    return counts

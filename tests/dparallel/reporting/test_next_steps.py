"""The last lines of an experiment: its merged models, and commands that work as they are printed."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dparallel.cli.decoding_arguments import given_decoding
from dparallel.cli.main import main
from dparallel.cli.parser import build_parser
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.config.files import load_config
from dparallel.config.problems import ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.config.sources import SourceConfig
from dparallel.reporting.next_steps import _flags, next_steps
from dparallel.reporting.read import read_benchmark
from tests.conftest import ROOT
from tests.dparallel.reporting import made
from tests.dparallel.reporting.made import REFERENCE, SHAPE, finished_benchmark


def test_the_commands_work_as_they_are_printed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coins = {"benchmark": "coins", "count": 5}
    settings = BenchmarkConfig.model_validate(
        {
            "test": {**coins, "split": "test"},
            "validation": {**coins, "split": "validation"},
            "reference": REFERENCE.model_dump(),
            "sweeps": {"entropy": {"decoding": SHAPE, "thresholds": [0.5]}},
            "teacher_sweeps": ["entropy"],
            "student_sweeps": ["entropy"],
            "max_loss": 0.5,
        }
    )
    runs = tmp_path / "runs"
    stage = finished_benchmark(runs, tiny_checkpoint, prompt="Tom {0} coins ?", settings=settings)
    merged, folder, heading, *commands = next_steps(read_benchmark("sums", stage), runs)
    assert (merged, heading) == ("merged models:", "next:")
    assert folder == f"  fast (default student): {tiny_checkpoint}"
    generate, evaluate = (shlex.split(line) for line in commands)
    assert generate[:2] == ["dparallel", "generate"]
    assert "Tom 0 coins ?" in generate
    assert main(generate[1:]) == 0
    assert evaluate[1:2] == ["eval"]
    assert evaluate[evaluate.index("--protocol") + 1] == "coins"
    assert evaluate[evaluate.index("--runs") + 1] == str(runs)
    evaluate[evaluate.index("--limit") + 1] = "2"
    assert main(evaluate[1:]) == 0
    assert "coins" in capsys.readouterr().out


@pytest.mark.parametrize(
    "decoding",
    [
        DecodingConfig(gen_length=36, block_length=12, threshold=0.45),
        DecodingConfig(gen_length=64, block_length=32, rule="steps", steps=16, stop_at_eos=False),
        DecodingConfig(mode="pipelined", gen_length=64, block_length=32, rule="confidence", threshold=0.9),
    ],
)
def test_the_flags_give_the_same_decoding(decoding: DecodingConfig) -> None:
    options = build_parser().parse_args(["generate", "--model", "m", "--prompt", "p", *_flags(decoding)])
    assert DecodingConfig(**given_decoding(options)) == decoding


def test_a_benchmark_without_models_has_no_next_steps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stage = finished_benchmark(tmp_path / "runs", tiny_checkpoint, with_models=False)
    benchmark = read_benchmark("sums", stage)
    assert next_steps(benchmark, Path("runs")) == []
    models = {"teacher": "t", "student/fast": "f", "student/other": "o"}
    lines = next_steps(replace(benchmark, models=models), Path("runs"))
    assert lines[1:3] == ["  fast (default student): f", "  other: o"]
    assert lines[3] == "next:"
    [command] = lines[4:]  # no file has the protocol, which `dparallel eval` would need
    assert command.startswith("  dparallel generate --model f --prompt ")


def test_the_command_names_local_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Their paths do not determine the result, and are recorded apart from what does."""
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    benchmark = read_benchmark("sums", finished_benchmark(tmp_path / "runs", tiny_checkpoint))
    test = ProblemsConfig(
        benchmark="dataset",
        sources=(SourceConfig(path=str(rows), reference="answer"),),
        protocol=load_config(ProtocolConfig, ROOT / "configs" / "protocols" / "gsm8k_llada.yaml"),
    )
    manifest = benchmark.manifest.model_copy(
        update={"config": {"test": test.what()}, "how": {"test": test.how()}}
    )
    (command,) = [
        line for line in next_steps(replace(benchmark, manifest=manifest), Path("runs")) if " eval " in line
    ]
    assert f'sources=[{{"path": "{rows}", "reference": "answer"}}]' in command


def test_the_command_names_the_protocols_file_and_the_data(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Equal settings are those of a file, wherever it was read."""
    protocol = load_config(ProtocolConfig, ROOT / "configs" / "protocols" / "gsm8k_llada.yaml")
    problems = {"benchmark": "dataset", "protocol": protocol, "path": "copy.jsonl"}
    settings = made.config(test={**problems, "count": 4}, validation={**problems, "rows": "[4:]"})
    stage = finished_benchmark(tmp_path / "runs", tiny_checkpoint, settings=settings)
    line = next_steps(read_benchmark("sums", stage), Path("runs"))[-1]
    assert "--protocol gsm8k_llada --path " in line
    assert line.split("--path ")[1].split()[0].endswith("copy.jsonl")

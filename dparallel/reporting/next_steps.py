"""What to do with a finished experiment: its merged models, and commands that use the best of them."""

import shlex
from pathlib import Path

from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import LM_EVAL
from dparallel.evaluation.cases import STUDENT
from dparallel.reporting.read import Benchmark

PROMPT = "What is 6 times 7?"  # where the benchmark's own problems are long
PROMPT_CHARACTERS = 100


def next_steps(benchmark: Benchmark, runs: Path) -> list[str]:
    """Lines with the folder of every student's merged model, and commands for the best one.

    Args:
        benchmark: with the folders of its models.
        runs: folder of experiments.
    """
    students = {name: folder for name, folder in benchmark.models.items() if name.startswith(STUDENT)}
    if not students:
        return []
    best = benchmark.best.model
    lines = ["merged models:"]
    for name, folder in students.items():
        chosen = " (default student)" if name == benchmark.default_student else ""
        lines.append(f"  {name.removeprefix(STUDENT)}{chosen}: {folder}")
    if best not in students:
        return lines
    decoding = _flags(benchmark.best.measurement.decoding)
    model = ["--model", students[best]]
    elsewhere = [] if runs == Path("runs") else ["--runs", str(runs)]
    measured = ["eval", *model, "--protocol", _protocol(benchmark), *elsewhere, "--limit", "100", *decoding]
    commands = [["generate", *model, "--prompt", _prompt(benchmark), *decoding], measured]
    return [*lines, "next:", *(f"  {shlex.join(['dparallel', *words])}" for words in commands)]


def _flags(decoding: DecodingConfig) -> list[str]:
    """The decoding as flags of a command, without the defaults."""
    flags = []
    for name, value in decoding.model_dump(mode="json").items():
        flag = f"--{name.replace('_', '-')}"
        if value == DecodingConfig.model_fields[name].default and name != "threshold":
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def _protocol(benchmark: Benchmark) -> str:
    """What `dparallel eval` measures the same benchmark by; the names of files are not recorded."""
    test = benchmark.manifest.config["test"]
    if test["benchmark"] == LM_EVAL:
        return f"{LM_EVAL}:{test['task']}"
    return "coins" if test["benchmark"] == "coins" else "PROTOCOL"


def _prompt(benchmark: Benchmark) -> str:
    prompt = benchmark.answers(benchmark.best).prompts[0]
    return prompt if len(prompt) <= PROMPT_CHARACTERS and prompt.isprintable() else PROMPT

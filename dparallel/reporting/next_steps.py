"""What to do with a finished experiment: its merged models, and commands that use the best of them."""

import json
import shlex
from pathlib import Path
from typing import Any

from dparallel.config.base import UserError, joined
from dparallel.config.decoding import DecodingConfig
from dparallel.config.files import load_config
from dparallel.config.paths import shipped_configs
from dparallel.config.problems import EMBEDDED, LM_EVAL, ProtocolConfig, SourceConfig
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
    problems = _problems(benchmark)
    commands = [["generate", *model, "--prompt", _prompt(benchmark), *decoding]]
    if problems is not None:
        commands.append(["eval", *model, *problems, *elsewhere, "--limit", "100", *decoding])
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


def _problems(benchmark: Benchmark) -> list[str] | None:
    """Flags with which `dparallel eval` measures the same problems, without `rows` and `count`.

    None if no file has their protocol, which the experiment's config holds itself.
    """
    recorded, how = benchmark.manifest.config["test"], benchmark.manifest.how.get("test", {})
    test = joined(recorded, how)
    if test["benchmark"] in EMBEDDED:
        return ["--protocol", test["benchmark"]]
    changes = {}
    if test["benchmark"] == LM_EVAL:
        name = f"{LM_EVAL}:{test['task']}"
        changes = {key: test[key] for key in ("num_fewshot", "metric") if test.get(key) is not None}
        changes |= {f"data_files.{split}": file for split, file in how.get("data_files", {}).items()}
    else:
        found = _protocol(recorded["protocol"])
        if found is None:
            return None
        name = found
        if test.get("sources"):
            changes["sources"] = json.dumps([_given(source) for source in test["sources"]])
    path = ["--path", how["path"]] if how.get("path") else []
    settings = [f"{key}={value}" for key, value in changes.items()]
    return ["--protocol", name, *path, *(["--set", *settings] if settings else [])]


def _protocol(recorded: dict[str, Any]) -> str | None:
    """Name of the protocol file with the recorded settings, in the working folder or of the package."""
    for folder in (Path("configs", "protocols"), shipped_configs() / "protocols"):
        for file in sorted(folder.glob("*.yaml")):
            try:
                settings = load_config(ProtocolConfig, file).what()
            except UserError:  # a file that is being written
                continue
            if settings == recorded:
                return file.stem
    return None


def _given(source: dict[str, Any]) -> dict[str, Any]:
    """The settings of a source that are not at their default."""
    fields = SourceConfig.model_fields.items()
    return {key: source[key] for key, field in fields if source.get(key, field.default) != field.default}


def _prompt(benchmark: Benchmark) -> str:
    prompt = benchmark.answers(benchmark.best).prompts[0]
    return prompt if len(prompt) <= PROMPT_CHARACTERS and prompt.isprintable() else PROMPT

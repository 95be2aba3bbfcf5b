"""Arguments of the commands, including decoding settings."""

import argparse
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from dparallel.cli.argument_types import as_path, as_port, as_positive, as_runs, as_stop, as_text
from dparallel.cli.model_parser import add_export, add_merge
from dparallel.config.benchmark import BenchmarkConfig
from dparallel.config.decoding import DecodingConfig, parameters_by_name
from dparallel.config.files import parse_yaml
from dparallel.config.modes import SETTINGS
from dparallel.config.problems import EMBEDDED
from dparallel.rules.declaration import Parameter
from dparallel.rules.rules import RULES
from dparallel.stages.arguments import Parser

BATCH_SIZE = BenchmarkConfig.model_fields["batch_size"].default
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _meanings(takers: Mapping[str, Parameter]) -> str:
    """What a parameter means, with the rules that take it."""
    rules: dict[str, list[str]] = {}
    for rule, parameter in takers.items():
        default = "" if parameter.default is None else f" (default: {parameter.default})"
        rules.setdefault(parameter.meaning, []).append(rule + default)
    return "; ".join(f"{', '.join(names)}: {meaning}" for meaning, names in rules.items())


TAKERS = {
    name: takers for name, takers in parameters_by_name().items() if name in DecodingConfig.model_fields
}
DECODING = {  # settings of decoding, and what they do
    "gen_length": "response length in tokens",
    "block_length": "tokens per block",
    "rule": f"which tokens a forward pass commits: {', '.join(RULES)}",
    **{name: _meanings(takers) for name, takers in TAKERS.items()},
    "mode": "when a block becomes active",
    **{name: setting.meaning for name, setting in SETTINGS.items()},
    "cache": "which keys and values are kept",
    "stop_at_eos": "stop at an end-of-sequence token",
}
SAMPLING = {
    "temperature": "0 takes the most likely token",
    "top_p": "sample from the most likely tokens with this total probability",
    "seed": "equal seeds and prompts give equal tokens",
}
HARDWARE = {"compile": "compiled kernels with fixed shapes; on a GPU, CUDA graphs"}
IN_FULL = "All settings in full: python -m pydoc dparallel.DecodingConfig"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line with all its commands."""
    parser = Parser(prog="dparallel", description="Decode with masked diffusion language models.")
    parser.add_argument("--version", action="version", version=f"dparallel {version('dparallel')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_init(commands)
    _add_generate(commands)
    command, _, _ = _add_decoding_command(
        commands, "chat", "hold a conversation; /reset clears it, /exit ends"
    )
    _add_texts(command.add_argument_group("texts"))
    _add_serve(commands)
    _add_plan(commands)
    _add_eval(commands)
    _add_fit_rule(commands)
    _add_compare(commands)
    _add_runs(commands)
    _add_clean(commands)
    add_merge(commands)
    add_export(commands)
    return parser


def given_decoding(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of decoding that are given as flags.

    Raises:
        ConfigError: a value is no YAML.
    """
    return {
        name: parse_yaml(value, f"{flag_of(name)} {value}") if isinstance(value, str) else value
        for name, value in vars(options).items()
        if name in DecodingConfig.model_fields
    }


def in_flags(message: str) -> str:
    """A message with the settings of decoding called as their flags are, such as `--gen-length=25`."""
    names = "|".join(name for name in DECODING if "_" in name)
    return re.sub(rf"\b({names})\b", lambda found: flag_of(found[1]), message)


def flag_of(field: str) -> str:
    """The flag of a setting of decoding, such as `--gen-length`."""
    return f"--{field.replace('_', '-')}"


def _add_generate(commands: Any) -> None:
    command, first, hardware = _add_decoding_command(
        commands, "generate", "decode one prompt, or a file of prompts", "(--prompt TEXT | --prompts FILE) "
    )
    source = first.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", metavar="TEXT", type=as_text, help="print its response to stdout, statistics to stderr"
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        type=as_path,
        help="JSONL, one object with a prompt per line; - reads stdin",
    )
    first.add_argument(
        "--out",
        metavar="FILE",
        type=as_path,
        help="write the results of --prompts to this new file; given again after an interruption, it goes on",
    )
    first.add_argument(
        "--trace", metavar="FILE", type=as_path, help="write an HTML page that replays the decoding"
    )
    texts = command.add_argument_group("prompts and texts")
    texts.add_argument(
        "--prompt-field",
        metavar="NAME",
        default="prompt",
        type=as_text,
        help="field of the objects that holds the prompt (default: %(default)s)",
    )
    texts.add_argument("--raw", action="store_true", help="do not apply the tokenizer's chat template")
    _add_texts(texts)
    hardware.add_argument(
        "--batch-size", metavar="N", type=as_positive, help="prompts decoded together (default: 32)"
    )


def _add_serve(commands: Any) -> None:
    command, first, hardware = _add_decoding_command(
        commands, "serve", "answer OpenAI's requests over HTTP", several=True
    )
    first.add_argument(
        "--served-name",
        metavar="NAME",
        action="append",
        default=[],
        type=as_text,
        help="name of the model in requests (default: that of its folder); once for each --model",
    )
    first.add_argument(
        "--chat-template", metavar="FILE", type=as_path, help="Jinja template (default: the tokenizer's)"
    )
    network = command.add_argument_group("network")
    network.add_argument(
        "--host", metavar="HOST", default="127.0.0.1", type=as_text, help="address (default: %(default)s)"
    )
    network.add_argument(
        "--port", metavar="PORT", default=8000, type=as_port, help="0 takes a free one (default: %(default)s)"
    )
    network.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=as_path,
        help="file with the key that requests must give (default: the variable DPARALLEL_API_KEY, or none)",
    )
    limits = command.add_argument_group("limits", "Requests beyond them are refused.")
    limits.add_argument(
        "--queue", metavar="N", type=as_positive, help="responses that may wait (default: 256)"
    )
    limits.add_argument(
        "--timeout", metavar="SECONDS", type=as_positive, help="of a request with its response (default: 600)"
    )
    limits.add_argument(
        "--context",
        metavar="N",
        type=as_positive,
        help="tokens of prompt and response (default: the model's)",
    )
    limits.add_argument(
        "--body-bytes", metavar="N", type=as_positive, help="size of a request (default: 1048576)"
    )
    hardware.add_argument(
        "--batch-size", metavar="N", type=as_positive, help="responses decoded together (default: 32)"
    )


def _add_init(commands: Any) -> None:
    summary = "write an editable copy of a config that comes with the package"
    command = commands.add_parser("init", help=summary, description=summary, allow_abbrev=False)
    command.add_argument(
        "file", metavar="FILE", type=as_path, help="the new file, such as my_experiment.yaml"
    )
    command.add_argument(
        "--from",
        dest="source",
        metavar="CONFIG",
        default="tiny",
        type=as_text,
        help="name of the config, such as llada_8b, recipes/d2f or protocols/gsm8k_llada (default: "
        "%(default)s); an unknown name lists all",
    )


def _add_plan(commands: Any) -> None:
    summary = "print what an experiment needs before it runs; report an error if it cannot fit"
    command = commands.add_parser("plan", help=summary, description=summary, allow_abbrev=False)
    command.add_argument("config", metavar="CONFIG", help="the experiment's YAML file")
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        type=as_text,
        help="settings that override the file",
    )
    command.add_argument(
        "--gpu-memory", metavar="24GB", help="memory of each GPU (default: that of this machine's GPUs)"
    )
    command.add_argument(
        "--rate",
        metavar="N",
        type=as_positive,
        help="tokens per second through the model (default: measured on this machine)",
    )


def _add_eval(commands: Any) -> None:
    summary = "measure a model on published benchmarks: decode, judge, print a row for each"
    command = commands.add_parser(
        "eval",
        help=summary,
        description=f"{summary}. What is decoded and judged is kept; the same command again continues.",
        usage="dparallel eval --model MODEL --protocol PROTOCOL [PROTOCOL ...] [OPTIONS]",
        allow_abbrev=False,
    )
    first = command.add_argument_group("what is measured")
    _add_model(first)
    first.add_argument(
        "--protocol",
        metavar="PROTOCOL",
        nargs="+",
        action="extend",
        required=True,
        type=as_text,
        help="how a benchmark is asked and judged: the name of one in configs/protocols/, a file, "
        f"lm_eval:TASK, or an embedded task ({', '.join(EMBEDDED)})",
    )
    first.add_argument(
        "--path",
        metavar="PATH",
        type=as_text,
        help="local copy of the data, a file or a folder, instead of the Hugging Face Hub",
    )
    first.add_argument(
        "--limit", metavar="N", type=as_positive, help="measure the first N problems (default: all)"
    )
    first.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        type=as_text,
        help="other settings of the problems, such as count=100 seed=1 (a random selection), num_fewshot=5 "
        "or protocol.chat=false",
    )
    results = command.add_argument_group("results")
    results.add_argument(
        "--runs",
        metavar="FOLDER",
        type=as_runs,
        default=Path("runs"),
        help="folder of experiments; samples and verdicts are kept in its folder `measurements` "
        "(default: %(default)s)",
    )
    results.add_argument(
        "--json", action="store_true", help="print a JSON object for each protocol instead of a table"
    )
    hardware = _add_decoding(command, defaults=False)
    hardware.add_argument(
        "--batch-size",
        metavar="N",
        type=as_positive,
        default=BATCH_SIZE,
        help="responses decoded together (default: %(default)s)",
    )


def _add_fit_rule(commands: Any) -> None:
    summary = "fit the commit rule of a model, which --rule learned reads, on recorded trajectories"
    command = commands.add_parser("fit-rule", help=summary, description=summary, allow_abbrev=False)
    _add_model(command)
    command.add_argument(
        "--trajectories",
        metavar="FOLDER",
        required=True,
        type=as_path,
        help="folder of a finished trajectories stage, of the model itself or of its teacher",
    )
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        type=as_text,
        help="other settings, such as trajectories=1000, block_length=12, seed=1, or hidden=0 for a logistic "
        "regression",
    )
    _add_device(command)


def _add_compare(commands: Any) -> None:
    summary = "compare past runs: one table, paired tests on the same problems, and what differs"
    command = commands.add_parser(
        "compare",
        help=summary,
        description=summary,
        usage="dparallel compare [OPTIONS] RUN RUN [RUN ...]",
        allow_abbrev=False,
    )
    command.add_argument(
        "given",
        metavar="RUN",
        nargs="+",
        type=as_text,
        help="folder of an experiment, a report or a benchmark stage; name of an experiment in the folder of "
        "runs; or id of an MLflow run recorded there. The others are compared with the first",
    )
    _add_folder_of_runs(command)
    command.add_argument(
        "--out",
        metavar="FOLDER",
        type=as_path,
        help="also write the comparison as HTML, JSON and Markdown here",
    )


def _add_runs(commands: Any) -> None:
    summary = "list the experiments of a folder, how far they came, and their headline numbers"
    command = commands.add_parser("runs", help=summary, description=summary, allow_abbrev=False)
    _add_folder_of_runs(command)
    command.add_argument(
        "--json", action="store_true", help="print a list of JSON objects instead of a table"
    )


def _add_clean(commands: Any) -> None:
    summary = "show what no kept result refers to, and remove it after a question"
    command = commands.add_parser(
        "clean",
        help=summary,
        description=f"{summary}: stages that were superseded, and what killed runs left; with RUN or --keep "
        "also results that are not needed any more, and all that only they were made from.",
        allow_abbrev=False,
    )
    command.add_argument(
        "given",
        metavar="RUN",
        nargs="*",
        type=as_text,
        help="an experiment, report or stage that is not needed any more",
    )
    _add_folder_of_runs(command)
    command.add_argument(
        "--keep",
        metavar="N",
        type=as_positive,
        help="keep the N latest results of each benchmark of an experiment (default: all)",
    )
    command.add_argument(
        "--checkpoints",
        action="store_true",
        help="also remove the checkpoints of finished trainings, which serve to repair a damaged adapter",
    )
    command.add_argument("--yes", action="store_true", help="do not ask")


def _add_folder_of_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--runs",
        metavar="FOLDER",
        type=as_runs,
        default=Path("runs"),
        help="folder of experiments (default: %(default)s)",
    )


def _add_decoding_command(
    commands: Any, name: str, summary: str, required: str = "", several: bool = False
) -> tuple[argparse.ArgumentParser, Any, Any]:
    """Add a command that decodes, with the options common to such commands.

    Args:
        required: what must be given beside the model, for the line of usage.
        several: whether --model may be given several times.

    Returns:
        The command, its first group of options, and that of the hardware.
    """
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        usage=f"dparallel {name} --model MODEL {required}[OPTIONS]",
        allow_abbrev=False,
    )
    first = command.add_argument_group("what is decoded")
    _add_model(first, several)
    first.add_argument(
        "--adapter", metavar="ADAPTER", type=as_text, help="LoRA adapter that is merged into the model"
    )
    hardware = _add_decoding(command)
    _add_device(hardware)
    return command, first, hardware


def _add_model(group: Any, several: bool = False) -> None:
    group.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        action="append" if several else "store",
        help="checkpoint folder, or Hugging Face Hub id"
        + ("; may be given several times" if several else ""),
    )


def _add_device(group: Any) -> None:
    group.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: the checkpoint's)"
    )


def _add_texts(group: Any) -> None:
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        type=as_stop,
        help="end a response before this text; may be given several times",
    )
    group.add_argument("--plain", action="store_true", help="no live canvas, no colour (as with NO_COLOR)")


def _add_decoding(command: argparse.ArgumentParser, defaults: bool = True) -> Any:
    """Add a flag for every setting of decoding; those that are not given are absent from the options.

    Args:
        defaults: show the defaults of the settings; otherwise those of the protocol count.

    Returns:
        The group of options of the hardware.
    """
    beside = "" if defaults else "The protocol's settings, unless they are given. "
    decoding = command.add_argument_group("decoding", beside + IN_FULL)
    sampling, hardware = command.add_argument_group("sampling"), command.add_argument_group("hardware")
    for group, settings in ((decoding, DECODING), (sampling, SAMPLING), (hardware, HARDWARE)):
        for name, text in settings.items():
            _add_setting(group, name, text, defaults)
    return hardware


def _add_setting(group: Any, field: str, text: str, defaults: bool) -> None:
    info = DecodingConfig.model_fields[field]
    known = "" if info.default is None or not defaults else f" (default: {info.default})"
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field, "help": text + known}
    if info.annotation is bool:
        group.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, **common)
        return
    words = [word for word in get_args(info.annotation) if isinstance(word, str)]
    group.add_argument(flag_of(field), metavar="|".join(words) or "VALUE", **common)

"""The command line: its commands, and the arguments that only one of them has."""

import argparse
from importlib.metadata import version
from typing import Any

from dparallel.cli.argument_types import as_path, as_port, as_positive, as_text
from dparallel.cli.decoding_arguments import add_decoding, add_decoding_command
from dparallel.cli.model_arguments import add_export, add_merge
from dparallel.cli.shared_arguments import (
    add_command,
    add_device,
    add_folder_of_runs,
    add_model,
    add_settings,
    add_texts,
)
from dparallel.config.benchmark import BenchmarkConfig
from dparallel.config.problems import EMBEDDED
from dparallel.stages.arguments import Parser

BATCH_SIZE = BenchmarkConfig.model_fields["batch_size"].default


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line with all its commands."""
    parser = Parser(prog="dparallel", description="Decode with masked diffusion language models.")
    parser.add_argument("--version", action="version", version=f"dparallel {version('dparallel')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_init(commands)
    _add_generate(commands)
    command, _, _ = add_decoding_command(
        commands, "chat", "hold a conversation; /reset clears it, /exit ends"
    )
    add_texts(command.add_argument_group("texts"))
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


def _add_generate(commands: Any) -> None:
    command, first, hardware = add_decoding_command(
        commands,
        "generate",
        "decode one prompt, or a file of prompts",
        "(--prompt TEXT | --prompts FILE | --infill TEXT) ",
    )
    source = first.add_mutually_exclusive_group()
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
        "--infill",
        metavar="TEXT",
        type=as_text,
        help="print this text with its gaps filled, such as <gap 12> of 12 tokens; behind --prompt, or alone",
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
    add_texts(texts)
    hardware.add_argument(
        "--batch-size", metavar="N", type=as_positive, help="prompts decoded together (default: 32)"
    )


def _add_serve(commands: Any) -> None:
    command, first, hardware = add_decoding_command(
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
    command = add_command(commands, "init", "write an editable copy of a config that comes with the package")
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
    command = add_command(
        commands, "plan", "print what an experiment needs before it runs; report an error if it cannot fit"
    )
    command.add_argument("config", metavar="CONFIG", help="the experiment's YAML file")
    add_settings(command, "settings that override the file")
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
    command = add_command(
        commands,
        "eval",
        "measure a model on published benchmarks: decode, judge, print a row for each",
        "What is decoded and judged is kept; the same command again continues.",
        "--model MODEL --protocol PROTOCOL [PROTOCOL ...] [OPTIONS]",
    )
    first = command.add_argument_group("what is measured")
    add_model(first)
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
    add_settings(
        first,
        "other settings of the problems, such as count=100 seed=1 (a random selection), num_fewshot=5 "
        "or protocol.chat=false",
    )
    results = command.add_argument_group("results")
    add_folder_of_runs(
        results, "folder of experiments; samples and verdicts are kept in its folder `measurements`"
    )
    results.add_argument(
        "--json", action="store_true", help="print a JSON object for each protocol instead of a table"
    )
    hardware = add_decoding(command, defaults=False)
    hardware.add_argument(
        "--batch-size",
        metavar="N",
        type=as_positive,
        default=BATCH_SIZE,
        help="responses decoded together (default: %(default)s)",
    )


def _add_fit_rule(commands: Any) -> None:
    command = add_command(
        commands,
        "fit-rule",
        "fit the commit rule of a model, which --rule learned reads, on recorded trajectories",
    )
    add_model(command)
    command.add_argument(
        "--trajectories",
        metavar="FOLDER",
        required=True,
        type=as_path,
        help="folder of a finished trajectories stage, of the model itself or of its teacher",
    )
    add_settings(
        command,
        "other settings, such as trajectories=1000, block_length=12, seed=1, or hidden=0 for a logistic "
        "regression",
    )
    add_device(command)


def _add_compare(commands: Any) -> None:
    command = add_command(
        commands,
        "compare",
        "compare past runs: one table, paired tests on the same problems, and what differs",
        usage="[OPTIONS] RUN RUN [RUN ...]",
    )
    command.add_argument(
        "given",
        metavar="RUN",
        nargs="+",
        type=as_text,
        help="folder of an experiment, a report or a benchmark stage; name of an experiment in the folder of "
        "runs; or id of an MLflow run recorded there. The others are compared with the first",
    )
    add_folder_of_runs(command)
    command.add_argument(
        "--out",
        metavar="FOLDER",
        type=as_path,
        help="also write the comparison as HTML, JSON and Markdown here",
    )


def _add_runs(commands: Any) -> None:
    command = add_command(
        commands, "runs", "list the experiments of a folder, how far they came, and their headline numbers"
    )
    add_folder_of_runs(command)
    command.add_argument(
        "--json", action="store_true", help="print a list of JSON objects instead of a table"
    )


def _add_clean(commands: Any) -> None:
    command = add_command(
        commands,
        "clean",
        "show what no kept result refers to, and remove it after a question",
        "These are stages that were superseded, and what killed runs left; with RUN or --keep also results "
        "that are not needed any more, and all that only they were made from.",
    )
    command.add_argument(
        "given",
        metavar="RUN",
        nargs="*",
        type=as_text,
        help="an experiment, report or stage that is not needed any more",
    )
    add_folder_of_runs(command)
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

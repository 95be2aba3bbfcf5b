"""The command line: `dparallel generate`, `dparallel chat` and `dparallel plan`.

Text goes to stdout; statistics, progress and errors to stderr. What a user can put right is one line
and exit code 2, before any decoding starts.
"""

import argparse
import inspect
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn, get_args

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from dparallel.cli import display
from dparallel.cli.chat import ChatError, check_can_chat, converse, turn_prompt
from dparallel.cli.plan import print_plan
from dparallel.cli.prompts import PromptError, Request, encode, read_requests, results
from dparallel.cli.trace.page import trace_page
from dparallel.config.base import ConfigError, UserError, explain
from dparallel.config.decoding import DecodingConfig
from dparallel.config.files import parse_yaml
from dparallel.decoding.canvas import Generation, Step
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer, read_config
from dparallel.models.formats import CheckpointError
from dparallel.models.lora import AdapterError
from dparallel.problems.prompts import finish
from dparallel.problems.sources import ProblemsError
from dparallel.stages.files import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DecodingError(UserError):
    """A model that cannot decode these prompts here; the message says why."""


# What a user can put right; the message suffices. Anything else is a bug and keeps its traceback.
CLEAR_ERRORS = (
    *(ConfigError, CheckpointError, PromptError, ChatError, DecodingError),
    *(AdapterError, ProblemsError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        {"generate": _generate, "chat": _chat, "plan": _plan}[options.command](options)
        sys.stdout.flush()
    except CLEAR_ERRORS as error:
        print(f"dparallel {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _generate(options: argparse.Namespace) -> None:
    # 1. Refuse what can be refused, first without the weights.
    decoding = _decoding(options)
    if options.prompts is not None:
        requests = read_requests(options.prompts, options.prompt_field)
    elif options.out is not None:
        raise ConfigError(f"--out {options.out} takes the results of --prompts; that of --prompt is printed")
    else:
        requests = [Request("--prompt", options.prompt)]
    _check_writable("--out", options.out)
    _check_writable("--trace", options.trace)
    tokenizer, model = _load_tokenizer(options), _load_model(options)
    prompts = encode(requests, tokenizer, model, decoding, options.raw)

    # 2. Decode.
    steps: list[Step] = []
    trace = steps.extend if options.trace is not None else None
    if options.prompts is None:
        generations = [_answer(model, tokenizer, prompts[0], decoding, options.plain, trace)]
    else:
        generations = _answer_all(model, prompts, decoding, options.batch_size, trace)

    # 3. Write.
    if options.prompts is not None:
        ends = model.config.end_token_ids
        responses = [finish(each.tokens, tokenizer, ends) for each in generations]
        lines = results(requests, responses, generations)
        if options.out is None:
            sys.stdout.write(lines)
        else:
            write_atomically(options.out, lines)
    if options.trace is not None:
        texts = [request.prompt for request in requests]
        page = trace_page(options.model, decoding, tokenizer, model.config, texts, generations, steps)
        write_atomically(options.trace, page)


def _chat(options: argparse.Namespace) -> None:
    decoding = _decoding(options)
    tokenizer = _load_tokenizer(options)
    check_can_chat(tokenizer)
    model = _load_model(options)

    def respond(messages: list[dict[str, str]]) -> str:
        prompt = turn_prompt(messages, tokenizer, model, decoding)
        try:
            return _text(tokenizer, _answer(model, tokenizer, prompt, decoding, options.plain))
        except DecodingError as error:  # too long for the memory: the conversation goes on without this turn
            raise ChatError(str(error)) from error

    converse(respond)


def _plan(options: argparse.Namespace) -> None:
    print_plan(options.config, options.set, options.gpu_memory, options.rate)


def _answer(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    decoding: DecodingConfig,
    plain: bool,
    trace: display.Observer | None = None,
) -> Generation:
    """Decode one prompt, drawn live where stdout is a terminal, else printed once it is whole."""
    drawn = display.can_draw(sys.stdout, plain)
    watching: AbstractContextManager[display.Observer | None] = nullcontext()
    if drawn:
        watching = display.drawing(sys.stdout, tokenizer, model.config, decoding.gen_length)
    with watching as draw:
        [generation], seconds = _timed(model, [prompt], decoding, 1, draw, trace)
    if not drawn:
        print(_text(tokenizer, generation), flush=True)
    print(display.numbers([generation], seconds, model.device, 1, decoding.compile), file=sys.stderr)
    return generation


def _text(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> str:
    """The response as a person reads it, without special tokens such as the end of a turn."""
    return str(tokenizer.decode(generation.tokens[: generation.num_tokens], skip_special_tokens=True))


def _answer_all(
    model: DiffusionTransformer,
    prompts: list[list[int]],
    decoding: DecodingConfig,
    batch_size: int | None,
    trace: display.Observer | None,
) -> list[Generation]:
    """Decode many prompts, with progress and totals on stderr."""
    rows_together: set[int] = set()  # memory may not allow `batch_size`

    def count_rows(forward: list[Step]) -> None:
        rows_together.add(len(forward))

    with display.progress(sys.stderr, len(prompts)) as count:
        generations, seconds = _timed(model, prompts, decoding, batch_size, count, count_rows, trace)
    together = max(rows_together)
    print(display.numbers(generations, seconds, model.device, together, decoding.compile), file=sys.stderr)
    return generations


def _timed(
    model: DiffusionTransformer,
    prompts: list[list[int]],
    decoding: DecodingConfig,
    batch_size: int | None,
    *observers: display.Observer | None,
) -> tuple[list[Generation], float]:
    """The generations and the seconds they took."""
    started = time.perf_counter()
    try:
        generations = generate(model, prompts, decoding, batch_size, display.together(*observers))
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:  # damaged weights, no room for them
        raise DecodingError(str(error)) from error
    return generations, time.perf_counter() - started


def _load_tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    read_config(options.model)  # says more about a folder that is no model's than a missing tokenizer does
    return load_tokenizer(options.model)


def _load_model(options: argparse.Namespace) -> DiffusionTransformer:
    try:
        device = None if options.device is None else torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises for an unknown or absent one
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {options.device} cannot be used ({reason}); try cpu") from error
    return load_model(options.model, device, DTYPES.get(options.dtype))


def _check_writable(flag: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    try:
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: {path.parent} cannot be written to ({error.strerror}); name another folder"
        ) from error


def _decoding(options: argparse.Namespace) -> DecodingConfig:
    """The decoding flags that were given, the rest at its default."""
    given = {
        name: parse_yaml(value, f"{_flag(name)} {value}") if isinstance(value, str) else value
        for name, value in vars(options).items()
        if name in DecodingConfig.model_fields
    }
    try:
        return DecodingConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(error, _flag)) from error


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dparallel", description="Decode with masked diffusion language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    summary = "decode one prompt, or a file of prompts"
    command = _command(commands, "generate", summary)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="its response goes to stdout, numbers to stderr")
    source.add_argument("--prompts", metavar="FILE", type=Path, help="JSONL: one object with a prompt a line")
    command.add_argument("--prompt-field", metavar="NAME", default="prompt", help="where it is (%(default)s)")
    command.add_argument("--out", metavar="FILE", type=Path, help="results as JSONL, instead of to stdout")
    command.add_argument("--trace", metavar="FILE", type=Path, help="an HTML page that replays the decoding")
    command.add_argument("--raw", action="store_true", help="do not apply the tokenizer's chat template")
    command.add_argument("--batch-size", metavar="N", type=_positive, help="rows decoded together")
    _command(commands, "chat", "hold a conversation; /reset starts anew, /exit ends")

    summary = "say what an experiment needs before any of it runs; refuse what cannot fit"
    command = commands.add_parser("plan", help=summary, description=summary, allow_abbrev=False)
    command.add_argument("config", metavar="CONFIG", help="the experiment's YAML file")
    command.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="overrides"
    )
    command.add_argument(
        "--gpu-memory", metavar="24GB", help="of each GPU; that of the GPUs here unless told"
    )
    command.add_argument(
        "--rate", metavar="N", type=_positive, help="tokens/s through the model; measured unless told"
    )
    return parser


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """A command with the options all share."""
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--model", metavar="PATH", required=True, help="a checkpoint's folder or hub name")
    command.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    command.add_argument("--dtype", choices=DTYPES, help="the checkpoint's unless told")
    command.add_argument("--plain", action="store_true", help="no live canvas, no colour (as with NO_COLOR)")
    decoding = command.add_argument_group("decoding", inspect.getdoc(DecodingConfig))
    for field, info in DecodingConfig.model_fields.items():
        known = None if info.default is None else f"default: {info.default}"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field, "help": known}
        if info.annotation is bool:
            decoding.add_argument(_flag(field), action=argparse.BooleanOptionalAction, **common)
        else:
            words = [each for each in get_args(info.annotation) if isinstance(each, str)]
            decoding.add_argument(_flag(field), metavar="|".join(words) or "VALUE", **common)
    return command


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)

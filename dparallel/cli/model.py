"""Load the model of the options, and decode and show a response."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dparallel.cli import display
from dparallel.cli.decoding_arguments import flag_of, given_decoding
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import DecodingError, generate
from dparallel.decoding.stops import Stop
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer, read_config
from dparallel.models.defaults import Defaults, read_defaults
from dparallel.models.hub import checkpoint_folder
from dparallel.models.threads import fitting_threads
from dparallel.problems.prompts import finish
from dparallel.problems.stops import stop_at


class Decoding(NamedTuple):
    """A decoding, its settings that are the checkpoint's decode defaults, and words that say so."""

    decoding: DecodingConfig
    of_checkpoint: Mapping[str, Any]
    note: str | None


def decoding_of(options: argparse.Namespace, folder: Path | None, *config: Mapping[str, Any]) -> Decoding:
    """How to decode: by the flags, then the settings of a config, then the checkpoint's decode defaults.

    Args:
        folder: of the checkpoint; None if the model's weights are not those of a checkpoint.

    Raises:
        UserError: names the flag or file, its value and the valid values.
    """
    defaults = Defaults() if folder is None else read_defaults(folder)
    decoding, kept = defaults.resolve(given_decoding(options), *config, called=flag_of)
    return Decoding(decoding, kept, f"decoding with {defaults.sentence(kept)}" if kept else None)


def open_decoding(options: argparse.Namespace) -> DecodingConfig:
    """How to decode with `--model`; says on stderr which settings are the checkpoint's.

    With `--adapter` they are none: those of the base model do not suit the merged one.
    """
    folder = checkpoint_folder(options.model, with_weights=False)
    found = decoding_of(options, None if options.adapter is not None else folder)
    if found.note is not None:
        print(f"D{found.note.removeprefix('d')}", file=sys.stderr)
    return found.decoding


def open_tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `--model`."""
    read_config(options.model)  # explains a folder without a model better than a missing tokenizer does
    return load_tokenizer(options.model)


def open_model(options: argparse.Namespace) -> DiffusionTransformer:
    """Load the model of `--model` with `--adapter`, `--device` and `--dtype`."""
    return load_model(options.model, options.device, options.dtype, options.adapter)


def answer(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    decoding: DecodingConfig,
    plain: bool,
    stops: Sequence[str] = (),
    trace: display.Observer | None = None,
) -> Generation:
    """Decode a prompt, drawn live if stdout is a terminal, otherwise printed when it is finished."""
    drawn = display.can_draw(sys.stdout, plain)
    watching: AbstractContextManager[display.Observer | None] = nullcontext()
    if drawn:
        masks = [model.config.mask_token_id] * decoding.gen_length
        watching = display.live_canvas(sys.stdout, tokenizer, model.config, masks)
    with watching as draw:
        observe = display.combine(draw, trace)
        stop = stop_at(tokenizer, stops)
        [generation], seconds = timed_generate(model, [prompt], decoding, 1, observe, stop=stop)
    if not drawn:
        print(text_of(generation, tokenizer, model.config, stops), flush=True)
    shown = display.statistics([generation], seconds, model.device, 1, decoding.compile)
    print(shown, file=sys.stderr)
    return generation


def text_of(
    generation: Generation,
    tokenizer: PreTrainedTokenizerBase,
    config: DiffusionConfig,
    stops: Sequence[str] = (),
) -> str:
    """The response as text, equal in all commands."""
    return finish(generation.tokens, tokenizer, config.end_token_ids, stops)


def timed_generate(
    model: DiffusionTransformer,
    prompts: list[list[int]],
    decoding: DecodingConfig,
    batch_size: int | None,
    observe: display.Observer | None,
    finished: Callable[[int, Generation], None] | None = None,
    stop: Stop | None = None,
) -> tuple[list[Generation], float]:
    """Result of `dparallel.generate`, and its wall time in seconds.

    Raises:
        DecodingError: the weights are damaged, or a single prompt does not fit into memory.
    """
    rows = min(batch_size or len(prompts), len(prompts))
    return timed(model, rows, lambda: generate(model, prompts, decoding, batch_size, observe, finished, stop))


def timed(
    model: DiffusionTransformer, batch_size: int, decode: Callable[[], list[Generation]]
) -> tuple[list[Generation], float]:
    """What `decode` returns, with threads that fit a batch, and its wall time in seconds.

    Raises:
        DecodingError: the weights are damaged, or a single row does not fit into memory.
    """
    started = time.perf_counter()
    try:
        with fitting_threads(model, batch_size):
            generations = decode()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DecodingError(str(error)) from error
    return generations, time.perf_counter() - started

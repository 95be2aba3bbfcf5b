"""`generate`: decode responses for prompts of any lengths."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import modes_of
from dparallel.decoding.canvas import Canvas, DecodingError, Generation, Step
from dparallel.decoding.loop import Forward, decode
from dparallel.decoding.memory import rows_that_fit
from dparallel.decoding.stops import Stop, StopWatch
from dparallel.decoding.streaming import Stream, Streamer, check_streamer, streamed
from dparallel.decoding.token_lists import Prompts, check_padding, token_lists
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.commit_rule import check_commit_rule
from dparallel.models.defaults import decoding_of_model

DEFAULT_BATCH_SIZE = 32
log = logging.getLogger(__name__)


class LengthError(DecodingError):
    """A prompt and its response are longer than the model's canvas.

    Attributes:
        fitting: settings with which they fit; empty if there are none.
    """

    def __init__(self, message: str, fitting: dict[str, int] | None = None):
        super().__init__(message)
        self.fitting = fitting or {}


@torch.inference_mode()
def generate(
    model: DiffusionTransformer,
    prompts: Prompts,
    decoding: DecodingConfig | None = None,
    batch_size: int | None = None,
    observe: Callable[[list[Step]], None] | None = None,
    finished: Callable[[int, Generation], None] | None = None,
    stop: Stop | None = None,
    streamer: Streamer | None = None,
) -> list[Generation]:
    """Decode a response for each prompt, in the order of the prompts.

    Tokens, commit steps and NFE of a row do not depend on the other rows of its batch.

    Args:
        model: from `load_model`.
        prompts: token ids without padding: a sequence of lists, tensors or arrays (L,) of any lengths, or an
            integer tensor or array (B, L).
        decoding: how to decode; by default as the checkpoint says (`model.defaults.decoding()`), or else
            `DecodingConfig()`.
        batch_size: rows decoded together (default 32); reduced with a warning if memory is short.
        observe: called after each forward pass with what it did to each of its rows.
        finished: called with the index of a prompt and its response when it is finished, longest prompts
            first; can be used to save responses before all are done.
        stop: called with the tokens of a response before its first masked position or end token; returns
            the number of tokens after which the response ends, or None (`problems.stops.stop_at` makes one
            of texts). Not used with `stop_at_eos=False`.
        streamer: gets the only prompt and its response as it is decoded, such as transformers'
            `TextDiffusionStreamer`; see `streaming.Streamer`.

    Returns:
        One `Generation` per prompt.

    Raises:
        DecodingError: a prompt is too long, padded or contains invalid ids, the model has no usable mask
            or end-of-sequence token or does not suit the decoding mode, or a streamer is no streamer or is
            given with several prompts.
        MemoryError: a single row does not fit into memory.
    """
    if decoding is None:
        decoding = decoding_of_model(model)
    if not isinstance(decoding, DecodingConfig):
        raise DecodingError(
            f"decoding={decoding!r}: give a DecodingConfig, such as DecodingConfig(rule='entropy')"
        )
    given = token_lists(prompts)
    check_prompts(model, given, decoding)
    check_commit_rule(decoding, model.commit_rule)
    check_batch_size(batch_size)
    if streamer is not None:
        check_streamer(streamer, len(given))
    if not given:
        return []
    order = longest_first(given)
    ordered = [given[row] for row in order]
    rows = rows_together(model, len(ordered[0]) + decoding.gen_length, decoding, batch_size, len(given))

    seeds = [row_seed(decoding.seed, prompt) for prompt in ordered]
    canvas = Canvas.start(ordered, seeds, decoding, model.config)
    ends = model.config.end_token_ids
    stops = (
        StopWatch(canvas, stop, ends, decoding.revises) if stop is not None and decoding.stop_at_eos else None
    )
    if streamer is not None:
        stream = Stream(streamer, ordered[0], decoding.block_length, ends)
        observe, finished = streamed(stream, observe, finished)
    return decode_rows(model, canvas, order, decoding, rows, observe, finished, stops)


def decode_rows(
    model: DiffusionTransformer,
    canvas: Canvas,
    order: Sequence[int],
    decoding: DecodingConfig,
    batch_size: int,
    observe: Callable[[list[Step]], None] | None = None,
    finished: Callable[[int, Generation], None] | None = None,
    stops: StopWatch | None = None,
) -> list[Generation]:
    """Decode a canvas whose row i is reported and returned as row `order[i]`."""
    ends = model.config.end_token_ids
    tell = None
    if observe is not None or finished is not None:
        tell = partial(_tell, canvas, order, ends, observe, finished)
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
        decode(model, canvas, decoding, batch_size, tell, stops)
    decoded = canvas.generations(np.arange(len(order)), ends)
    generations = dict(zip(order, decoded, strict=True))
    return [generations[row] for row in range(len(order))]


def longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Indices of prompts, the longest one first: memory peaks early, and one remedy serves all lengths."""
    return sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))


def rows_together(
    model: DiffusionTransformer, length: int, decoding: DecodingConfig, batch_size: int | None, count: int
) -> int:
    """Rows of canvas `length` decoded together: `batch_size`, or fewer where memory is short or rows are few.

    Raises:
        MemoryError: a single row does not fit into memory.
    """
    fitting = rows_that_fit(model, length, decoding)
    wanted = min(int(batch_size or DEFAULT_BATCH_SIZE), count)
    if fitting < wanted:
        log.warning("a batch of %d does not fit into memory; decoding %d rows at a time", wanted, fitting)
    return min(wanted, fitting)


def check_batch_size(batch_size: object) -> None:
    """Raise a DecodingError for what is neither None nor a whole number of at least 1."""
    if batch_size is not None and not _is_count(batch_size):
        raise DecodingError(f"batch_size={batch_size!r}: give a whole number of at least 1")


def _is_count(number: object) -> bool:
    """Whether `number` is a whole number of at least 1, as an int or a float such as 8.0."""
    if isinstance(number, bool) or not isinstance(number, int | float | np.integer):
        return False
    return bool(number >= 1 and number % 1 == 0)


def _tell(
    canvas: Canvas,
    order: Sequence[int],
    end_token_ids: Sequence[int],
    observe: Callable[[list[Step]], None] | None,
    finished: Callable[[int, Generation], None] | None,
    forward: Forward,
) -> None:
    """Report what a forward pass did to its rows, and the responses it finished."""
    if observe is not None:
        observe(_steps(forward, order, canvas))
    done = forward.rows[canvas.done[forward.rows]]
    if finished is not None and len(done):
        for row, generation in zip(done, canvas.generations(done, end_token_ids), strict=True):
            finished(order[row], generation)


def _steps(forward: Forward, order: Sequence[int], canvas: Canvas) -> list[Step]:
    """What a forward pass did to its rows, with `Step.row` as the index of the prompt."""
    columns = (forward.offsets, forward.token, forward.probability, forward.entropy, forward.new)
    return [
        Step(
            order[row],
            int(canvas.nfe[row]) - 1,
            bool(canvas.done[row]),
            *(column[at][forward.read[at]].tolist() for column in columns),
        )
        for at, row in enumerate(forward.rows.tolist())
    ]


def check_prompts(
    model: DiffusionTransformer, prompts: Sequence[Sequence[int]], decoding: DecodingConfig
) -> None:
    """Raise a DecodingError for prompts, settings or models that `generate` cannot decode."""
    config = model.config
    check_special_tokens(config, decoding)
    modes = modes_of(config.attention_pattern)
    if decoding.mode not in modes:
        pattern = config.attention_pattern
        stated = (
            "that states no attention_pattern" if pattern is None else f"of attention_pattern={pattern!r}"
        )
        raise DecodingError(
            f"mode={decoding.mode!r} with a model {stated} (its config.json): it was trained to be decoded "
            f"with mode={' or '.join(map(repr, modes))}"
        )
    if decoding.mode == "autoregressive" and not config.predicts_next:
        raise DecodingError(
            f"mode='autoregressive' with a model whose predicts_next is {config.predicts_next}: it needs one "
            "trained to predict the next token; correct its config.json"
        )
    limit = config.max_position_embeddings - decoding.gen_length
    if limit < 0:
        remedy, fitting = _fitting(config, decoding, max(map(len, prompts), default=0))
        raise LengthError(
            f"gen_length={decoding.gen_length} is longer than this model's canvas "
            f"(max_position_embeddings={config.max_position_embeddings}): {remedy}",
            fitting,
        )
    for row, prompt in enumerate(prompts):
        check_padding(f"prompt {row}", prompt, config)
        if len(prompt) > limit:
            remedy, fitting = _fitting(config, decoding, len(prompt))
            raise LengthError(
                f"prompt {row} has {len(prompt)} tokens; with gen_length={decoding.gen_length} this model "
                f"(max_position_embeddings={config.max_position_embeddings}) takes at most {limit}: "
                f"shorten the prompt or gen_length ({remedy})",
                fitting,
            )
        check_ids(f"prompt {row}", prompt, config)


def check_special_tokens(config: DiffusionConfig, decoding: DecodingConfig) -> None:
    """Raise a DecodingError for a model without a mask token, or an end-of-sequence token that is needed."""
    ends = decoding.stop_at_eos or decoding.suppress_eos
    for name, used in (("mask_token_id", True), ("eos_token_id", ends)):
        token_id = getattr(config, name)
        if used and (token_id is None or not 0 <= token_id < config.vocab_size):
            raise DecodingError(
                f"the model's {name}={token_id} is not in its vocabulary (0 to {config.vocab_size - 1}); "
                f"set it in the checkpoint's config.json"
            )


def check_ids(name: str, tokens: Sequence[int], config: DiffusionConfig) -> None:
    """Raise a DecodingError for token ids that are not in the vocabulary, or are the mask's."""
    outside = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
    if outside is not None or config.mask_token_id in tokens:
        raise DecodingError(
            f"{name} holds token id {config.mask_token_id if outside is None else outside}; "
            f"valid ids are 0 to {config.vocab_size - 1} without the mask {config.mask_token_id}"
        )


def _fitting(config: DiffusionConfig, decoding: DecodingConfig, prompt: int) -> tuple[str, dict[str, int]]:
    """The largest response that fits on the canvas after a prompt of `prompt` tokens: words, settings."""
    room = config.max_position_embeddings - prompt
    if room < 1:
        return "no length fits after this prompt", {}
    if room < decoding.block_length:
        fitting = {"gen_length": room, "block_length": room}
        return f"lower gen_length and block_length to at most {room}", fitting
    largest = room // decoding.block_length * decoding.block_length
    text = f"the largest valid gen_length with block_length={decoding.block_length} is {largest}"
    return text, {"gen_length": largest}


def row_seed(seed: int | None, prompt: Sequence[int]) -> int:
    """A seed for the row, independent of its place in a batch."""
    if seed is None:
        return int(torch.randint(2**62, ()))
    text = f"{seed}/{','.join(map(str, prompt))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)

"""Terminal output: the canvas while it is decoded, progress over many prompts, statistics."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import torch
from rich.color import Color
from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dparallel.decoding.canvas import Generation, Step, tokens_per_forward
from dparallel.models.backbone import DiffusionConfig
from dparallel.models.token_texts import token_texts

Observer = Callable[[list[Step]], None]

MASK, END = "·", "∎"
GIVEN = -1  # in place of the forward pass that committed a token
FRAMES_PER_SECOND = 12
LINE_EVERY = 20.0  # seconds between lines of progress where no terminal shows them
# From the first forward pass to the latest. Medium lightness is readable on dark and light backgrounds, and
# blue to amber is distinguishable without red-green vision.
RAMP = ((74, 137, 243), (131, 122, 226), (180, 107, 190), (214, 115, 128), (214, 140, 46))
UNPRINTABLE = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def can_draw(stream: TextIO, plain: bool) -> bool:
    """Whether `stream` is a terminal that supports the characters used, and drawing is not disabled."""
    if not stream.isatty() or plain or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        (MASK + END).encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def live_canvas(
    stream: TextIO, tokenizer: PreTrainedTokenizerBase, config: DiffusionConfig, start: Sequence[int]
) -> Iterator[Observer]:
    """Draw a text while its masks are filled; the last frame remains, without what follows an end token.

    Args:
        start: the text before the first forward pass: masks, and the given tokens of an infill.
    """
    tokens, shown = list(start), len(start)
    masked = [place for place, token in enumerate(start) if token == config.mask_token_id]
    commit_step: list[int | None] = [None if token == config.mask_token_id else GIVEN for token in start]

    def frame() -> Text:
        return canvas_text(tokenizer, config, tokens[:shown], commit_step[:shown])

    def observe(forward: list[Step]) -> None:
        for step in forward:
            for offset, token, commit in zip(step.offsets, step.tokens, step.commit, strict=True):
                if commit:
                    tokens[masked[offset]], commit_step[masked[offset]] = token, step.denoise_step

    console = Console(file=stream, highlight=False)
    with Live(console=console, get_renderable=frame, refresh_per_second=FRAMES_PER_SECOND) as live:
        live.refresh()  # shows the masks before the first forward pass
        yield observe
        if len(masked) == shown:  # the text behind a gap stays
            shown = next((at for at, token in enumerate(tokens) if token in config.end_token_ids), shown)


def canvas_text(
    tokenizer: PreTrainedTokenizerBase,
    config: DiffusionConfig,
    tokens: Sequence[int],
    commit_step: Sequence[int | None],
) -> Text:
    """Tokens coloured by the forward pass that committed them; masks and special tokens are dim.

    Args:
        commit_step: None for masks, `GIVEN` for tokens that no forward pass committed, which have no colour.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    glyphs = {config.mask_token_id: MASK, **dict.fromkeys(config.end_token_ids, END)}
    latest = max((step for step in commit_step if step is not None), default=0)
    text = Text()
    for token, piece, step in zip(tokens, token_texts(tokenizer, tokens), commit_step, strict=True):
        if token in glyphs:
            piece = piece[: len(piece) - len(piece.lstrip())] + glyphs[token]
        dim = step is None or token in special
        colour = "" if step == GIVEN else _colour(step or 0, latest)
        text.append(piece.translate(UNPRINTABLE), "dim" if dim else colour)
    return text


def _colour(step: int, latest: int) -> Style:
    """Colour of `step` on the ramp from forward pass 0 to `latest`."""
    place = step / max(latest, 1) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    share = place - low
    return Style(
        color=Color.from_rgb(*(a + share * (b - a) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)))
    )


@contextmanager
def progress(stream: TextIO, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show the number of finished prompts: updated in place on a terminal.

    Elsewhere a line per tenth, at most one every `LINE_EVERY` seconds, and the last one.

    Yields a function to be called for every prompt that is finished.
    """
    in_place = stream.isatty()
    written, told = done, time.monotonic()

    def count() -> None:
        nonlocal done, written, told
        done += 1
        now = time.monotonic()
        due = done * 10 // total > written * 10 // total and now - told >= LINE_EVERY
        if done > written and (in_place or due or done == total):
            stream.write(f"\r{done}/{total} prompts" if in_place else f"{done}/{total} prompts\n")
            stream.flush()
            written, told = done, now

    try:
        yield count
    finally:
        if in_place:
            stream.write("\r\N{ESCAPE}[K")


def statistics(
    generations: Sequence[Generation], seconds: float, device: torch.device, batch_size: int, compiled: bool
) -> str:
    """One line with NFE (mean per response), TPF and TPS, with hardware and batch size."""
    num_tokens = [generation.num_tokens for generation in generations]
    nfe = [generation.nfe for generation in generations]
    total, name = sum(num_tokens), device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"NFE {sum(nfe) / len(nfe):.4g} | TPF {tokens_per_forward(num_tokens, nfe):.2f} | "
        f"TPS {total / seconds:.1f} ({total} tokens in {seconds:.2f} s on {name}, batch size {batch_size}"
        f"{', compilation included' if compiled else ''})"
    )


def combine(*observers: Observer | None) -> Observer | None:
    """Combine observers, ignoring None; None if all are None, since observing takes time."""
    wanted = [observer for observer in observers if observer is not None]
    if not wanted:
        return None

    def observe(forward: list[Step]) -> None:
        for observer in wanted:
            observer(forward)

    return observe

"""`dparallel generate --infill`: fill the gaps of a text."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from dparallel.cli import display
from dparallel.cli.model import open_decoding, open_model, open_tokenizer, timed
from dparallel.cli.outputs import check_writable
from dparallel.cli.prompts import Request, render
from dparallel.cli.trace.page import trace_page
from dparallel.config.base import ConfigError
from dparallel.decoding.canvas import Generation, Step
from dparallel.decoding.generate import check_ids
from dparallel.decoding.infill import check_infill
from dparallel.decoding.infill import infill as fill
from dparallel.problems.gaps import check_parts, encode_infill, gap_texts, joined, parts_of
from dparallel.stages.files import write_atomically


def infill(options: argparse.Namespace) -> None:
    """Fill the gaps of `--infill`, behind `--prompt` if there is one.

    Raises:
        UserError: an option, the text or the model cannot be used, or a file cannot be written.
    """
    # 1. Check everything, first what does not need the weights.
    for flag, value in (("--prompts", options.prompts), ("--out", options.out), ("--stop", options.stop)):
        if value:
            raise ConfigError(f"{flag} with --infill, which fills the gaps of one text: drop {flag}")
    parts = parts_of(options.infill, "--infill")
    check_parts(parts, "--infill")
    check_writable("--trace", options.trace)
    decoding = open_decoding(options)
    tokenizer, model = open_tokenizer(options), open_model(options)
    config, front = model.config, None
    if options.prompt is not None:
        [front] = render([Request("--prompt", options.prompt)], tokenizer, options.raw)
        check_ids("--prompt", front, config)
    canvas = encode_infill(tokenizer, parts, config, "--infill", front)
    check_infill(model, [canvas], decoding)
    text = canvas[0 if front is None else len(front) :]

    # 2. Decode, drawn live if stdout is a terminal.
    drawn = display.can_draw(sys.stdout, options.plain)
    watching: AbstractContextManager[display.Observer | None] = nullcontext()
    if drawn:
        watching = display.live_canvas(sys.stdout, tokenizer, config, text)
    steps: list[Step] = []
    with watching as draw:
        observe = display.combine(draw, steps.extend if options.trace is not None else None)
        [filled], seconds = timed(model, 1, lambda: fill(model, [canvas], decoding, 1, observe))
    if not drawn:
        gaps = gap_texts(tokenizer, parts, filled.tokens, config.end_token_ids)
        print(joined(parts, gaps), flush=True)
    print(display.statistics([filled], seconds, model.device, 1, decoding.compile), file=sys.stderr)

    # 3. Report.
    if options.trace is not None:
        whole, moved = in_text(text, config.mask_token_id, filled, steps)
        shown = decoding.model_copy(update={"gen_length": len(filled.tokens), "stop_at_eos": False})
        page = trace_page(options.model, shown, tokenizer, config, [options.prompt or ""], [whole], moved)
        write_atomically(options.trace, page)
        print(f"Replay of the decoding: {options.trace}", file=sys.stderr)


def in_text(
    text: Sequence[int], mask_token_id: int, filled: Generation, steps: Sequence[Step]
) -> tuple[Generation, list[Step]]:
    """Gaps among the given tokens of a text (L,) with masks, and offsets as positions in that text."""
    masked = [place for place, token in enumerate(text) if token == mask_token_id]
    tokens, commit_step, confidence = list(text), [display.GIVEN] * len(text), [0.0] * len(text)
    for number, place in enumerate(masked):
        tokens[place], confidence[place] = filled.tokens[number], filled.confidence[number]
        commit_step[place] = filled.commit_step[number]
    moved = [replace(step, offsets=[masked[number] for number in step.offsets]) for step in steps]
    return Generation(tokens, commit_step, confidence, filled.nfe, filled.num_tokens), moved

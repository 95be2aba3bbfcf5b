"""Decode: turn units into stored samples."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation, Step
from dparallel.decoding.generate import generate
from dparallel.decoding.memory import rows_that_fit
from dparallel.decoding.stops import Stop
from dparallel.evaluation.bench import Bench, Unit
from dparallel.evaluation.cases import TEACHER
from dparallel.evaluation.certainty import replay
from dparallel.evaluation.store import SAMPLES
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.loader import Loader
from dparallel.models.threads import fitting_threads
from dparallel.problems.prompts import finish
from dparallel.problems.stops import stop_at
from dparallel.stages.hardware import hardware
from dparallel.stages.progress import Progress
from dparallel.stages.sharing import in_turn

log = logging.getLogger(__name__)

Finished = Callable[[int, Generation], None]  # index of a prompt among those decoded, and its response

LATENCY_SAMPLES = 8  # problems of a split that are also decoded with batch size 1
ALONE = 8.0  # estimate: time of a row that is decoded alone, relative to one in a batch


def decode_here(bench: Bench, units: Sequence[Unit], finished: Finished | None = None) -> None:
    """Decode the units that no other process decodes, grouped by model; what others decode is waited for.

    Args:
        finished: called with every response when it is decoded, to show progress.
    """
    models = list(dict.fromkeys(unit.model for unit in units))
    ordered = sorted(units, key=lambda unit: models.index(unit.model))
    progress, passes, done = Progress(log, 0.0), Passes(), 0.0
    left = dict.fromkeys(ordered)
    with (
        Loader(bench.inputs) as loader,
        in_turn(ordered, bench.decoded_file, bench.is_missing, "slices of samples") as turns,
    ):
        for unit, mine in turns:
            del left[unit]
            if not mine:
                log.info("%s: decoded by another process meanwhile", unit.label)
                continue
            nfe = _decode(bench, unit, *loader.load(unit.model), finished)  # keeps no model for the next one
            passes.seen(unit, nfe)
            done += _rows(unit) * nfe
            progress.total = done + sum(_rows(other) * passes.expected(other) for other in left)
            place = len(ordered) - len(left)
            progress.tell(done, f"{place} of {len(ordered)}: {unit.label}: NFE {nfe:.1f}")


class Passes:
    """How many forward passes a response takes: as many as those of similar units that are decoded."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, DecodingConfig], float] = {}

    def seen(self, unit: Unit, nfe: float) -> None:
        """Note the mean number of forward passes of a unit."""
        self._known[unit.model, unit.decoding] = nfe

    def expected(self, unit: Unit) -> float:
        """The number of steps; or that of the nearest threshold of the same model, or else of another one.

        Before any is known, four tokens per forward pass are assumed; and for students, half of the
        teacher's passes.
        """
        decoding = unit.decoding
        if decoding.steps is not None:
            return float(decoding.steps)
        similar = [
            (model != unit.model, abs((known.threshold or 0.0) - (decoding.threshold or 0.0)), model, nfe)
            for (model, known), nfe in self._known.items()
            if (known.rule, known.mode) == (decoding.rule, decoding.mode)
        ]
        if not similar:
            return decoding.gen_length / 4
        _, _, model, nfe = min(similar)
        return nfe / 2 if model == TEACHER != unit.model else nfe


def _rows(unit: Unit) -> float:
    """Rows decoded for a unit; a row that is decoded alone counts with its higher cost."""
    first, end = unit.slice
    if unit.kind == "certainty":
        return ALONE
    return end - first + ALONE * max(min(LATENCY_SAMPLES, end) - first, 0)


def _decode(
    bench: Bench,
    unit: Unit,
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    finished: Finished | None,
) -> float:
    """Decode a unit into the store; returns the mean number of forward passes."""
    prompts = bench.prompts(unit.model, unit.split)[slice(*unit.slice)]
    stops = bench.stops(unit.split)
    if unit.kind == "certainty":
        with fitting_threads(model):
            certainty = record_certainty(model, tokenizer, prompts[0], unit.decoding, stops)
        bench.store.put_certainty(bench.certainty_key(unit), json.dumps(certainty))
        return float(len(certainty["probability"]))
    batch_size, first = bench.config.batch_size, unit.slice[0]
    samples = sample(model, tokenizer, prompts, unit.decoding, batch_size, first, stops, finished)
    key = bench.samples_key(unit.model, unit.split, unit.decoding)
    bench.store.put_samples(key, range(*unit.slice), samples)
    nfe = samples["nfe"].to_pylist()
    return float(sum(nfe) / len(nfe))


def sample(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decoding: DecodingConfig,
    batch_size: int,
    first_row: int = 0,
    stops: Sequence[str] = (),
    finished: Finished | None = None,
) -> pa.Table:
    """Decode prompts; returns a table with the columns `SAMPLES`. Timing starts after a warm-up.

    Args:
        first_row: index of the first prompt in its split; prompts with an index below `LATENCY_SAMPLES` are
            also decoded with batch size 1.
        stops: stop texts, at which decoding ends.
        finished: called with every response when it is decoded.

    Raises:
        UserError: a prompt does not fit the model.
    """
    stop = stop_at(tokenizer, stops)
    ends = stops if decoding.stop_at_eos else ()  # without, the same samples serve protocols of any stops
    fitting = rows_that_fit(model, max(map(len, prompts)) + decoding.gen_length, decoding)
    together = min(batch_size, len(prompts), fitting)
    with fitting_threads(model, batch_size):
        machine = hardware()  # with the number of threads of a batch
        generations, seconds = _timed(model, prompts, decoding, together, stop, finished)
    alone = prompts[: max(LATENCY_SAMPLES - first_row, 0)]
    with fitting_threads(model):  # on a CPU as many as one prompt makes use of, as in `dparallel generate`
        _, seconds_alone = _timed(model, alone, decoding, 1, stop) if alone else ([], 0.0)
    now = datetime.now(UTC)
    rows = [
        {
            "row": first_row + place,
            "prompt_ids": prompt,
            "response_ids": generation.tokens,
            "text": finish(generation.tokens, tokenizer, model.config.end_token_ids, ends),
            "commit_step": generation.commit_step,
            "confidence": generation.confidence,
            "nfe": generation.nfe,
            "num_tokens": generation.num_tokens,
            "seconds": seconds / len(prompts),
            "seconds_alone": seconds_alone / len(alone) if place < len(alone) else None,
            "batch_size": together,
            "hardware": machine,
            "measured_at": now,
        }
        for place, (prompt, generation) in enumerate(zip(prompts, generations, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def record_certainty(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    decoding: DecodingConfig,
    stops: Sequence[str] = (),
) -> dict[str, Any]:
    """A `certainty.CertaintyMap` for a prompt as JSON values, without label."""
    steps: list[Step] = []
    generation = generate(model, [prompt], decoding, observe=steps.extend, stop=stop_at(tokenizer, stops))[0]
    return {
        "probability": replay(model, prompt, generation, decoding, steps).tolist(),
        "commit_step": generation.commit_step,
        "tokens": [tokenizer.decode([token]) for token in generation.tokens],
    }


def _timed(
    model: DiffusionTransformer,
    prompts: Sequence[list[int]],
    decoding: DecodingConfig,
    batch_size: int,
    stop: Stop | None,
    finished: Finished | None = None,
) -> tuple[list[Generation], float]:
    """Generations, and the wall seconds of decoding after a warm-up with the same shapes."""
    longest = sorted(prompts, key=len, reverse=True)[:batch_size]
    generate(model, *warm_up(longest, decoding), batch_size)
    began = time.perf_counter()
    generations = generate(model, prompts, decoding, batch_size, finished=finished, stop=stop)
    return generations, time.perf_counter() - began


def warm_up(
    prompts: Sequence[list[int]], decoding: DecodingConfig
) -> tuple[Sequence[list[int]], DecodingConfig]:
    """Prompts and decoding of the warm-up: one forward pass with canvases of the same length.

    All blocks but the last are filled with prompt tokens, so that the warm-up does not need more memory than
    the measurement. A compiled decoding is run completely, which compiles all its shapes.
    """
    if decoding.compile:
        return prompts, decoding
    if decoding.mode == "autoregressive":
        return prompts, DecodingConfig(mode=decoding.mode, gen_length=min(2, decoding.gen_length))
    filled = decoding.gen_length - decoding.block_length
    one_block = DecodingConfig(
        mode="pipelined" if decoding.looks_back else "sequential",
        gen_length=decoding.block_length,
        block_length=decoding.block_length,
        rule="confidence",
        threshold=0.0,
        stop_at_eos=decoding.stop_at_eos,
    )
    return [prompt + prompt[-1:] * filled for prompt in prompts], one_block

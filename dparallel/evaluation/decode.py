"""Decode: units to samples in the store, here or in other processes."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.evaluation.bench import Bench, Unit
from dparallel.evaluation.certainty import replay
from dparallel.evaluation.hardware import hardware
from dparallel.evaluation.store import SAMPLES
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.loader import Loader
from dparallel.problems.prompts import finish
from dparallel.stages.sharing import have_made

log = logging.getLogger(__name__)

LATENCY_SAMPLES = 8  # how many problems of a split are also decoded alone

Elsewhere = Callable[[list[dict[str, Any]]], Sequence[str]]


def decode_units(
    config: BenchmarkConfig, inputs: dict[str, str], store: str | Path, units: Sequence[Mapping[str, Any]]
) -> None:
    """Decode these units of a benchmark, which another process finishes (`stage.run_stage`).

    Any number of processes may do so at once.

    Args:
        units: JSON values, each a `bench.Unit`.

    Raises:
        UserError: a unit that the benchmark does not have; and whatever `run_stage` raises.
    """
    bench = Bench(config, inputs, store)
    decode_here(bench, bench.units(units))


def decode_here(bench: Bench, units: Sequence[Unit]) -> None:
    """Decode what no other process has decoded meanwhile, one model after the other."""
    models = list(dict.fromkeys(unit.model for unit in units))
    began = time.perf_counter()
    with Loader(bench.inputs) as loader:
        for count, unit in enumerate(sorted(units, key=lambda unit: models.index(unit.model)), 1):
            if not bench.is_missing(unit):
                log.info("%s: decoded by another process meanwhile", unit.label)
                continue
            summary = _decode(bench, unit, *loader.load(unit.model))
            left = (time.perf_counter() - began) / count * (len(units) - count)
            log.info("%d/%d: %s: %s; about %.0f s left", count, len(units), unit.label, summary, left)


def decode_elsewhere(bench: Bench, elsewhere: Elsewhere, units: Sequence[Unit]) -> None:
    """Have other processes decode them (`decode_units`), and wait.

    Args:
        elsewhere: takes units as JSON values, waits until they are done, and returns what failed.
    """
    if units:
        have_made(
            sorted(
                units, key=lambda unit: unit.slice
            ),  # dealt out in turn: first slices, the longest, to all
            ask=lambda missing: elsewhere([unit.model_dump(mode="json") for unit in missing]),
            is_missing=bench.is_missing,
            name=lambda unit: unit.label,
            noun="units",
            folder=bench.store.folder,
        )


def _decode(bench: Bench, unit: Unit, model: DiffusionTransformer, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode one unit into the store; returns a summary."""
    prompts = bench.prompts(unit.model, unit.split)[slice(*unit.slice)]
    if unit.kind == "certainty":
        certainty = see(model, tokenizer, prompts[0], unit.decoding)
        bench.store.put_certainty(bench.certainty_key(unit), json.dumps(certainty))
        return f"{len(certainty['probability'])} steps"
    samples = sample(model, tokenizer, prompts, unit.decoding, bench.config.batch_size, unit.slice[0])
    key = bench.samples_key(unit.model, unit.split, unit.decoding)
    bench.store.put_samples(key, range(*unit.slice), samples)
    nfe, seconds = samples["nfe"].to_pylist(), sum(samples["seconds"].to_pylist())
    return f"NFE {sum(nfe) / len(nfe):.1f}, {seconds:.1f} s"


def sample(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decoding: DecodingConfig,
    batch_size: int,
    first_row: int = 0,
) -> pa.Table:
    """The `SAMPLES` of some prompts; only decoding is timed, after a warm-up.

    Args:
        first_row: number of the first prompt; prompts before `LATENCY_SAMPLES` are decoded alone, too.

    Raises:
        UserError: a prompt that does not fit the model.
    """
    generations, seconds = _timed(model, prompts, decoding, batch_size)
    alone = prompts[: max(LATENCY_SAMPLES - first_row, 0)]
    _, seconds_alone = _timed(model, alone, decoding, batch_size=1) if alone else ([], 0.0)
    rows = [
        {
            "row": first_row + place,
            "prompt_ids": prompt,
            "response_ids": generation.tokens,
            "text": finish(generation.tokens, tokenizer, model.config.end_token_ids),
            "commit_step": generation.commit_step,
            "confidence": generation.confidence,
            "nfe": generation.nfe,
            "num_tokens": generation.num_tokens,
            "seconds": seconds / len(prompts),
            "seconds_alone": seconds_alone / len(alone) if place < len(alone) else None,
            "batch_size": batch_size,
            "hardware": hardware(),
        }
        for place, (prompt, generation) in enumerate(zip(prompts, generations, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def see(
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    decoding: DecodingConfig,
) -> dict[str, Any]:
    """A `certainty.CertaintyMap` of one prompt as JSON values, without its label."""
    generation = generate(model, [prompt], decoding)[0]
    return {
        "probability": replay(model, prompt, generation, decoding).tolist(),
        "commit_step": generation.commit_step,
        "tokens": [tokenizer.decode([token]) for token in generation.tokens],
    }


def _timed(
    model: DiffusionTransformer, prompts: Sequence[list[int]], decoding: DecodingConfig, batch_size: int
) -> tuple[list[Generation], float]:
    """What `generate` gives, and its wall seconds after a warm-up in the same shape."""
    longest = sorted(prompts, key=len, reverse=True)[:batch_size]
    generate(model, *warm_up(longest, decoding), batch_size)
    began = time.perf_counter()
    generations = generate(model, prompts, decoding, batch_size)
    return generations, time.perf_counter() - began


def warm_up(
    prompts: Sequence[list[int]], decoding: DecodingConfig
) -> tuple[Sequence[list[int]], DecodingConfig]:
    """What to decode before the clock starts: one forward over canvases as long, which reads one block.

    All blocks but the last are filled with the prompt's own tokens, so that no more memory is needed than
    what is measured. A compiled decoding warms up as a whole: it compiles on the way.
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

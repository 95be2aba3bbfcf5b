"""The benchmark's work in pieces: each makes one file, whichever process does it.

The stage asks for the pieces it misses, here or elsewhere, and reads their files. Who works elsewhere
knows every piece that the stage can ask for by its file's name, from the same settings and inputs.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.decoding.generate import generate
from dparallel.evaluation.certainty import CertaintyMap, replay
from dparallel.evaluation.measure import ProblemSet, Request, measure_slice, read_slice, stored, write_slice
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.prompts import encode_problems
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import Stage, StageError
from dparallel.stages.sharing import have_made

log = logging.getLogger(__name__)

MEASUREMENTS, PIECES = "measurements", "pieces"

Elsewhere = Callable[[list[str]], Sequence[str]]
Load = Callable[[str], tuple[DiffusionTransformer, Any]]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Piece:
    """Work on one model (the name of an input); `make` writes `path`, whole or not at all, and sums it up.

    `index` counts the slices of a measurement; the first takes longest, for it also times single prompts.
    """

    model: str
    index: int
    label: str
    path: Path
    make: Callable[[DiffusionTransformer, Any], str]

    @property
    def missing(self) -> bool:
        return not self.path.is_file()


class Work:
    """What a benchmark can be asked to measure, and the files of it in the stage's folder."""

    def __init__(self, config: BenchmarkConfig, stage: Stage, sets: dict[Split, ProblemSet]):
        self.config = config
        self.stage = stage
        self.sets = sets
        self.measurements = stage.folder / MEASUREMENTS
        self.folder = stage.folder / PIECES

    def request(self, model: str, decoding: DecodingConfig, split: Split) -> Request:
        return Request(self.stage.inputs[model], self.sets[split], decoding, self.config.batch_size)

    def missing(self, model: str, decoding: DecodingConfig, split: Split) -> list[Piece]:
        """The slices without a file; none where the measurement is there. Damaged files are refused."""
        request = self.request(model, decoding, split)
        if stored(self.measurements, request):
            return []
        for index, rows in enumerate(request.slices):
            read_slice(self.slice_path(request, index), request, rows)
        return [piece for piece in self._slices(model, decoding, split) if piece.missing]

    def slice_path(self, request: Request, index: int) -> Path:
        return self.folder / f"{request.name}-{index:05d}.parquet"

    def certainty(self, model: str, decoding: DecodingConfig) -> Piece:
        """How sure the model is while it decodes the first validation problem."""
        request = self.request(model, decoding, "validation")
        path = self.folder / f"{request.name}-certainty.json"

        def make(backbone: DiffusionTransformer, tokenizer: Any) -> str:
            protocol, problem = request.problems.config.protocol, request.problems.problems[0]
            [prompt] = encode_problems([problem], protocol, tokenizer, backbone, decoding)
            generation = generate(backbone, [prompt], decoding)[0]
            found = {
                "probability": replay(backbone, prompt, generation, decoding).tolist(),
                "commit_step": generation.commit_step,
                "tokens": [tokenizer.decode([token]) for token in generation.tokens],
            }
            write_atomically(path, json.dumps(found))
            return f"{generation.nfe} steps"

        return Piece(model, 0, f"certainty of {_named(model, decoding)}", path, make)

    def every(self) -> dict[str, Piece]:
        """All that this stage can ask for (and more, which it never does), by the names of the files."""
        config = self.config
        sweeps = [decoding for sweep in config.sweeps.values() for decoding in sweep.decodings()]
        baselines = [baseline.decoding for baseline in config.baselines.values()]
        pieces = [
            piece
            for model in self.stage.inputs
            for decoding in (config.reference, *config.fixed.values(), *sweeps, *baselines)
            for piece in (
                *self._slices(model, decoding, "validation"),
                *self._slices(model, decoding, "test"),
                self.certainty(model, decoding),
            )
        ]
        return {piece.path.name: piece for piece in pieces}

    def _slices(self, model: str, decoding: DecodingConfig, split: Split) -> list[Piece]:
        request = self.request(model, decoding, split)
        total = len(request.problems.problems)

        def piece(index: int, rows: range) -> Piece:
            path = self.slice_path(request, index)

            def make(backbone: DiffusionTransformer, tokenizer: Any) -> str:
                timing, samples = measure_slice(backbone, tokenizer, request, rows)
                write_slice(path, request, (timing, samples))
                right = sum(samples["solution"].to_pylist()) / len(samples)
                nfe = sum(samples["nfe"].to_pylist()) / len(samples)
                return f"{right:.1%} right, NFE {nfe:.1f}, {timing.seconds:.1f} s"

            where = f"problems {rows.start + 1} to {rows.stop} of {total}"
            return Piece(model, index, f"{split}, {_named(model, decoding)}, {where}", path, make)

        return [piece(index, rows) for index, rows in enumerate(request.slices)]


def read_certainty(path: Path, label: str) -> CertaintyMap:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return CertaintyMap(label, torch.tensor(found["probability"]), found["commit_step"], found["tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{path} is damaged: delete it to make it again ({error})") from error


def make_here(pieces: Sequence[Piece], load: Load) -> None:
    """Make what nobody has made meanwhile, one model after the other."""
    models = list(dict.fromkeys(piece.model for piece in pieces))
    began = time.perf_counter()
    for count, piece in enumerate(sorted(pieces, key=lambda each: models.index(each.model)), 1):
        if not piece.missing:
            log.info("%s: made by another process meanwhile", piece.label)
            continue
        summary = piece.make(*load(piece.model))
        left = (time.perf_counter() - began) / count * (len(pieces) - count)
        log.info("%d/%d: %s: %s; about %.0f s left", count, len(pieces), piece.label, summary, left)


def have_pieces_made(pieces: Sequence[Piece], elsewhere: Elsewhere) -> None:
    if pieces:
        have_made(
            sorted(pieces, key=lambda piece: piece.index),  # they are dealt out in turn: long ones to all
            ask=lambda those: elsewhere([piece.path.name for piece in those]),
            is_missing=lambda piece: piece.missing,
            name=lambda piece: f"{piece.label} ({piece.path.name})",
            noun="pieces",
            folder=pieces[0].path.parent,
        )


def loader(inputs: dict[str, str]) -> Load:
    @lru_cache(maxsize=1)  # one model in memory at a time
    def load(name: str) -> tuple[DiffusionTransformer, Any]:
        return load_model(inputs[name]), load_tokenizer(inputs[name])

    return load


def _named(model: str, decoding: DecodingConfig) -> str:
    """A decoding in a few words; several methods may share it."""
    how = decoding.steps if decoding.threshold is None else f"{decoding.threshold:g}"
    return f"{model}, {decoding.mode}, {decoding.rule} {how}"

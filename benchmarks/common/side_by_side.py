"""Tokens per second of several models, timed in alternation so that all see the same machine load.

An autoregressive model is timed twice: decoded by `generate`, whose overhead counts at each of its many small
forward passes, and by a minimal loop (predict, append, extend the KV cache). The other models are compared
with the minimal loop.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.common.hardware import timed
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.prompts import encode_problems
from dparallel.problems.registry import load_problems

Prompts = Sequence[Sequence[int]]
Run = Callable[[DiffusionTransformer, Prompts, DecodingConfig, int], list[Generation]]
BARE = "bare loop"


@dataclass(frozen=True)
class Contender:
    """A model (name of an input), its decoding, and its accuracy (0..1) in the benchmark."""

    model: str
    method: str
    decoding: DecodingConfig
    accuracy: float
    run: Run = generate


class GrownCache:
    """A KV cache that grows with the sequence, one tensor per layer."""

    def __init__(self) -> None:
        self.length = 0
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `key` and `value` (B, H, n, head_size); returns all positions so far."""
        if layer in self.stored:
            key, value = (
                torch.cat([old, new], 2) for old, new in zip(self.stored[layer], (key, value), strict=True)
            )
        self.stored[layer] = key, value
        return key, value

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.stored = {layer: (key[rows], value[rows]) for layer, (key, value) in self.stored.items()}


def bare_loop(
    model: DiffusionTransformer, prompts: Prompts, decoding: DecodingConfig, batch_size: int
) -> list[Generation]:
    """Greedy decoding of an autoregressive model, in batches of prompts with equal lengths."""
    generations: dict[int, Generation] = {}
    for length in sorted(set(map(len, prompts))):
        equal = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(equal), batch_size):
            rows = equal[start : start + batch_size]
            decoded = _decode_together(model, [prompts[row] for row in rows], decoding.gen_length)
            generations |= dict(zip(rows, decoded, strict=True))
    return [generations[row] for row in range(len(prompts))]


@torch.inference_mode()
def _decode_together(model: DiffusionTransformer, prompts: Prompts, gen_length: int) -> list[Generation]:
    """Decode a batch of prompts of equal length; finished rows leave the batch."""
    mask, ends, device = model.config.mask_token_id, model.config.end_token_ids, model.device
    new = torch.tensor(prompts, device=device)  # (B, P), later (B, 1)
    cache, positions = GrownCache(), torch.arange(new.shape[1], device=device)
    responses: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(gen_length):
        cache.length += new.shape[1]
        causal = (
            torch.arange(cache.length, device=device).expand(len(new), -1) if len(positions) > 1 else None
        )
        beyond = torch.full((len(new), 1), new.shape[1], device=device)  # the next token is read
        logits = model(new, None, beyond, positions, cache, causal)
        logits[..., mask] = -torch.inf
        new, positions = logits.argmax(-1), positions[-1:] + 1
        for row, token in zip(going, new[:, 0].tolist(), strict=True):
            responses[row].append(token)
        left = [at for at, row in enumerate(going) if responses[row][-1] not in ends]
        if len(left) < len(going):
            going, kept = [going[at] for at in left], torch.tensor(left, dtype=torch.long, device=device)
            if not going:
                break
            new = new[kept]
            cache.keep(kept)
    return [
        Generation(
            response + [next(iter(ends), 0)] * (gen_length - len(response)),
            [*range(len(response))],
            [],
            len(response),
            len(response),
        )
        for response in responses
    ]


@dataclass(frozen=True)
class Speed:
    """Medians over rounds; `ratio` compares with the minimal loop at the same batch size and round."""

    model: str
    method: str
    batch_size: int
    tokens_per_second: float
    ratio: float
    nfe: float
    accuracy: float


@dataclass
class Race:
    """Timings of a contender at a batch size."""

    contender: Contender
    model: DiffusionTransformer
    prompts: list[list[int]]
    batch_size: int
    rates: list[float] = field(default_factory=list)
    nfe: float = 0.0

    @property
    def label(self) -> str:
        """Its last speed, for the progress of a long run."""
        entry = self.contender
        return f"{entry.model}, {entry.method}, batch {self.batch_size}: {self.rates[-1]:.0f} tokens/s"

    def once(self) -> None:
        """Decode all prompts once and record tokens per second and NFE."""

        def decode() -> list[Generation]:
            return self.contender.run(self.model, self.prompts, self.contender.decoding, self.batch_size)

        generations, seconds = timed(decode, self.model.device)
        self.rates.append(sum(generation.num_tokens for generation in generations) / seconds)
        self.nfe = statistics.mean(generation.nfe for generation in generations)


def contenders(rows: Sequence[dict[str, Any]]) -> list[Contender]:
    """Reference, operating points and baselines, from a benchmark's rows for test problems."""
    chosen = [
        row
        for row in rows
        if row["split"] == "test"
        and (row["operating_point"] or row["model"].startswith("baseline/") or row is _reference(rows))
    ]
    return [
        Contender(
            row["model"], row["method"], DecodingConfig.model_validate(row["decoding"]), row["accuracy"]
        )
        for row in chosen
    ]


def _reference(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["split"] == "test")


def measure_speeds(
    entries: Sequence[Contender],
    inputs: dict[str, str],
    config: ProblemsConfig,
    batch_sizes: Sequence[int],
    problems: int,
    rounds: int,
    compile: bool = False,
) -> list[Speed]:
    """Time the contenders on the first `problems` problems.

    Ratios compare with the minimal loop, or with the first contender if there is no autoregressive model. All
    models are kept in memory, so this is meant for small models.

    Args:
        entries: the contenders; an autoregressive one is also timed with the minimal loop.
        inputs: model folders by name.
        batch_sizes: batch sizes to time.
        rounds: number of timings of each contender.
        compile: also time each with compiled steps, on a GPU with CUDA graphs; each of them has a copy of
            its model, since a model keeps the graphs of its last settings only.
    """
    timed_entries = []
    for entry in entries:
        timed_entries += [entry, bare(entry)] if is_autoregressive(entry) else [entry]
        timed_entries += [compiled(entry)] if compile else []
    drawn = load_problems(config)[:problems]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {
        name: load_model(inputs[name], device) for name in dict.fromkeys(entry.model for entry in entries)
    }
    races = []
    for entry in timed_entries:
        model, tokenizer = models[entry.model], load_tokenizer(inputs[entry.model])
        prompts = encode_problems(drawn, config.protocol, tokenizer, model, entry.decoding)
        for size in batch_sizes:
            own = deepcopy(model) if entry.decoding.compile else model
            races.append(Race(entry, own, prompts, size))
    for race in races:  # warm-up; compiled steps have many shapes, of which the first prompts may lack some
        some = race.prompts if race.contender.decoding.compile else race.prompts[: race.batch_size]
        race.contender.run(race.model, some, race.contender.decoding, race.batch_size)
    for number in range(1, rounds + 1):
        for race in races:
            race.once()
            print(f"round {number} of {rounds}: {race.label}", file=sys.stderr)
    rival = next((entry for entry in timed_entries if entry.method == BARE), timed_entries[0])
    bases = {race.batch_size: race for race in races if race.contender == rival}
    return [_speed(race, bases[race.batch_size]) for race in races]


def is_autoregressive(contender: Contender) -> bool:
    return contender.decoding.mode == "autoregressive"


def bare(contender: Contender) -> Contender:
    """The same contender, decoded with the minimal loop."""
    return replace(contender, method=BARE, run=bare_loop)


def compiled(contender: Contender) -> Contender:
    """The same contender with compiled steps."""
    decoding = contender.decoding.model_copy(update={"compile": True})
    return replace(contender, method=f"{contender.method}, compiled", decoding=decoding)


def _speed(race: Race, base: Race) -> Speed:
    return Speed(
        model=race.contender.model,
        method=race.contender.method,
        batch_size=race.batch_size,
        tokens_per_second=statistics.median(race.rates),
        ratio=statistics.median(a / b for a, b in zip(race.rates, base.rates, strict=True)),
        nfe=race.nfe,
        accuracy=race.contender.accuracy,
    )

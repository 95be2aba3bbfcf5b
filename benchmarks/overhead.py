"""What a step costs beside the forward pass: `generate` and plain loops on a model of golden size.

    python -m benchmarks.overhead

On so small a model a step's bookkeeping counts as much as its matrix products, as the starting of kernels
does at batch size 1 on a GPU. All rows run in one thread and in alternation. On a CPU, its time is measured,
so that other work of the machine changes little; on a GPU, wall time. With `--compile`, `generate` also runs
with compiled steps (`compile: true`), which a GPU replays as CUDA graphs. Rows are compared with a published
loop, written plainly, or with a minimal autoregressive loop, of the same model and batch size.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.hardware import describe
from benchmarks.common.options import Distinct, chosen_device, positive
from benchmarks.common.plain_loop import plain_loop
from benchmarks.common.side_by_side import bare_loop
from benchmarks.common.tables import table
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.stages.streams import set_encodings

Run = Callable[[DiffusionTransformer, Sequence[Sequence[int]], DecodingConfig, int], list[Generation]]
CPU = torch.device("cpu")
PROMPT, SHAPE = 16, {"gen_length": 64, "block_length": 16}
SEQUENTIAL = DecodingConfig(**SHAPE, rule="entropy", threshold=3.0, stop_at_eos=False)


@dataclass(frozen=True)
class Row:
    """A loop with its model and settings, and the row that it is compared with."""

    name: str
    run: Run
    model: str
    decoding: DecodingConfig
    batch_size: int
    rival: str


def rows(batch_sizes: Sequence[int] = (1, 32), compiled: bool = False) -> list[Row]:
    """All rows, those of `generate` also `compiled`; a rival comes before the rows compared with it."""
    chosen: list[Row] = []
    for size in batch_sizes:
        plain, bare = f"plain loop, batch {size}", f"bare loop, batch {size}"
        chosen.append(Row(plain, plain_loop, "full", SEQUENTIAL, size, plain))
        for name, settings in {
            "sequential": {},
            "dual cache": {"cache": "dual"},
            "several blocks": {"mode": "multi_block"},
        }.items():
            decoding = DecodingConfig(**{**SEQUENTIAL.stated(), **settings})
            chosen.append(Row(f"{name}, batch {size}", generate, "full", decoding, size, plain))
        causal = DecodingConfig(mode="autoregressive", gen_length=SHAPE["gen_length"])
        chosen.append(Row(bare, bare_loop, "causal", causal, size, bare))
        chosen.append(Row(f"autoregressive, batch {size}", generate, "causal", causal, size, bare))
        pipelined = DecodingConfig(**{**SEQUENTIAL.stated(), "mode": "pipelined"})
        chosen.append(Row(f"pipelined, batch {size}", generate, "block_causal", pipelined, size, bare))
    if compiled:
        chosen += [with_compiled_steps(row) for row in chosen if row.run is generate]
    return chosen


def with_compiled_steps(row: Row) -> Row:
    """The same decoding with compiled steps."""
    decoding = row.decoding.model_copy(update={"compile": True})
    return replace(row, name=f"{row.name}, compiled", decoding=decoding)


def random_model(pattern: str, device: torch.device = CPU) -> DiffusionTransformer:
    """A model of the size of the golden checkpoints, with predictions far from uniform."""
    torch.manual_seed(0)
    config = DiffusionConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        mask_token_id=255,
        eos_token_id=254,
        initializer_range=0.3,
        attention_pattern=pattern,
        predicts_next=pattern == "causal",
    )
    return DiffusionTransformer(config).eval().to(device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Result:
    """Of a row: medians over rounds, and numbers of a forward pass of the model.

    The plain loop also counts forward passes in which a finished row of a batch waits for others: a response
    is what a user pays, a forward pass what a step costs.

    Attributes:
        microseconds: time of a forward pass of one row, everything counted.
        operations: operations of torch for a call of the model; None for compiled rows.
        milliseconds: time of a response.
        ratio, whole_ratio: the rival's microseconds, and its milliseconds, over its own.
    """

    row: Row
    nfe: float
    microseconds: float
    operations: float | None
    milliseconds: float
    ratio: float
    whole_ratio: float


class Counting(TorchDispatchMode):
    """Counts the operations of torch, and the embeddings among them: one for each call of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["all"] += 1
        self.counts["calls"] += "embedding" in str(func)
        return func(*args, **(kwargs or {}))

    @property
    def per_call(self) -> float:
        return self.counts["all"] / self.counts["calls"]


def operations(row: Row, model: DiffusionTransformer, prompts: Sequence[Sequence[int]]) -> float:
    """Operations for a call of the model."""
    with Counting() as counting:
        row.run(model, prompts[: row.batch_size], row.decoding, row.batch_size)
    return counting.per_call


def clock(device: torch.device) -> float:
    """Seconds of CPU time, or on a GPU of wall time until it has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    entries: Sequence[Row], prompts: Sequence[Sequence[int]], repeat: int, device: torch.device
) -> list[Result]:
    """Time the rows in alternation; each decodes all prompts in a round."""
    # Each compiled row has a model of its own: a model keeps the graphs of its last settings only.
    models = {row.name: random_model(row.model, device) for row in entries}
    costs: dict[str, list[float]] = {row.name: [] for row in entries}  # milliseconds of a response
    nfe: dict[str, float] = {}
    for number in range(repeat + 1):
        for row in entries:
            started = clock(device)
            generations = row.run(models[row.name], prompts, row.decoding, row.batch_size)
            costs[row.name].append((clock(device) - started) / len(generations) * 1e3)
            nfe[row.name] = statistics.mean(each.nfe for each in generations)
            print(f"round {number} of {repeat}: {row.name}: {costs[row.name][-1]:.2f} ms", file=sys.stderr)
    results = []
    for row in entries:
        own, others = (costs[name][1:] for name in (row.name, row.rival))  # the first round warms up
        ratio = statistics.median(rival / mine for rival, mine in zip(others, own, strict=True))
        milliseconds = statistics.median(own)
        results.append(
            Result(
                row,
                nfe[row.name],
                milliseconds / nfe[row.name] * 1e3,
                None if row.decoding.compile else operations(row, models[row.name], prompts),
                milliseconds,
                ratio * nfe[row.name] / nfe[row.rival],
                ratio,
            )
        )
    return results


COLUMNS: dict[str, Callable[[Result], str]] = {
    "decoding": lambda result: result.row.name,
    "NFE": lambda result: f"{result.nfe:.1f}",
    "µs / forward": lambda result: f"{result.microseconds:.0f}",
    "operations / call": lambda result: "" if result.operations is None else f"{result.operations:.0f}",
    "ms / response": lambda result: f"{result.milliseconds:.2f}",
    "times as fast, forward": lambda result: f"{result.ratio:.2f}",
    "response": lambda result: f"{result.whole_ratio:.2f}",
    "as": lambda result: result.row.rival,
}


def main(arguments: Sequence[str] | None = None) -> None:
    set_encodings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=positive, default=9, help="rounds (default: %(default)s)")
    parser.add_argument("--prompts", type=positive, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        action=Distinct,
        default=[1, 32],
        help="default: %(default)s",
    )
    parser.add_argument("--compile", action="store_true", help="also compiled rows, which take minutes")
    options = parser.parse_args(arguments)
    device = chosen_device(parser, options)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 250, (options.prompts, PROMPT), generator=generator).tolist()
    entries = rows(options.batch_sizes, options.compile)
    print(table(measure(entries, prompts, options.repeat, device), COLUMNS, ["decoding", "as"]))
    print(" · ".join(f"{name}: {value}" for name, value in describe(device).items()))


if __name__ == "__main__":
    main()

"""Decode and judge the units of a benchmark, in this process or in others."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dparallel.config.experiment import BenchmarkConfig
from dparallel.evaluation.bench import Bench, Unit
from dparallel.evaluation.decode import Finished, decode_here
from dparallel.evaluation.judge import judge_here
from dparallel.evaluation.store import Store
from dparallel.problems.scoring import scorer_named
from dparallel.stages.sharing import have_made

Delegate = Callable[[list[dict[str, Any]]], Sequence[str]]


def make_units(
    config: BenchmarkConfig,
    inputs: dict[str, str],
    store: str | Path | Store,
    units: Sequence[Mapping[str, Any]],
) -> None:
    """Decode and judge units of a benchmark that another process finishes (`stage.run_stage`).

    Any number of processes may run this concurrently.

    Args:
        units: `bench.Unit`s as JSON values.

    Raises:
        UserError: a unit does not belong to this benchmark; otherwise as `run_stage`.
    """
    bench = Bench(config, inputs, store)
    make_here(bench, bench.units(units))


def make_here(bench: Bench, units: Sequence[Unit], finished: Finished | None = None) -> None:
    """Decode and judge units in this process; their samples are judged in worker processes where needed.

    Args:
        finished: called with every response when it is decoded.
    """
    decode_here(bench, [unit for unit in units if unit.kind != "verdicts"], finished)
    judge_here(bench, [unit for unit in units if unit.kind == "verdicts"])


def have_units_made(bench: Bench, delegate: Delegate, units: Sequence[Unit]) -> None:
    """Have other processes decode and judge the units (with `make_units`), and wait for them.

    What a scorer judges without worker processes takes no time, and is judged in this process.

    Args:
        delegate: takes units as JSON values, waits until they are done, and returns descriptions of
            failures.
    """
    judge_here(bench, [unit for unit in units if _is_fast(unit)])
    if others := [unit for unit in units if not _is_fast(unit)]:
        have_made(
            sorted(
                others, key=lambda unit: unit.slice
            ),  # interleaved, so that every process gets some first slices, which have the longest prompts
            ask=lambda missing: delegate([unit.model_dump(mode="json") for unit in missing]),
            is_missing=bench.is_missing,
            name=lambda unit: unit.label,
            noun="units",
            folder=bench.store.folder,
        )


def _is_fast(unit: Unit) -> bool:
    return unit.scorer is not None and scorer_named(unit.scorer).in_process

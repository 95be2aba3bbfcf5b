"""Judge: turn samples into verdicts, on the CPU. A corrected scorer judges stored samples again."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.bench import Bench, Split, Unit
from dparallel.models.checkpoints import read_config
from dparallel.problems.judging import judged
from dparallel.problems.prompts import finish
from dparallel.problems.scorer import Measure, Response, Scorer, Verdict
from dparallel.problems.scoring import scorer_named, scorers_of
from dparallel.problems.sources import Problem
from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)

Values = dict[str, list[Any]]  # of every problem, by the names of metrics; None where unknown


def verdicts_of(bench: Bench, model: str, split: Split, decoding: DecodingConfig) -> dict[str, Values]:
    """The stored verdicts of all scorers of a split's protocol, by their keys in the store."""
    total = len(bench.problems[split])
    found = {}
    for scorer in scorers_of(bench.protocol(split)):
        key = bench.verdicts_key(model, split, decoding, scorer.name)
        table = bench.store.verdicts(key)
        if table is None or len(table) < total:
            raise StageError(
                f"{bench.store.folder}: verdicts {key} are missing although they were given; run the stage "
                "again"
            )
        found[key] = {metric: _values(scorer.measure(metric), table[metric]) for metric in scorer.metrics}
    return found


def _values(measure: Measure, column: pa.ChunkedArray) -> list[Any]:
    """The verdicts in a column."""
    values = column.to_pylist()
    if measure.kind != "item":
        return values
    return [None if value is None else json.loads(value) for value in values]


def _column(measure: Measure, values: Sequence[Any]) -> pa.Array:
    """Verdicts as a column: truth values where all are that, other numbers, or items as JSON."""
    if measure.kind == "item":
        return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    flags = all(value is None or isinstance(value, bool) for value in values)
    if measure.kind == "flag" or (measure.kind == "share" and flags):
        return pa.array(values, pa.bool_())
    return pa.array([None if value is None else float(value) for value in values], pa.float64())


def judge_here(bench: Bench, units: Sequence[Unit]) -> None:
    """Judge the samples of units that no other process has judged meanwhile, a scorer at a time."""
    missing = [unit for unit in units if bench.is_missing(unit)]
    for name in dict.fromkeys(unit.scorer for unit in missing):
        if name is not None:
            _judge(bench, scorer_named(name), [unit for unit in missing if unit.scorer == name])


@dataclass
class _Slice:
    """The responses of a unit, and the verdicts that are known."""

    unit: Unit
    problems: Sequence[Problem]
    responses: Sequence[Response]
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def table(self, scorer: Scorer) -> pa.Table:
        """The columns of stored verdicts, a row for each problem."""
        rows = [
            {
                "row": self.unit.slice[0] + place,
                "problem_id": problem.problem_id,
                "prompt": problem.prompt,
                "reference": problem.reference,
                "response": _shown(response),
            }
            for place, (problem, response) in enumerate(zip(self.problems, self.responses, strict=True))
        ]
        texts = [(name, pa.string()) for name in ("problem_id", "prompt", "reference", "response")]
        table = pa.Table.from_pylist(rows, schema=pa.schema([("row", pa.int32()), *texts]))
        verdicts = [self.verdicts[place] for place in range(len(rows))]
        for metric in scorer.metrics:
            values = [verdict.metrics[metric] for verdict in verdicts]
            table = table.append_column(metric, _column(scorer.measure(metric), values))
        return table.append_column("note", pa.array([verdict.note for verdict in verdicts], pa.string()))


def _judge(bench: Bench, scorer: Scorer, units: Sequence[Unit]) -> None:
    """Judge units together, so that worker processes start once; each is stored when it is complete."""
    slices = list(_responses(bench, units, scorer.repeats))
    places = [(part, place) for part in slices for place in range(len(part.problems))]
    problems = [part.problems[place] for part, place in places]
    responses = [part.responses[place] for part, place in places]
    began = time.perf_counter()
    with contextlib.closing(judged(scorer, problems, responses)) as verdicts:
        for index, verdict in verdicts:
            part, place = places[index]
            part.verdicts[place] = verdict
            if len(part.verdicts) == len(part.problems):
                unit = part.unit
                key = bench.verdicts_key(unit.model, unit.split, unit.decoding, scorer.name)
                bench.store.put_verdicts(key, range(*part.unit.slice), part.table(scorer))
    if not scorer.in_process:
        log.info("%s: judged %d responses in %.1f s", scorer.name, len(places), time.perf_counter() - began)


def _responses(bench: Bench, units: Sequence[Unit], repeats: int) -> Iterator[_Slice]:
    """The texts of the units' samples, which are read once for each model and decoding.

    Args:
        repeats: number of responses to every problem that are judged together.
    """
    by_samples: dict[tuple[str, Split, DecodingConfig], list[Unit]] = {}
    for unit in units:
        by_samples.setdefault((unit.model, unit.split, unit.decoding), []).append(unit)
    for (model, split, decoding), parts in by_samples.items():
        tokenizer, end_token_ids = bench.tokenizer(model), read_config(bench.inputs[model]).end_token_ids
        repeated = [
            bench.samples(bench.samples_key(model, split, repeat), split)["response_ids"]
            for repeat in bench.repeated(split, decoding)[:repeats]
        ]
        for unit in parts:
            first, end = unit.slice
            texts = [
                [
                    finish(tokens, tokenizer, end_token_ids, bench.protocol(split).stops)
                    for tokens in samples.slice(first, end - first).to_pylist()
                ]
                for samples in repeated
            ]
            responses = list(map(list, zip(*texts, strict=True))) if len(texts) > 1 else texts[0]
            yield _Slice(unit, bench.problems[split][first:end], responses)


def _shown(response: Response) -> str:
    """A response, or all that were judged together, as one text."""
    if isinstance(response, str):
        return response
    count = len(response)
    return "\n\n".join(
        f"----- response {number} of {count} -----\n{text}" for number, text in enumerate(response, 1)
    )

"""The trajectories stage: decode all problems with the teacher, or import responses, and store them.

A response that another folder of the experiment holds is not decoded again: a mended scorer or a corrected
reference only judges it anew.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.imported import ImportedConfig
from dparallel.decoding.canvas import Generation, tokens_per_forward
from dparallel.decoding.generate import generate
from dparallel.models.checkpoints import load_model, load_tokenizer, read_config
from dparallel.models.loader import releasing_memory
from dparallel.models.threads import fitting_threads
from dparallel.problems.columns import Columns
from dparallel.problems.prompts import encode_problems, render_all, tokenizer_fingerprint
from dparallel.problems.registry import check_unchanged, load_problems, problems_digest, protocol_of
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import Problem
from dparallel.problems.stops import stop_at
from dparallel.stages import lease
from dparallel.stages.code import DECODING, STOPS, code_digest
from dparallel.stages.files import is_there
from dparallel.stages.manifest import Manifest, Stage, StageError, digest
from dparallel.stages.origin import Origin
from dparallel.stages.progress import Progress
from dparallel.stages.sharing import have_made, in_turn
from dparallel.trajectories.importing import columns_of, imported_rows
from dparallel.trajectories.privileged import with_reference
from dparallel.trajectories.rows import generations_of, identity, rows
from dparallel.trajectories.schema import TEACHER_PROMPT, ShardMetadata
from dparallel.trajectories.store import (
    read_shard,
    same_recordings,
    shard_name,
    write_shard,
)

log = logging.getLogger(__name__)


Delegate = Callable[[list[int]], Sequence[str]]


@dataclass(frozen=True)
class Shard:
    """Consecutive problems and the file for their rows, whose content does not depend on the process."""

    index: int
    path: Path
    problems: list[Problem]


@dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts of a shard.

    Attributes:
        students: the problems' own prompts, which the student learns to respond to.
        privileged: those with the reference answers; None if they are not recorded.
        decoded: whether the teacher responds to the privileged prompts.
    """

    students: list[list[int]]
    privileged: list[list[int]] | None
    decoded: bool

    @property
    def asked(self) -> list[list[int]]:
        """The prompts that the teacher responds to."""
        return self.privileged if self.decoded and self.privileged is not None else self.students

    @property
    def asked_column(self) -> str:
        return TEACHER_PROMPT if self.decoded else "prompt_ids"


def _prompts(
    config: TrajectoriesConfig,
    problems: Sequence[Problem],
    encode: Callable[[Sequence[Problem]], list[list[int]]],
) -> Prompts:
    if config.privileged is None:
        return Prompts(encode(problems), None, False)
    privileged = encode(with_reference(problems, config.privileged))
    return Prompts(encode(problems), privileged, config.privileged.decode)


def run_stage(
    config: TrajectoriesConfig,
    inputs: dict[str, str],
    out_dir: str | Path,
    delegate: Delegate | None = None,
    origin: Origin | None = None,
) -> Manifest:
    """Record trajectories of `inputs["teacher"]` as Parquet shards in `out_dir`.

    After an interruption, complete shards are kept and only missing ones are decoded. Shards that were
    recorded in another folder of the experiment, by the same decoding of the same prompts, are taken over.

    Args:
        delegate: has other processes record the shards with the given indices (with `record_shards`), waits
            for them and returns descriptions of failures; by default shards are decoded in this process.
        origin: the run that the stage belongs to.

    Raises:
        LeaseHeldError: another run works in this folder; processes that record shards do not count.
        ProblemsError: the problems cannot be read, or a prompt does not fit the model.
        StageError: `out_dir` belongs to other settings, another teacher or other problems; or shards are
            still missing after three rounds of `delegate`.
    """
    problems = load_problems(config.problems)
    stage = Stage("trajectories", config, inputs, out_dir, origin)
    config = stage.as_begun(config, "shard_size")
    content = problems_digest(problems)
    if done := stage.done:
        check_unchanged(stage.folder, done, content)
        return done
    with lease.held(stage.folder):
        return stage.done or _record(config, inputs, stage, problems, delegate)  # by another run meanwhile


def _record(
    config: TrajectoriesConfig,
    inputs: dict[str, str],
    stage: Stage,
    problems: list[Problem],
    delegate: Delegate | None,
) -> Manifest:
    # 1. Take over the shards that were recorded before, and record the others.
    shards = _cut(config, problems, stage.folder)
    metadata = _metadata(config, inputs, stage)
    missing = _missing(shards, metadata)
    if config.imported is None:
        missing = take_over(missing, config, inputs, metadata)
    log.info("recording %d of %d shards (%d problems)", len(missing), len(shards), len(problems))
    began = time.perf_counter()
    if config.imported is not None:
        _import(missing, config, config.imported, inputs, metadata)
    elif delegate is None:
        _decode(missing, config, inputs, metadata)
    else:
        _have_decoded(missing, delegate, stage.folder)
    seconds = time.perf_counter() - began

    # 2. Check all shards, including those of other processes; count and finish.
    table = pa.concat_tables([_read_checked(shard, metadata) for shard in shards])
    counts, metrics = summarize(table)
    if missing:
        metrics["rows_per_second"] = sum(len(shard.problems) for shard in missing) / seconds
    return stage.finish(
        files=[shard.path.name for shard in shards],
        counts=counts,
        metrics=metrics,
        details={"problems": problems_digest(problems)},
    )


def record_shards(
    config: TrajectoriesConfig,
    inputs: dict[str, str],
    out_dir: str | Path,
    indices: Sequence[int],
    origin: Origin | None = None,
) -> None:
    """Record the shards with the given indices that do not exist yet; `run_stage` finishes the stage.

    Any number of processes may run this concurrently, even for the same shards: each is recorded by one of
    them, and the others wait for it.

    Raises:
        ValueError: an index is out of range.
        UserError: as `run_stage`.
    """
    problems = load_problems(config.problems)
    stage = Stage("trajectories", config, inputs, out_dir, origin)
    config = stage.as_begun(config, "shard_size")
    shards = _cut(config, problems, stage.folder)
    unknown = sorted(set(indices) - set(range(len(shards))))
    if unknown:
        raise ValueError(
            f"no shard {unknown[0]}: {len(problems)} problems are {len(shards)} shards "
            f"of shard_size={config.shard_size}, from 0 to {len(shards) - 1}"
        )
    metadata = _metadata(config, inputs, stage)
    missing = _missing([shards[index] for index in indices], metadata)
    if config.imported is None:
        _decode(missing, config, inputs, metadata)
    else:
        _import(missing, config, config.imported, inputs, metadata)


def summarize(table: pa.Table) -> tuple[dict[str, int], dict[str, float]]:
    """Counts of rows by correctness; accuracy over rows with known correctness, mean NFE, and TPF.

    Imported responses of unknown steps have no NFE and TPF.
    """
    correct = pc.sum(table["correct"]).as_py() or 0
    unknown = table["correct"].null_count
    known = len(table) - unknown
    counts = {"rows": len(table), "correct": correct, "incorrect": known - correct, "unknown": unknown}
    metrics: dict[str, float] = {}
    if not table["nfe"].null_count:
        metrics["nfe"] = pc.mean(table["nfe"]).as_py()
        metrics["tpf"] = tokens_per_forward(table["num_tokens"].to_pylist(), table["nfe"].to_pylist())
    if known:
        metrics["accuracy"] = correct / known
    return counts, metrics


def _cut(config: TrajectoriesConfig, problems: list[Problem], folder: Path) -> list[Shard]:
    starts = range(0, len(problems), config.shard_size)
    return [
        Shard(index, folder / shard_name(index), problems[start : start + config.shard_size])
        for index, start in enumerate(starts)
    ]


def take_over(
    missing: Sequence[Shard], config: TrajectoriesConfig, inputs: dict[str, str], metadata: ShardMetadata
) -> list[Shard]:
    """Write the shards that another folder of the experiment holds, judged anew; returns the others.

    No model is loaded. The rows are those of a new recording.
    """
    if not missing:
        return []
    tokenizer = load_tokenizer(inputs["teacher"])
    end_token_ids = read_config(inputs["teacher"]).end_token_ids
    protocol = protocol_of(config.problems)
    left = []
    for shard in missing:
        prompts: Prompts | None = None
        for file, table in same_recordings(shard.path, metadata):
            prompts = prompts or _prompts(
                config, shard.problems, lambda problems: render_all(problems, protocol, tokenizer)
            )
            if table[prompts.asked_column].to_pylist() == prompts.asked:
                judged = rows(
                    config,
                    shard.problems,
                    prompts.students,
                    generations_of(table),
                    tokenizer,
                    end_token_ids,
                    prompts.privileged,
                )
                write_shard(shard.path, _with_truth(config, judged), metadata)
                log.info("%s: decoded before, in %s; judged anew", shard.path.name, file.parent.name)
                break
        else:
            left.append(shard)
    return left


def _with_truth(config: TrajectoriesConfig, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `correct` as true or false; of a value between wrong and right, the best one is right."""
    protocol = protocol_of(config.problems)
    measure = scorers_of(protocol)[0].measure(accuracy_metric(protocol))
    return [{**row, "correct": measure.is_right(row["correct"])} for row in rows]


def _metadata(config: TrajectoriesConfig, inputs: dict[str, str], stage: Stage) -> ShardMetadata:
    teacher, decoding, stops = stage.inputs["teacher"], config.decoding, protocol_of(config.problems).stops
    tokenizer = tokenizer_fingerprint(load_tokenizer(inputs["teacher"]))
    made_from = {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "decoding": decoding.model_dump(mode="json"),
        "stops": stops if decoding.stop_at_eos else (),  # otherwise they do not affect decoding
        "code": code_digest((*DECODING, *STOPS)),
    }
    if config.privileged is not None and config.privileged.decode:
        made_from["asked"] = TEACHER_PROMPT
    return ShardMetadata(teacher=teacher, tokenizer=tokenizer, decoding=decoding, recording=digest(made_from))


def _missing(shards: Sequence[Shard], metadata: ShardMetadata) -> list[Shard]:
    """The shards without a file; a file made from other settings or problems raises a StageError."""
    for shard in shards:
        if is_there(shard.path):
            _read_checked(shard, metadata)
    return [shard for shard in shards if not is_there(shard.path)]


def _read_checked(shard: Shard, metadata: ShardMetadata) -> pa.Table:
    table, found = read_shard(shard.path)
    found = found.model_copy(update={"recording": metadata.recording})  # the stage's key covers the code
    if found != metadata:
        raise StageError(f"{shard.path} was made by {found!r}, expected {metadata!r}; delete it and rerun")
    asked = [identity(problem) for problem in shard.problems]
    if table.select(list(identity(shard.problems[0]))).to_pylist() != asked:
        raise StageError(f"{shard.path} holds other problems than this run asks for; delete it and rerun")
    return table


def _import(
    shards: Sequence[Shard],
    config: TrajectoriesConfig,
    imported: ImportedConfig,
    inputs: dict[str, str],
    metadata: ShardMetadata,
) -> None:
    """Write the shards that are still missing from published responses; no model is loaded."""
    if not shards:
        return
    model, tokenizer = read_config(inputs["teacher"]), load_tokenizer(inputs["teacher"])
    if model.eos_token_id is None:
        raise StageError(
            f"{inputs['teacher']} has no eos_token_id, with which responses are filled: state it"
        )
    columns = Columns(config.problems, columns_of(imported))
    for shard in shards:
        start = shard.index * config.shard_size
        places = range(start, start + len(shard.problems))
        found = imported_rows(config, imported, shard.problems, places, columns, tokenizer, model)
        write_shard(shard.path, found if imported.correct else _with_truth(config, found), metadata)
        log.info("%s: %d published responses", shard.path.name, len(found))


def _have_decoded(missing: list[Shard], delegate: Delegate, folder: Path) -> None:
    have_made(
        missing,
        ask=lambda shards: delegate([shard.index for shard in shards]),
        is_missing=lambda shard: not is_there(shard.path),
        name=lambda shard: shard.path.name,
        noun="shards",
        folder=folder,
    )


@releasing_memory
def _decode(
    shards: Sequence[Shard], config: TrajectoriesConfig, inputs: dict[str, str], metadata: ShardMetadata
) -> None:
    """Decode the shards that are still missing; all prompts are checked before decoding starts."""
    if not shards:
        return
    model, tokenizer = load_model(inputs["teacher"]), load_tokenizer(inputs["teacher"])
    protocol = protocol_of(config.problems)

    def encode(problems: Sequence[Problem]) -> list[list[int]]:
        return encode_problems(problems, protocol, tokenizer, model, config.decoding)

    prompts = {shard.index: _prompts(config, shard.problems, encode) for shard in shards}
    stop = stop_at(tokenizer, protocol.stops)
    recorded, total = 0, sum(len(of_shard.asked) for of_shard in prompts.values())
    progress = Progress(log, total)

    def finished(place: int, generation: Generation) -> None:
        nonlocal recorded
        recorded += 1
        if recorded % config.batch_size == 0:  # a batch may finish all at once
            progress.tell(recorded, f"{recorded:,} of {total:,} responses")

    with in_turn(shards, lambda shard: shard.path, lambda shard: not is_there(shard.path), "shards") as turns:
        for shard, mine in turns:
            here = prompts[shard.index]
            if not mine:
                log.info("%s: recorded by another process meanwhile", shard.path.name)
                total -= len(here.asked)
                progress.total = total
                continue
            with fitting_threads(model, config.batch_size):
                generations = generate(
                    model, here.asked, config.decoding, config.batch_size, finished=finished, stop=stop
                )
            judged = rows(
                config,
                shard.problems,
                here.students,
                generations,
                tokenizer,
                model.config.end_token_ids,
                here.privileged,
            )
            write_shard(shard.path, _with_truth(config, judged), metadata)
            progress.tell(recorded, f"{recorded:,} of {total:,} responses")

"""The trajectories stage: decode every problem with the teacher and keep each row, right or wrong."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dparallel.config import TrajectoriesConfig
from dparallel.decoding import Generation, generate
from dparallel.evaluation.benchmarks import Problem, check_unchanged, load_problems, problems_digest, score
from dparallel.evaluation.metrics import tokens_per_forward
from dparallel.evaluation.text import decode_response, encode_problems, tokenizer_fingerprint
from dparallel.manifest import Manifest, Stage, StageError
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.trajectories.schema import ShardMetadata
from dparallel.trajectories.store import read_shard, remove_partials, shard_name, write_shard

log = logging.getLogger(__name__)


def run_stage(config: TrajectoriesConfig, inputs: dict[str, str], out_dir: str | Path) -> Manifest:
    """Record trajectories of `inputs["teacher"]` as Parquet shards in `out_dir`.

    Whole shards of a run that was killed are kept; only the missing ones are decoded.

    Raises:
        ProblemsError: the problems cannot be read.
        StageError: `out_dir` belongs to other settings, another teacher or other problems.
        ValueError: a prompt does not fit the model.
    """
    problems = load_problems(config.problems)
    stage = Stage("trajectories", config, inputs, out_dir)
    content = problems_digest(problems)
    if done := stage.done:
        check_unchanged(stage.folder, done, content)
        return done

    # 1. Everything that can be wrong, before any decoding.
    model, tokenizer = load_model(inputs["teacher"]), load_tokenizer(inputs["teacher"])
    prompts = encode_problems(problems, tokenizer, model, config.decoding)
    metadata = ShardMetadata(
        teacher=stage.inputs["teacher"],
        tokenizer=tokenizer_fingerprint(tokenizer),
        decoding=config.decoding,
    )
    starts = range(0, len(problems), config.shard_size)
    paths = [stage.folder / shard_name(index) for index in range(len(starts))]
    for start, path in zip(starts, paths, strict=True):
        if path.is_file():
            _check_resumed(path, metadata, problems[start : start + config.shard_size])

    # 2. Decode the missing shards.
    missing = [(start, path) for start, path in zip(starts, paths, strict=True) if not path.is_file()]
    log.info("recording %d of %d shards (%d problems)", len(missing), len(paths), len(problems))
    recorded, began = 0, time.perf_counter()
    for count, (start, path) in enumerate(missing, 1):
        here = slice(start, start + config.shard_size)
        generations = generate(model, prompts[here], config.decoding, config.batch_size)
        rows = _rows(config, problems[here], prompts[here], generations, tokenizer, model)
        write_shard(path, rows, metadata)
        recorded += len(rows)
        seconds = time.perf_counter() - began
        log.info(
            "%s: %d rows, %.1f rows/s, shard %d of %d, about %.0f s left",
            *(path.name, len(rows), recorded / seconds, count, len(missing)),
            seconds / count * (len(missing) - count),
        )
    seconds = time.perf_counter() - began

    # 3. Count and finish.
    remove_partials(stage.folder)
    table = pa.concat_tables([read_shard(path)[0] for path in paths])
    counts, metrics = summarize(table)
    if recorded:
        metrics["rows_per_second"] = recorded / seconds
    return stage.finish(
        files=[path.name for path in paths],
        counts=counts,
        metrics=metrics,
        details={"problems": content},
    )


def summarize(table: pa.Table) -> tuple[dict[str, int], dict[str, float]]:
    """Counts of rows by correctness, and accuracy over those known, mean NFE and TPF."""
    correct = pc.sum(table["correct"]).as_py() or 0
    unknown = table["correct"].null_count
    known = len(table) - unknown
    counts = {"rows": len(table), "correct": correct, "incorrect": known - correct, "unknown": unknown}
    metrics = {
        "nfe": pc.mean(table["nfe"]).as_py(),
        "tpf": tokens_per_forward(table["num_tokens"].to_pylist(), table["nfe"].to_pylist()),
    }
    if known:
        metrics["accuracy"] = correct / known
    return counts, metrics


def _rows(
    config: TrajectoriesConfig,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    generations: Sequence[Generation],
    tokenizer: Any,
    model: DiffusionTransformer,
) -> list[dict[str, Any]]:
    rows = []
    for problem, prompt, generation in zip(problems, prompts, generations, strict=True):
        response = decode_response(tokenizer, generation.tokens, model.config.eos_token_id)
        rows.append(
            {
                **vars(problem),
                "prompt_ids": prompt,
                "response_ids": generation.tokens,
                "commit_step": generation.commit_step,
                "confidence": generation.confidence,
                "response": response,
                "correct": score(config.problems, problem, response).solution,
                "nfe": generation.nfe,
                "num_tokens": generation.num_tokens,
                "seed": config.decoding.seed,
            }
        )
    return rows


def _check_resumed(path: Path, metadata: ShardMetadata, problems: Sequence[Problem]) -> None:
    """Refuse a shard that other settings or other problems made."""
    table, found = read_shard(path)
    if found != metadata:
        raise StageError(f"{path} was made by {found!r}, expected {metadata!r}; delete it and rerun")
    columns = ["problem_id", "source", "prompt", "reference"]
    if table.select(columns).to_pylist() != [vars(problem) for problem in problems]:
        raise StageError(f"{path} holds other problems than this run asks for; delete it and rerun")

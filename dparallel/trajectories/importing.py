"""Published responses as rows of a trajectory shard.

Legend: G response positions, S forward passes.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.imported import ImportedConfig
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionConfig
from dparallel.problems.columns import Columns
from dparallel.problems.prompts import render_all
from dparallel.problems.registry import protocol_of
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.problems.tables import Record
from dparallel.trajectories.rows import rows

log = logging.getLogger(__name__)

TOGETHER = 64  # rows read at a time: a trajectory of 256 canvases of 384 tokens is 100,000 numbers


def columns_of(imported: ImportedConfig) -> list[str]:
    """The columns that are read of the data set, beside those of the problems."""
    prompt = imported.prompt_ids or "prompt_ids"
    read = [imported.response] if imported.trajectory is None else [imported.trajectory, prompt]
    return [name for name in (*read, imported.correct) if name is not None]


def imported_rows(
    config: TrajectoriesConfig,
    imported: ImportedConfig,
    problems: Sequence[Problem],
    places: range,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    model: DiffusionConfig,
) -> list[dict[str, Any]]:
    """Rows of a shard, in the columns of `schema.SCHEMA`; null where something is not known.

    Args:
        problems: the problems of the shard.
        places: their numbers among all problems.
        columns: the columns `columns_of(imported)`.

    Raises:
        ProblemsError: names a row that is no response of this length, and what is wrong with it.
    """
    gen_length = config.decoding.gen_length
    prompts = render_all(problems, protocol_of(config.problems), tokenizer)
    found: list[Generation] = []
    stated: list[bool | None] = []
    cut = 0
    for number, (record, where) in enumerate(_records(columns, places)):
        if imported.correct is not None:
            stated.append(_truth(where, imported.correct, record[imported.correct]))
        if imported.response is not None:
            tokens = _tokens(where, imported.response, record[imported.response], tokenizer, model)
            cut += len(tokens) > gen_length
            found.append(finished(tokens, gen_length, model))
        else:
            prompt, generation = _trajectory(where, imported, record, gen_length, model)
            prompts[number] = prompt
            found.append(generation)
    if cut:
        log.warning("%d of %d responses are longer than gen_length=%d and cut", cut, len(found), gen_length)
    made = rows(config, problems, prompts, found, tokenizer, model.end_token_ids)
    for place, row in enumerate(made):
        row["confidence"] = None
        if imported.response is not None:
            row |= {"commit_step": None, "nfe": None}
        if imported.correct is not None:
            row["correct"] = stated[place]
    return made


def finished(tokens: Sequence[int], gen_length: int, model: DiffusionConfig) -> Generation:
    """A finished response of unknown steps, cut or filled with end-of-sequence tokens to `gen_length`."""
    assert model.eos_token_id is not None, "checked before"
    end = _length(tokens, model)
    kept = list(tokens[: min(end, gen_length)])
    filled = [*kept, *[model.eos_token_id] * (gen_length - len(kept))]
    return Generation(filled, [0] * gen_length, [0.0] * gen_length, 0, _length(filled, model))


def from_canvases(canvases: np.ndarray, model: DiffusionConfig) -> Generation:
    """A response and the steps of its tokens from the canvases after each forward pass, (S, G).

    Raises:
        ProblemsError: a position is masked at the end, or changes after it was committed.
    """
    committed = canvases != model.mask_token_id  # (S, G)
    if not committed[-1].all():
        raise ProblemsError(f"{int((~committed[-1]).sum())} positions are masked in its last canvas")
    if (committed & (canvases != canvases[-1])).any() or (committed[:-1] & ~committed[1:]).any():
        raise ProblemsError("a token changes after it was committed, or is masked again")
    tokens = canvases[-1].tolist()
    commit_step = (~committed).sum(axis=0).tolist()  # canvases before the token was there
    steps = len(canvases)
    return Generation(tokens, commit_step, [0.0] * len(tokens), steps, _length(tokens, model))


def _records(columns: Columns, places: range) -> Iterator[tuple[Record, str]]:
    for start in range(places.start, places.stop, TOGETHER):
        some = range(start, min(start + TOGETHER, places.stop))
        for record, place in zip(columns.read(some), some, strict=True):
            yield record, columns.rows[place].where


def _length(tokens: Sequence[int], model: DiffusionConfig) -> int:
    """Number of tokens up to and including the first end token."""
    ends = (place for place, token in enumerate(tokens) if token in model.end_token_ids)
    return next(ends, len(tokens) - 1) + 1


def _tokens(
    where: str, name: str, text: Any, tokenizer: PreTrainedTokenizerBase, model: DiffusionConfig
) -> list[int]:
    """Token ids of a response with an end token."""
    if not isinstance(text, str) or not text.strip():
        raise ProblemsError(
            f"{where}: column {name!r} holds {text!r}, expected the text of a response: leave the row out"
        )
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if model.mask_token_id in tokens:
        raise ProblemsError(f"{where}: column {name!r} holds the mask token: leave the row out")
    assert model.eos_token_id is not None, "checked before"
    return [*tokens, model.eos_token_id]


def _trajectory(
    where: str, imported: ImportedConfig, record: Record, gen_length: int, model: DiffusionConfig
) -> tuple[list[int], Generation]:
    """Prompt and response of a row of whole canvases."""
    name, prompt_name = columns_of(imported)[:2]
    prompt = record[prompt_name]
    try:
        ids = np.array(prompt, dtype=np.int64)
        canvases = np.array(record[name], dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        ids = canvases = np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or canvases.ndim != 2 or not len(canvases):
        raise ProblemsError(
            f"{where}: columns {prompt_name!r} and {name!r} are no list of token ids and no list of canvases "
            "of equal length: leave the row out"
        )
    length = canvases.shape[1] - len(ids)
    if length != gen_length:
        raise ProblemsError(
            f"{where}: its response has {length} positions ({canvases.shape[1]} on a canvas without the "
            f"{len(ids)} of the prompt), and trajectories.decoding.gen_length={gen_length}: set it to "
            f"{length}, or leave the row out"
        )
    if (canvases[:, : len(ids)] != ids).any():
        raise ProblemsError(f"{where}: a canvas does not start with {prompt_name!r}: leave the row out")
    try:
        return prompt, from_canvases(canvases[:, len(ids) :], model)
    except ProblemsError as error:
        raise ProblemsError(f"{where}: {error}: leave the row out") from error


def _truth(where: str, name: str, value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    raise ProblemsError(f"{where}: column {name!r} holds {value!r}, expected true or false")

"""Trajectories as training samples: filtered, checked against the model, and drawn without state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dparallel.config.base import ConfigError
from dparallel.config.experiment import TrainingConfig
from dparallel.config.recipe import RecipeConfig
from dparallel.models.backbone import DiffusionConfig
from dparallel.stages.manifest import StageError, fingerprint, read_manifest
from dparallel.trajectories import store
from dparallel.trajectories.schema import TEACHER_PROMPT

ORDER, ROW, DROPOUT = range(3)  # families of random streams


@dataclass(frozen=True)
class Samples:
    """The training samples; G is the same for all, prompts may differ in length."""

    prompts: Sequence[np.ndarray]
    responses: np.ndarray  # int32 (samples, G)
    commit_step: np.ndarray | None  # int16 (samples, G); None if unknown
    teacher_prompts: Sequence[np.ndarray] | None = None  # where the teacher's prompts are not the student's

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def gen_length(self) -> int:
        return self.responses.shape[1]


class StepShape(NamedTuple):
    """Division of a train step: samples over all processes, samples per forward pass, forward passes."""

    samples: int
    micro_samples: int
    accumulation: int


def load_samples(
    folder: str | Path, only_correct: bool, max_length: int | None, privileged: bool = False
) -> tuple[Samples, dict[str, int]]:
    """Load the trajectories to train on.

    Args:
        only_correct: skip responses that are not known to be correct.
        max_length: skip trajectories with more prompt + response tokens.
        privileged: whether the teacher's prompts have the reference answer.

    Returns:
        The samples, and counts: `rows_read` = `left_out_incorrect` + `left_out_too_long` + `rows_used`.

    Raises:
        ConfigError: no trajectory remains, the responses differ in length, or there are no privileged
            prompts.
    """
    table = store.load(folder)
    if privileged and TEACHER_PROMPT not in table.column_names:
        raise ConfigError(
            f"recipe.teacher_prompt=privileged, and {folder} has no privileged prompts: record with "
            "trajectories.privileged, such as {decode: false}, or drop teacher_prompt"
        )
    counts = {"rows_read": table.num_rows}
    if only_correct:  # unknown correctness (null) counts as not correct
        table = table.filter(pc.fill_null(table["correct"], False))
    counts["left_out_incorrect"] = counts["rows_read"] - table.num_rows
    lengths = pc.add(pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["response_ids"]))
    kept = table if max_length is None else table.filter(pc.less_equal(lengths, max_length))
    counts["left_out_too_long"] = table.num_rows - kept.num_rows
    counts["rows_used"] = kept.num_rows
    if not kept.num_rows:
        raise ConfigError(
            f"{folder}: of {counts['rows_read']} trajectories none is left to train on: "
            f"{counts['left_out_incorrect']} not known to be correct (only_correct={only_correct}), "
            f"{counts['left_out_too_long']} longer than max_length={max_length}"
        )
    gen_lengths = pc.unique(pc.list_value_length(kept["response_ids"])).to_pylist()
    if len(gen_lengths) > 1:
        raise ConfigError(
            f"{folder}: responses of different lengths {sorted(gen_lengths)}; record them again"
        )
    samples = Samples(
        prompts=_lists(kept["prompt_ids"]),
        responses=np.stack(_lists(kept["response_ids"])),
        commit_step=None if kept["commit_step"].null_count else np.stack(_lists(kept["commit_step"])),
        teacher_prompts=_lists(kept[TEACHER_PROMPT]) if privileged else None,
    )
    return samples, counts


def check_teacher(trajectories: str | Path, teacher: str | Path) -> None:
    """Raise a StageError if the trajectories were recorded with another teacher."""
    recorded, given = read_manifest(trajectories, "trajectories").inputs["teacher"], fingerprint(teacher)
    if recorded != given:
        raise StageError(
            f"the trajectories in {trajectories} were recorded by another teacher (fingerprint "
            f"{recorded[:12]}) than {teacher} ({given[:12]}): record them again with this one"
        )


def check_samples(samples: Samples, recipe: RecipeConfig, model: DiffusionConfig) -> None:
    """Raise a ConfigError if recipe, trajectories and model do not fit together."""
    gen_length = samples.gen_length
    if recipe.needs_steps and samples.commit_step is None:
        raise ConfigError(
            f"recipe.masking={recipe.masking} needs the steps at which the teacher committed its tokens, and "
            "the trajectories are finished responses without steps: use masking: random or rollouts, "
            "or record them"
        )
    if misfit := recipe.misfit(gen_length):
        raise ConfigError(
            f"recipe.{misfit} does not divide the trajectories' response length {gen_length}: "
            f"choose a divisor of {gen_length}"
        )
    if recipe.rollouts and (misfit := recipe.rollouts.misfit(gen_length)):
        raise ConfigError(f"recipe.{misfit}")
    _check_steps(samples, recipe)
    for name in ("mask_token_id", "eos_token_id"):
        token = getattr(model, name)
        if token is None or not 0 <= token < model.vocab_size:
            raise ConfigError(
                f"the teacher's {name} is {token}, outside its vocabulary (0 to {model.vocab_size - 1}): "
                "correct its config.json"
            )
    check_tokens([*samples.prompts, *(samples.teacher_prompts or ())], samples.responses, model)


def check_tokens(prompts: Sequence[np.ndarray], responses: np.ndarray, model: DiffusionConfig) -> None:
    """Raise a ConfigError if a model cannot read trajectories.

    Args:
        responses: token ids, (samples, G).
        model: the teacher, or a student with its vocabulary.
    """
    tokens = np.concatenate([*prompts, responses.ravel()])
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ConfigError(
            f"the trajectories hold token ids {tokens.min()} to {tokens.max()}, the model knows 0 to "
            f"{model.vocab_size - 1}: they were recorded with another tokenizer"
        )
    if (responses == model.mask_token_id).any():
        raise ConfigError(
            f"the trajectories hold mask_token_id={model.mask_token_id} in a response: "
            "a decoding that never finished; record them again"
        )
    longest = max(map(len, prompts)) + responses.shape[1]
    if longest > model.max_position_embeddings:
        raise ConfigError(
            f"the longest prompt + response has {longest} tokens, the model's max_position_embeddings "
            f"is {model.max_position_embeddings}: leave longer ones out (in training by training.max_length)"
        )


def _check_steps(samples: Samples, recipe: RecipeConfig) -> None:
    """Raise a ConfigError if the recipe needs steps that the trajectories do not have."""
    if not recipe.needs_steps or samples.commit_step is None:
        return
    most = int(np.ptp(samples.commit_step, axis=1).max()) + 1  # forward passes that committed tokens
    if recipe.near_far is not None and recipe.near_far.delta >= most:
        raise ConfigError(
            f"recipe.near_far.delta={recipe.near_far.delta} leaves no token far: the trajectories have "
            f"at most {most} forward passes; choose a smaller delta, or record fewer tokens per forward pass"
        )


def step_shape(config: TrainingConfig, views: int, processes: int) -> StepShape:
    """Divide a train step over processes and forward passes; ConfigError if it is not divisible."""
    wanted = config.views_per_step
    if wanted % (views * processes):
        raise ConfigError(
            f"views_per_step={wanted} is not divisible by {processes} processes x {views} views of a "
            f"sample: choose a multiple of {views * processes}, or another number of processes, which a "
            "training already begun can go on with"
        )
    per_process = wanted // processes
    micro = min(config.micro_batch_size, per_process)
    if micro % views or per_process % micro:
        raise ConfigError(
            f"micro_batch_size={config.micro_batch_size} does not divide a process's {per_process} views "
            f"(views_per_step={wanted} over {processes} processes) into whole samples of {views} views: "
            f"choose a divisor of {per_process} that is a multiple of {views}"
        )
    return StepShape(wanted // views, micro // views, per_process // micro)


def sample_order(seed: int, train_step: int, per_step: int, samples: int) -> np.ndarray:
    """Indices of the samples of a train step (from 1), (per_step,); each epoch is a new permutation."""
    position = np.arange((train_step - 1) * per_step, train_step * per_step)
    epoch, offset = np.divmod(position, samples)
    return np.array([_permutation(seed, int(e), samples)[o] for e, o in zip(epoch, offset, strict=True)])


def row_generator(seed: int, train_step: int, row: int) -> np.random.Generator:
    """The random generator of a row of a train step's global batch."""
    return np.random.default_rng((ROW, seed, train_step, row))


def dropout_seed(seed: int, train_step: int, rank: int) -> int:
    """Seed for the dropout of a process in a train step."""
    return int(np.random.SeedSequence((DROPOUT, seed, train_step, rank)).generate_state(1)[0])


@lru_cache(maxsize=2)  # a step spans at most two epochs, unless an epoch is shorter than a step
def _permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(samples)


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists as an array per row, without conversion to Python numbers."""
    rows = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.flatten().to_numpy()
        rows += np.split(values, offsets[1:-1] - offsets[0])
    return rows

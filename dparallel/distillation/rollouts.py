"""On-policy training: the views are of responses that the student decodes during its training.

Either their tokens and steps replace the recorded ones, or their steps alone: then canvases hold the recorded
tokens in the student's order.

The responses are a function of the student's weights, the seed and the train step before which they are
decoded. A checkpoint between two times holds them, so that a resumed training goes on with the same ones.

Each time costs `prompts` x NFE forward passes without a gradient, beside `every` x `views_per_step` x 3 of
the training: a forward pass of student and teacher, and a backward pass that costs as much.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from dparallel.config.recipe_parts import Rollouts
from dparallel.decoding.generate import generate
from dparallel.distillation.data import Samples, sample_order
from dparallel.distillation.engine import Process
from dparallel.models.backbone import DiffusionTransformer
from dparallel.stages.manifest import StageError

log = logging.getLogger(__name__)

FILE = "rollouts.safetensors"  # in a checkpoint's folder


class Round(NamedTuple):
    """The responses of one time, for the train steps from `first_step` on.

    Legend: n responses.
    """

    first_step: int
    chosen: np.ndarray  # int64 (n,), indices of the recorded samples whose prompts were decoded
    responses: np.ndarray  # int32 (n, G)
    commit_step: np.ndarray  # int16 (n, G)


@dataclass
class OwnResponses:
    """The samples of every train step: recorded prompts with the responses of the student, or their steps."""

    rollouts: Rollouts
    recorded: Samples
    seed: int
    process: Process
    present: Round | None = None

    def at(self, train_step: int, student: PeftModel) -> Samples:
        """The samples of a train step (from 1); decodes them first if their time has come."""
        first_step = self._first_step(train_step)
        if self.present is None or self.present.first_step != first_step:
            if first_step != train_step:
                raise StageError(
                    f"the checkpoint of train step {train_step - 1} holds no {FILE}, with the responses that "
                    "the student decoded: delete it to go on from an earlier checkpoint"
                )
            self.present = self._decode(first_step, student)
        chosen = self.present.chosen.tolist()
        teachers = self.recorded.teacher_prompts
        own = self.rollouts.tokens == "own"
        return Samples(
            prompts=[self.recorded.prompts[sample] for sample in chosen],
            responses=self.present.responses if own else self.recorded.responses[chosen],
            commit_step=self.present.commit_step,
            teacher_prompts=None if teachers is None else [teachers[sample] for sample in chosen],
        )

    def save(self, folder: Path) -> None:
        """Write the present responses to a checkpoint's folder."""
        if self.present is not None:
            first_step, *arrays = self.present
            named = dict(zip(Round._fields[1:], arrays, strict=True))
            save_file({"first_step": np.array([first_step]), **named}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read the responses of a checkpoint's folder, if it has any."""
        if (folder / FILE).is_file():
            found = load_file(folder / FILE)
            arrays = (found[name] for name in Round._fields[1:])
            self.present = Round(int(found["first_step"][0]), *arrays)

    def _first_step(self, train_step: int) -> int:
        return train_step - (train_step - 1) % self.rollouts.every

    def _decode(self, first_step: int, student: PeftModel) -> Round:
        """Decode the next prompts, each in one of the processes."""
        began = time.perf_counter()
        count = min(self.rollouts.prompts, len(self.recorded))
        place = (first_step - 1) // self.rollouts.every + 1
        chosen = sample_order(self.seed, place, count, len(self.recorded))
        training = student.training
        student.eval()
        own = list(range(self.process.rank, count, self.process.count))
        generations = generate(
            adapted_model(student),
            [self.recorded.prompts[chosen[row]].tolist() for row in own],
            self.rollouts.decoding,
            self.rollouts.batch_size,
        )
        student.train(training)
        made = [
            (row, made.tokens, made.commit_step, made.nfe) for row, made in zip(own, generations, strict=True)
        ]
        rows = sorted(_of_all_processes(made, self.process))
        if self.process.first:
            log.info(
                "before train step %d the student decoded %d responses of %.1f forward passes in %.0f s",
                first_step,
                count,
                np.mean([nfe for _, _, _, nfe in rows]),
                time.perf_counter() - began,
            )
        return Round(
            first_step,
            chosen,
            np.array([tokens for _, tokens, _, _ in rows], dtype=np.int32),
            np.array([steps for _, _, steps, _ in rows], dtype=np.int16),
        )


def adapted_model(student: PeftModel) -> DiffusionTransformer:
    """The model inside a student, whose adapted matrices are in place."""
    model = student.get_base_model()
    assert isinstance(model, DiffusionTransformer)
    return model


def _of_all_processes(rows: Sequence[tuple], process: Process) -> list[tuple]:
    if process.count == 1:
        return list(rows)
    parts: list[list[tuple]] = [[] for _ in range(process.count)]
    torch.distributed.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]

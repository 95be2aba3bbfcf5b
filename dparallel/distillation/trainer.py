"""The training stage: distil a student from its teacher's trajectories.

Runs in every process of a launch. All random numbers are functions of the seed, the train step and the row in
the step's global batch, so resuming does not change results. Neither do the number of processes and the
number of forward passes per step, except with LoRA dropout, which is drawn per process and forward pass.
"""

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from dparallel.config.base import UserError
from dparallel.config.experiment import StudentConfig, TrainingConfig
from dparallel.distillation import engine as ds
from dparallel.distillation import resuming
from dparallel.distillation.batches import step_batches
from dparallel.distillation.data import (
    Samples,
    StepShape,
    check_samples,
    check_teacher,
    dropout_seed,
    load_samples,
    step_shape,
)
from dparallel.distillation.losses import entropy
from dparallel.distillation.quantization import quantize
from dparallel.distillation.recipe import Loss, base_logits, loss, teacher_logits, with_own_tokens
from dparallel.distillation.rollouts import OwnResponses, adapted_model
from dparallel.distillation.settings import check_builds, check_quantization, check_rollouts, zero_stage
from dparallel.models.checkpoints import load_model, read_config
from dparallel.models.lora import attach
from dparallel.stages import lease, metrics_log
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, Manifest, Stage, read_manifest
from dparallel.stages.metrics_log import METRICS
from dparallel.stages.origin import Origin
from dparallel.stages.progress import Progress

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class DivergedError(UserError):
    """The loss or a gradient is not finite; the message names the train step."""


def run_stage(
    config: StudentConfig, inputs: dict[str, str], out_dir: str | Path, origin: Origin | None = None
) -> Manifest:
    """Train an adapter of `inputs["teacher"]` on `inputs["trajectories"]`, in a launched process group.

    Resumes from the last intact checkpoint. Rank 0 writes `adapter/` and `metrics.jsonl`.

    Args:
        origin: the run that the stage belongs to.

    Raises:
        NotLaunchedError: not started by a launcher.
        ConfigError: settings, trajectories and teacher do not fit together.
        LeaseHeldError: another run works in this folder.
        StageError: a folder is missing, damaged or belongs to something else, or the trajectories are of
            another teacher.
        ForeignShardError: a Parquet file is not a trajectory shard.
        DivergedError: the loss or a gradient is not finite.
        FileError: the disk is full.
    """
    process = ds.launched_process()
    folder = Path(out_dir)
    training, recipe = config.training, config.recipe

    # 1. Check everything before computing anything, and the trajectories before claiming a folder
    check_quantization(training)
    check_rollouts(recipe, training)
    privileged = recipe.teacher_prompt == "privileged"
    samples, counts = load_samples(
        inputs["trajectories"], config.only_correct, training.max_length, privileged
    )
    check_teacher(inputs["trajectories"], inputs["teacher"])
    if process.first or is_there(folder / MANIFEST):
        stage = Stage("training", config, inputs, folder, origin)
        if finished := stage.done:
            return finished
    shape = step_shape(training, recipe.views, process.count)
    dtype = ds.precision(training.precision)
    settings = ds.deepspeed_config(
        training, process.count, shape.micro_samples * recipe.views, shape.accumulation, dtype
    )
    check_samples(samples, recipe, read_config(inputs["teacher"]))
    check_builds(training.deepspeed)

    with contextlib.ExitStack() as stack:
        # 2. Rank 0 holds the folder's lease and chooses the checkpoint that all processes resume from
        finished, found, still_held = None, None, None
        if process.first:
            still_held = stack.enter_context(lease.held(folder))
            finished = stage.done  # by another run meanwhile
            found = None if finished else resuming.newest_whole(folder / CHECKPOINTS)
        ds.join(process)
        stack.callback(ds.leave)
        finished, found = ds.from_first((finished, found), process)
        if finished:
            return finished

        # 3. Student and engine
        torch.manual_seed(training.seed)
        student = load_student(inputs["teacher"], training, dtype, process)
        train_steps = training.train_steps or math.ceil((training.epochs or 0) * len(samples) / shape.samples)
        done = found.train_step if found else 0
        if found and found.precision != ds.dtype_name(dtype) and process.first:
            log.warning("trained in %s before, goes on in %s", found.precision, ds.dtype_name(dtype))
        state_file = folder / CHECKPOINTS / found.state_file if found else None
        engine = ds.start_engine(student, training.optimizer, train_steps, settings, done, state_file)

        own = None
        if recipe.rollouts is not None:
            adapted_model(student).config.attention_pattern = recipe.attention  # `generate` reads it
            own = OwnResponses(recipe.rollouts, samples, training.seed, process)
            if found:
                own.load(folder / CHECKPOINTS / found.tag)

        # 4. Train and save the adapter
        trainer = Trainer(config, samples, shape, engine, process, folder, train_steps, still_held, own)
        trainer.train(done)
        files = ds.save_adapter(engine, folder / "adapter", process)
        if process.first:
            stage.finish(
                files=[f"adapter/{name}" for name in files],
                counts={**counts, "train_steps": train_steps},
                metrics=last_metrics(folder),
                details={"processes": process.count, "precision": ds.dtype_name(dtype)},
            )
        torch.distributed.barrier()
        return read_manifest(folder)


def load_student(
    teacher: str, training: TrainingConfig, dtype: torch.dtype, process: ds.Process
) -> PeftModel:
    """The teacher in the training's dtype with a new adapter, on its final device if possible.

    Models that are quantized or partitioned are loaded on the host and moved weight by weight.
    """
    whole = training.quantization is None and zero_stage(training.deepspeed) < 3
    model = load_model(teacher, device=process.device if whole else "cpu", dtype=dtype)
    if training.quantization is not None:
        quantize(model, process.device)
    student = attach(model, training.lora).to(dtype)
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return student


@dataclass(frozen=True)
class Trainer:
    """The training loop; its state is held by the engine and by the files in `folder`."""

    config: StudentConfig
    samples: Samples
    shape: StepShape
    engine: ds.DeepSpeedEngine
    process: ds.Process
    folder: Path
    train_steps: int
    still_held: Callable[[], None] | None = None  # raises StageError if the folder's lease was lost
    own: OwnResponses | None = None  # in recipes with `rollouts`

    def train(self, done: int) -> None:
        """Run the train steps after step `done`."""
        training = self.config.training
        if self.process.first:
            metrics_log.cut_back(self.folder / METRICS, done)
            log.info(
                "training %d steps of %d samples (%d views) from step %d, %d samples to draw from",
                self.train_steps,
                self.shape.samples,
                training.views_per_step,
                done + 1,
                len(self.samples),
            )
        self.engine.train()
        progress = Progress(log, self.train_steps, done)
        logged_at = time.perf_counter()
        tokens, logged = 0.0, ""
        for train_step in range(done + 1, self.train_steps + 1):
            logging_step = train_step % training.log_every == 0 or train_step in (1, self.train_steps)
            metrics = self.step(train_step, logging_step)
            tokens += metrics.pop("tokens")
            if logging_step and self.process.first:
                now = time.perf_counter()
                metrics["tokens_per_second"] = tokens / (now - logged_at)
                metrics["peak_memory_bytes"] = peak_memory_bytes()
                metrics_log.append(self.folder / METRICS, {"train_step": train_step, **metrics})
                logged = f"; at step {train_step} {described(metrics)}"
                tokens, logged_at = 0.0, now
            if self.process.first:
                step = f"step {train_step} of {self.train_steps}: loss {metrics['loss']:.4f}"
                progress.tell(train_step, step + logged)
            if train_step % training.checkpoint_every == 0 or train_step == self.train_steps:
                if self.still_held is not None:
                    self.still_held()
                save_more = None if self.own is None else self.own.save
                ds.save_checkpoint(
                    self.engine, self.folder / CHECKPOINTS, train_step, self.process, save_more
                )

    def step(self, train_step: int, with_entropies: bool) -> dict[str, float]:
        """Run one optimizer step; returns its metrics, averaged over all processes."""
        # 1. Inputs of this step: the recipe at this point of the training, samples, dropout seed
        seed, rank, model = self.config.training.seed, self.process.rank, self.engine.module.config
        progress = (train_step - 1) / max(1, self.train_steps - 1)
        recipe = self.config.recipe.at(progress, self.samples.gen_length)
        torch.manual_seed(dropout_seed(seed, train_step, rank))
        learning_rate, device = self.engine.get_lr()[0], self.engine.device
        student = self.engine.module
        samples = self.samples if self.own is None else self.own.at(train_step, student)

        # 2. Forward and backward passes of this process; the last engine.step updates the weights
        losses = torch.zeros(len(Loss._fields), dtype=torch.float64, device=device)
        entropies = torch.zeros(3, dtype=torch.float64, device=device)  # student, teacher, positions
        tokens = 0
        for batch in step_batches(
            samples, recipe, self.shape, model, seed, train_step, rank, self.process.count
        ):
            tokens += batch.tokens
            batch = batch.to(device)
            if recipe.own_tokens is not None:
                divided = self.engine.zero_optimization_partition_weights()
                batch = with_own_tokens(student, batch, model.mask_token_id, divided)
            teacher = teacher_logits(student, batch) if recipe.asks_teacher else None
            logits = self.engine(**batch.student_inputs)
            terms = loss(logits, batch, recipe, teacher)
            self.engine.backward(terms.loss)
            losses += torch.stack([term.detach() for term in terms]) / self.shape.accumulation
            if with_entropies:
                if teacher is None or batch.asked is not None:  # it did not read the student's canvases
                    teacher = base_logits(student, batch.full_inputs)
                entropies += entropy_sums(logits.detach(), teacher)
            self.engine.step()

        # 3. Sums over all processes, and means
        losses /= self.process.count
        reduced = ds.all_reduce(torch.cat([losses, entropies, losses.new_tensor([tokens])])).tolist()
        total, cross_entropy, certainty, divergence, student_entropy, teacher_entropy, positions, tokens = (
            reduced
        )
        norm = ds.gradient_norm(self.engine)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise DivergedError(
                f"train_step {train_step}: loss {total}, gradient norm {norm}; this step was not saved. "
                f"Lower training.optimizer.learning_rate ({learning_rate:.3g} here) and start anew"
            )
        metrics = {"loss": total, "cross_entropy": cross_entropy, "certainty": certainty}
        if recipe.near_far is not None:
            metrics["divergence"] = divergence
        if with_entropies:
            metrics["teacher_entropy"] = teacher_entropy / max(positions, 1)
            metrics["student_entropy"] = student_entropy / max(positions, 1)
        return {**metrics, "grad_norm": norm, "learning_rate": learning_rate, "tokens": tokens}


@torch.no_grad()
def entropy_sums(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Over the N positions read: sum of the student's entropy, sum of the teacher's entropy, N."""
    sums = [entropy(student_logits).sum(), entropy(teacher_logits).sum()]
    return torch.stack([*sums, sums[0].new_tensor(len(student_logits))])


def last_metrics(folder: Path) -> dict[str, float]:
    """Metrics of the last record; empty if the file was lost after the last train step."""
    records = metrics_log.read(folder / METRICS)
    return {name: value for name, value in records[-1].items() if name != "train_step"} if records else {}


def peak_memory_bytes() -> int:
    """Peak memory of the device, or on a CPU of the process (`ru_maxrss` is in KiB on Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def described(metrics: dict[str, float]) -> str:
    """What is measured only at the steps of the metrics log, for a message of progress."""
    return (
        f"entropy {metrics['student_entropy']:.3f} (teacher {metrics['teacher_entropy']:.3f}), "
        f"{metrics['tokens_per_second']:.0f} tokens/s"
    )

"""Train a tiny model from scratch on worked solutions of an embedded task.

The model is the teacher or its autoregressive counterpart of the same shape, which differ in the objective
only.
"""

import logging
import math
import random
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dparallel.config.teacher import TeacherConfig
from dparallel.decoding.generate import check_prompts, generate
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import save_model
from dparallel.models.threads import fitting_threads
from dparallel.problems.embedded import EOS, EmbeddedTask, embedded_task, split_of
from dparallel.problems.prompts import finish
from dparallel.stages import lease, metrics_log
from dparallel.stages.files import naming_the_file, replacing
from dparallel.stages.manifest import Manifest, Stage
from dparallel.stages.metrics_log import METRICS
from dparallel.stages.origin import Origin
from dparallel.stages.progress import Progress
from dparallel.tiny.objectives import OBJECTIVES
from dparallel.tiny.tokenizer import build_tokenizer

log = logging.getLogger(__name__)

LOG_EVERY, CHECKPOINT_EVERY = 50, 500


def batch(task: EmbeddedTask[Any], rows: int, step: int, seed: int) -> tuple[Tensor, int]:
    """Newly drawn solutions: input_ids (B, P + G), and the prompt length P, given by `seed` and `step`."""
    rng = random.Random(f"solutions/{seed}/{step}")
    token_id = {word: index for index, word in enumerate(task.vocabulary)}
    input_ids: list[list[int]] = []
    while len(input_ids) < rows:
        problem = task.draw_problem(rng)
        if split_of(problem) != "train":
            continue
        prompt = problem.prompt.split()
        response = task.draw_solution(problem, rng).split()
        response += [EOS] * (task.response_length - len(response))
        input_ids.append([token_id[word] for word in prompt + response])
    return torch.tensor(input_ids), len(prompt)


def learning_rate_factor(step: int, steps: int, warmup: int = 50, constant: float = 0.4) -> float:
    """Warm-up, constant up to 40 % of the steps, then linear decay to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / (steps * (1 - constant)))


def optimizers(model: DiffusionTransformer) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embedding, head and norms."""
    hidden = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in hidden}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def run_stage(
    config: TeacherConfig, inputs: dict[str, str], out_dir: str | Path, origin: Origin | None = None
) -> Manifest:
    """Train the teacher, test it on validation problems, and save it with its tokenizer.

    An interrupted run resumes from its last checkpoint.

    Args:
        origin: the run that the stage belongs to.

    Raises:
        LeaseHeldError: another run works in this folder.
        UserError: the model's shape does not fit the task's prompts and responses; raised before training.
        RuntimeError: the loss is not finite, or the accuracy of the trained model is below `min_accuracy`.
    """
    stage = Stage("teacher", config, inputs, out_dir, origin)
    if done := stage.done:
        return done
    with lease.held(stage.folder):
        return stage.done or _train(config, stage)  # finished by another run meanwhile


def _train(config: TeacherConfig, stage: Stage) -> Manifest:
    task = embedded_task(config.task)
    tokenizer = build_tokenizer(config.task)
    torch.manual_seed(config.seed)
    model = DiffusionTransformer(
        DiffusionConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            predicts_next=OBJECTIVES[config.objective].predicts_next,
            attention_pattern=OBJECTIVES[config.objective].attention_pattern,
        )
    )
    decoding = OBJECTIVES[config.objective].decoding(config)
    problems = list(islice(task.problems("validation", config.seed), config.check_problems))
    prompts = tokenizer([problem.prompt for problem in problems]).input_ids
    check_prompts(model, prompts, decoding)  # before hours of training
    with fitting_threads(model, config.batch_size):
        train(model, config, stage.folder)
        generations = generate(model.eval(), prompts, decoding)
    responses = [finish(each.tokens, tokenizer, (tokenizer.eos_token_id,)) for each in generations]
    accuracy = sum(map(task.solution_is_valid, problems, responses)) / len(problems)
    if accuracy < config.min_accuracy:
        raise RuntimeError(
            f"the teacher solves {accuracy:.1%} of {config.check_problems} validation problems, less than "
            f"min_accuracy={config.min_accuracy:.1%}; raise train_steps={config.train_steps}"
        )
    files = save_model(model, stage.folder, tokenizer=tokenizer)
    (stage.folder / "checkpoint.pt").unlink(missing_ok=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    weights = [name for name in files if not name.endswith(".py")]  # model code comes from the package
    return stage.finish(
        weights, counts={"parameters": parameters}, metrics={"validation_solution_accuracy": accuracy}
    )


def train(model: DiffusionTransformer, config: TeacherConfig, folder: Path) -> None:
    """Train `model` in place, resuming from the checkpoint in `folder` if there is one."""
    optimizer = optimizers(model)
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(part, lambda step: learning_rate_factor(step, config.train_steps))
        for part in optimizer
    ]
    first = _resume(folder / "checkpoint.pt", model, [*optimizer, *schedule])
    metrics_log.cut_back(folder / METRICS, first)
    task = embedded_task(config.task)
    progress, losses = Progress(log, config.train_steps, first), []
    model.train()
    for step in range(first, config.train_steps):
        loss = training_loss(model, *batch(task, config.batch_size, step, config.seed), config, step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss is {losses[-1]} at train step {step + 1}; lower the learning rates")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizer:
            part.step()
            part.zero_grad()
        for scheduler in schedule:
            scheduler.step()
        done = step + 1
        if done % LOG_EVERY == 0 or done == config.train_steps:
            mean = sum(losses) / len(losses)
            progress.tell(done, f"train step {done} of {config.train_steps}: loss {mean:.4f}")
            metrics_log.append(folder / METRICS, {"train_step": done, "loss": mean})
            losses.clear()
        if done % CHECKPOINT_EVERY == 0:
            _checkpoint(folder / "checkpoint.pt", done, model, [*optimizer, *schedule])


def training_loss(
    model: DiffusionTransformer, input_ids: Tensor, prompt_length: int, config: TeacherConfig, step: int
) -> Tensor:
    """Mean cross-entropy of a batch (B, P + G) over the positions that the objective reads."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    view = OBJECTIVES[config.objective].view(input_ids, prompt_length, config, model.config, generator)
    logits = model(view.canvas, logits_at=view.read, levels=view.levels)
    return F.cross_entropy(logits, input_ids[view.read])


def _checkpoint(path: Path, step: int, model: DiffusionTransformer, others: list) -> None:
    state = {"step": step, "model": model.state_dict(), "others": [other.state_dict() for other in others]}
    with naming_the_file(path), replacing(path) as file:
        torch.save(state, file)


def _resume(path: Path, model: DiffusionTransformer, others: list) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for other, saved in zip(others, state["others"], strict=True):
        other.load_state_dict(saved)
    return state["step"]

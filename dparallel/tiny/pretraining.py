"""Trains the tiny teacher from scratch: masked diffusion on worked solutions of the coins task.

Half of the rows mask the whole response at a ratio t, as LLaDA's pre-training does; the other
half are semi-autoregressive views, as decoding sees them: earlier blocks clean, one block noised,
later blocks all masks and out of the loss. Plain cross-entropy over the masked tokens: weighting
by 1/t only adds noise at this size.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dparallel.models.backbone import DiffusionTransformer
from dparallel.tiny import coins


def solution_batches(batch_size: int, seed: int, token_id: dict[str, int]) -> Iterator[tuple[Tensor, int]]:
    """Endless batches of (input_ids (B, P + G), prompt length P), freshly drawn solutions."""
    rng = random.Random(f"solutions/{seed}")
    while True:
        rows = []
        while len(rows) < batch_size:
            problem = coins.draw_problem(rng)
            if coins.split_of(problem) != "train":
                continue
            prompt = problem.prompt.split()
            response = coins.draw_solution(problem, rng).split()
            response += [coins.EOS] * (coins.RESPONSE_LENGTH - len(response))
            rows.append([token_id[word] for word in prompt + response])
        yield torch.tensor(rows), len(prompt)


def noise(rows: int, gen_length: int, block_length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which response positions are masked, and which of them the loss reads: bool (B, G) each."""
    ratio = 0.1 + 0.9 * (torch.rand(1, generator=generator) + torch.arange(rows) / rows).remainder(1)
    ratio = ratio[torch.randperm(rows, generator=generator)]  # stratified over the batch
    masked = torch.rand(rows, gen_length, generator=generator) < ratio[:, None]
    block = torch.randint(gen_length // block_length, (rows,), generator=generator)
    block_of = torch.arange(gen_length) // block_length
    view = torch.arange(rows) % 2 == 0  # semi-autoregressive rows
    earlier = view[:, None] & (block_of < block[:, None])
    later = view[:, None] & (block_of > block[:, None])
    masked = (masked & ~earlier) | later
    return masked, masked & ~later


def learning_rate_factor(step: int, steps: int, warmup: int = 50, constant: float = 0.4) -> float:
    """Warm-up, constant to 40 % of the steps, then linear to zero."""
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


def pretrain(
    model: DiffusionTransformer,
    token_id: dict[str, int],
    steps: int,
    batch_size: int,
    block_length: int,
    seed: int,
    log: Path,
    log_every: int = 50,
    on_log=None,
) -> None:
    """Train `model` in place; appends a line to `log` every `log_every` steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizers(model)
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: learning_rate_factor(step, steps))
        for each in optimizer
    ]
    start = time.perf_counter()
    losses = []
    batches = solution_batches(batch_size, seed, token_id)
    model.train()
    for step in range(1, steps + 1):
        input_ids, prompt_length = next(batches)
        gen_length = input_ids.shape[1] - prompt_length
        masked, read = noise(batch_size, gen_length, block_length, generator)
        masked = F.pad(masked, (prompt_length, 0))
        read = F.pad(read, (prompt_length, 0))
        canvas = input_ids.masked_fill(masked, model.config.mask_token_id)
        loss = F.cross_entropy(model(canvas, logits_at=read), input_ids[read])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizer:
            each.step()
            each.zero_grad()
        for each in schedule:
            each.step()
        losses.append(loss.item())
        if step % log_every == 0:
            seconds = time.perf_counter() - start
            record = {"train_step": step, "loss": sum(losses) / len(losses), "seconds": seconds}
            losses.clear()
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if on_log:
                on_log(step, model)

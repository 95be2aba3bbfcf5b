"""Workloads for timing: the tiny teacher with its problems, or random weights of a given shape."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.hardware import weight_count
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding.canvas import Generation
from dparallel.evaluation.metrics import accuracy
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer, read_config
from dparallel.problems.judging import score
from dparallel.problems.prompts import finish, render_all
from dparallel.problems.registry import load_problems

TEACHER = Path(__file__).parents[2] / "teachers" / "tiny"
TEACHER_DECODING = DecodingConfig(
    gen_length=36, block_length=12, rule="entropy", threshold=0.6, stop_at_eos=False
)


@dataclass(frozen=True)
class Workload:
    """A model and what it decodes.

    Attributes:
        build: creates the model on a device in a dtype, with the same weights each time.
        prompts: returns the given number of prompts.
        decoding: sequential, without cache and without stopping at EOS, as published.
        accuracy: accuracy on the first prompts and its standard error; None for random weights, whose
            responses are meaningless and never end early.
        weights: number of weights.
        large: whether compilation takes minutes and float32 is an order of magnitude slower.
    """

    build: Callable[[torch.device, torch.dtype], DiffusionTransformer]
    prompts: Callable[[int], list[list[int]]]
    decoding: DecodingConfig
    accuracy: Callable[[Sequence[Generation]], tuple[float, float]] | None
    weights: int
    large: bool


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model and of its decoding; `steps` fixes the NFE, so that rows are comparable."""

    config: DiffusionConfig
    prompt_length: int
    gen_length: int
    block_length: int
    steps: int
    large: bool = False


def _config(
    size: int,
    layers: int,
    heads: int,
    feed_forward: int,
    vocabulary: int,
    rope_theta: float = 10_000.0,
    **more: Any,
) -> DiffusionConfig:
    return DiffusionConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        rope_theta=rope_theta,
        mask_token_id=vocabulary - 1,
        **more,
    )


SHAPES = {
    "llada-8b": Shape(_config(4096, 32, 32, 12288, 126464, 5e5), 128, 256, 32, steps=64, large=True),
    "dream-7b": Shape(
        _config(3584, 28, 28, 18944, 152064, 1e6, num_key_value_heads=4, qkv_bias=True, rms_norm_eps=1e-6),
        128,
        256,
        32,
        steps=64,
        large=True,
    ),
    "llada-8b-1000th": Shape(_config(256, 8, 4, 768, 2304), 8, 16, 8, steps=4),
    "wide-vocabulary": Shape(_config(256, 4, 4, 704, 32768), 32, 64, 32, steps=16),
    "tiny-8l": Shape(_config(256, 8, 4, 704, 4096), 32, 64, 16, steps=16),
    "tiny-2l": Shape(_config(64, 2, 4, 160, 256), 8, 16, 8, steps=8),
}


def teacher_workload() -> Workload:
    """The tiny teacher on the validation problems of the coins task."""
    tokenizer = load_tokenizer(TEACHER)

    def problems(count: int) -> ProblemsConfig:
        return ProblemsConfig(benchmark="coins", split="validation", count=count)

    def prompts(count: int) -> list[list[int]]:
        config = problems(count)
        return render_all(load_problems(config), config.protocol, tokenizer)

    def judged(generations: Sequence[Generation]) -> tuple[float, float]:
        config = problems(len(generations))
        texts = [
            finish(generation.tokens, tokenizer, (tokenizer.eos_token_id,)) for generation in generations
        ]
        verdicts = score(load_problems(config), texts, config.protocol)
        return accuracy([bool(verdict.metrics["solution"]) for verdict in verdicts])

    return Workload(
        build=lambda device, dtype: load_model(TEACHER, device, dtype),
        prompts=prompts,
        decoding=TEACHER_DECODING,
        accuracy=judged,
        weights=weight_count(read_config(TEACHER)),
        large=False,
    )


def random_workload(shape: Shape) -> Workload:
    """Random weights and prompts."""

    def prompts(count: int) -> list[list[int]]:
        numbers = torch.Generator().manual_seed(0)
        vocabulary = shape.config.mask_token_id  # all ids below the mask token
        return torch.randint(vocabulary, (count, shape.prompt_length), generator=numbers).tolist()

    decoding = DecodingConfig(
        gen_length=shape.gen_length,
        block_length=shape.block_length,
        rule="steps",
        steps=shape.steps,
        stop_at_eos=False,
    )
    return Workload(
        build=lambda device, dtype: random_model(shape.config, device, dtype),
        prompts=prompts,
        decoding=decoding,
        accuracy=None,
        weights=weight_count(shape.config),
        large=shape.large,
    )


def random_model(config: DiffusionConfig, device: torch.device, dtype: torch.dtype) -> DiffusionTransformer:
    """Random weights drawn on the device in bf16, so that all dtypes have the same values."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = DiffusionTransformer(config)
    finally:
        torch.set_default_dtype(usual)
    return model.to(dtype).eval()  # type: ignore[arg-type]


def several_blocks(decoding: DecodingConfig, vocabulary: int) -> DecodingConfig:
    """A variant of `decoding` with several active blocks.

    The rule `steps` has a schedule per block, so it is replaced by an entropy budget that commits the same
    number of tokens per forward pass with random weights.
    """
    if decoding.rule != "steps":
        return changed(decoding, mode="multi_block")
    assert decoding.steps is not None
    budget = ignorance(decoding.gen_length / decoding.steps, vocabulary)
    return changed(decoding, mode="multi_block", rule="entropy_budget", steps=None, threshold=budget)


def ignorance(predictions: float, vocabulary: int) -> float:
    """Sum of entropies in nats of `predictions` uniform predictions, which random weights make."""
    return predictions * math.log(vocabulary)


def changed(decoding: DecodingConfig, **changes: object) -> DecodingConfig:
    """A validated copy with changes; settings that the changes make invalid must be changed as well."""
    return DecodingConfig(**{**decoding.model_dump(), **changes})

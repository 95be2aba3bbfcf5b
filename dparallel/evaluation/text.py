"""From texts to token ids and back."""

from collections.abc import Sequence
from typing import Any

from dparallel.config import DecodingConfig
from dparallel.decoding import check_prompts
from dparallel.evaluation.benchmarks import Problem
from dparallel.manifest import digest
from dparallel.models.backbone import DiffusionTransformer


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one prompt, as a user's turn where the tokenizer brings a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def encode_problems(
    problems: Sequence[Problem], tokenizer: Any, model: DiffusionTransformer, decoding: DecodingConfig
) -> list[list[int]]:
    """Token ids of every prompt, all of them fit to be decoded.

    Raises:
        ValueError: naming the first problem whose prompt this model cannot decode, and why.
    """
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        try:
            check_prompts(model, [prompt], decoding)
        except ValueError as error:
            raise ValueError(f"problem {problem.problem_id} ({problem.source}): {error}") from error
    return prompts


def decode_response(tokenizer: Any, tokens: Sequence[int], eos_token_id: int | None) -> str:
    """The text before the first end-of-text token.

    Other special tokens stay visible: one in the middle of a solution is an error to be scored.
    """
    content = list(tokens)
    if eos_token_id in content:
        content = content[: content.index(eos_token_id)]
    return tokenizer.decode(content, skip_special_tokens=False)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The same for tokenizers of the same vocabulary, special tokens and chat template."""
    return digest(
        {
            "vocabulary": tokenizer.get_vocab(),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }
    )

"""From texts to token ids and back."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding.generate import check_prompts
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.sources import Problem
from dparallel.stages.manifest import digest

Messages = list[dict[str, str]]  # `role` (user, assistant) and `content` of each, as chat templates take them


class ChatTemplateError(UserError):
    """No chat template, or one that refuses a conversation; the message names the remedy."""


def check_chat_template(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template, so it knows no turns: put a "
            "chat_template.jinja beside its tokenizer"
        )


def encode_chat(tokenizer: Any, messages: Messages, template: str | None = None) -> list[int]:
    """Token ids of a conversation that awaits the assistant.

    Args:
        template: Jinja text to use instead of the tokenizer's own.

    Raises:
        ChatTemplateError: there is no template, or it refuses this conversation or makes nothing of it.
    """
    if template is None:
        check_chat_template(tokenizer)
    try:
        tokens = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template refuses this conversation: {error}") from error
    except Exception as error:  # a template is a program, and may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ChatTemplateError(f"the chat template fails on this conversation: {reason}") from error
    if not tokens:
        raise ChatTemplateError("the chat template makes an empty prompt of this conversation: correct it")
    return tokens


def encode_prompt(tokenizer: Any, prompt: str, chat: bool, template: str | None = None) -> list[int]:
    """Token ids of one prompt: with `chat` as a user's turn, else the text as it is.

    A token that the tokenizer puts in front of every text is not put before one that begins with it.
    """
    if not chat:
        tokens, plain = tokenizer.encode(prompt), tokenizer.encode(prompt, add_special_tokens=False)
        doubled = plain[:1] == tokens[:1] and tokens[1 : len(plain) + 1] == plain
        return tokens[1:] if doubled else tokens
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], template)


def encode_problems(
    config: ProblemsConfig,
    problems: Sequence[Problem],
    tokenizer: Any,
    model: DiffusionTransformer,
    decoding: DecodingConfig,
) -> list[list[int]]:
    """Token ids of every prompt, all of them fit to be decoded.

    Raises:
        ChatTemplateError: the problems are chat turns and there is no usable template.
        ValueError: naming the first problem whose prompt this model cannot decode, and why.
    """
    template = _read_template(config, tokenizer)
    prompts = []
    for problem in problems:
        where = f"problem {problem.problem_id} ({problem.source})"
        try:
            prompt = encode_prompt(tokenizer, problem.prompt, config.chat, template)
            check_prompts(model, [prompt], decoding)
        except ChatTemplateError as error:
            named = config.chat_template or tokenizer.name_or_path or "the tokenizer"
            raise ChatTemplateError(f"{where}: {error} (template of {named})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        prompts.append(prompt)
    return prompts


def _read_template(config: ProblemsConfig, tokenizer: Any) -> str | None:
    """The text of `chat_template`; None leaves it to the tokenizer, which then must have its own."""
    if config.chat_template is not None:
        try:
            return Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"chat_template={config.chat_template}: {error}") from error
    if config.chat:
        try:
            check_chat_template(tokenizer)
        except ChatTemplateError as error:
            raise ChatTemplateError(
                f"{error}, give chat_template: FILE to these problems, or chat: false"
            ) from error
    return None


def decode_response(tokenizer: Any, tokens: Sequence[int], end_token_ids: Sequence[int]) -> str:
    """The text before the first token that ends a text or a turn.

    Other special tokens stay visible: one in the middle of a solution is an error to be scored.
    """
    content = list(takewhile(lambda token: token not in end_token_ids, tokens))
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

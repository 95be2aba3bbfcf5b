"""Render problems to token ids, and decode responses to text."""

from collections.abc import Collection, Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProtocolConfig
from dparallel.decoding.generate import check_prompts, longest_first
from dparallel.decoding.stops import before_end
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.problems.stops import cut
from dparallel.problems.vocabulary import warn_of_unknown_words
from dparallel.stages.manifest import digest

Messages = list[dict[str, str]]  # chat turns with `role` (system, user, assistant) and `content`


PLAIN_TEXT = ProtocolConfig()


class ChatTemplateError(UserError):
    """The chat template is missing or rejects a conversation; the message names the remedy."""


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ChatTemplateError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template, so it cannot write turns: "
            "put a chat_template.jinja beside its tokenizer"
        )


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str | None = None
) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's next turn.

    Args:
        template: Jinja text that replaces the tokenizer's template.

    Raises:
        ChatTemplateError: there is no template, it rejects the conversation, or its output is empty.
    """
    text = chat_text(tokenizer, messages, template)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    warn_of_unknown_words(tokenizer, [text], [ids])
    return ids


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str | None) -> str:
    """Text of a conversation, up to the start of the assistant's next turn; raises ChatTemplateError."""
    if template is None:
        check_chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template refuses this conversation: {error}") from error
    except Exception as error:  # a template is a program and may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ChatTemplateError(f"the chat template fails on this conversation: {reason}") from error
    assert isinstance(text, str)
    if not text.strip():
        raise ChatTemplateError("the chat template makes an empty prompt of this conversation: correct it")
    return text


def render(problem: Problem, protocol: ProtocolConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a problem in the format of its protocol; the response follows directly after them.

    Raises:
        ChatTemplateError: the protocol uses a chat, but the template is missing or fails.
    """
    return render_all([problem], protocol, tokenizer)[0]


def render_all(
    problems: Sequence[Problem], protocol: ProtocolConfig, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """`render` for many problems at once.

    Tokens that the tokenizer adds before a text (BOS) are added once; tokens it adds after a text (EOS) are
    not added, because the response follows.
    """
    if not problems:
        return []
    template = _read_template(protocol, tokenizer)
    texts = [_ask(problem, protocol, tokenizer, template) for problem in problems]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    warn_of_unknown_words(tokenizer, texts, ids)
    if protocol.chat:  # chat templates write BOS themselves
        return ids
    front = front_tokens(tokenizer, next(filter(str.strip, texts), "a"))
    return [tokens if tokens[: len(front)] == front else front + tokens for tokens in ids]


def _ask(
    problem: Problem, protocol: ProtocolConfig, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> str:
    """Prompt text of a problem, including the prefilled start of the response.

    BOS in front of one of its parts moves to the beginning of the whole.
    """
    bos = tokenizer.bos_token or ""
    assert isinstance(bos, str)
    system = [] if protocol.system is None else [protocol.system]
    asked = [example.user for example in protocol.examples]
    parts = [*system, *(text for _, text in problem.turns), *asked, problem.prompt]
    begin = bos if bos and any(part.startswith(bos) for part in parts) else ""
    system, asked = ([part.removeprefix(begin) for part in some] for some in (system, asked))
    prompt = problem.prompt.removeprefix(begin)
    answers = [example.assistant for example in protocol.examples]
    shown = [question + answer for question, answer in zip(asked, answers, strict=True)]
    if not protocol.chat:
        return begin + protocol.separator.join([*system, *shown, prompt]) + problem.prefill
    messages: Messages = [{"role": "system", "content": text} for text in system]
    messages += [{"role": role, "content": text.removeprefix(begin)} for role, text in problem.turns]
    if protocol.examples_as == "text":
        prompt = protocol.separator.join([*shown, prompt])
    else:
        for question, answer in zip(asked, answers, strict=True):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt})
    try:
        text = chat_text(tokenizer, messages, template) + problem.prefill
        return begin + text.removeprefix(begin)
    except ChatTemplateError as error:
        named = protocol.chat_template or tokenizer.name_or_path or "the tokenizer"
        raise ChatTemplateError(f"{problem.where}: {error} (template of {named})") from error


def front_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens that a tokenizer adds before a text, found by an example: `text`."""
    whole = tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def encode_problems(
    problems: Sequence[Problem],
    protocol: ProtocolConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: DiffusionTransformer,
    decoding: DecodingConfig,
) -> list[list[int]]:
    """`render_all`, with a check that the model can decode every prompt.

    Raises:
        ChatTemplateError: the protocol uses a chat, but there is no usable template.
        ProblemsError: names a problem whose prompt the model cannot decode, the longest one first, and the
            reason; what makes it fit makes the others fit.
    """
    prompts = render_all(problems, protocol, tokenizer)
    try:
        check_prompts(model, prompts, decoding)
    except UserError:
        for place in longest_first(prompts):
            try:
                check_prompts(model, [prompts[place]], decoding)
            except UserError as error:
                raise ProblemsError(f"{problems[place].where}: {error}") from error
        raise
    return prompts


def _read_template(protocol: ProtocolConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Content of `chat_template`; None if the tokenizer's template is used, which must then exist."""
    if protocol.chat_template is not None:
        try:
            return Path(protocol.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"protocol.chat_template={protocol.chat_template}: {error}") from error
    if protocol.chat:
        try:
            check_chat_template(tokenizer)
        except ChatTemplateError as error:
            raise ChatTemplateError(
                f"{error}, give protocol.chat_template: FILE to these problems, or protocol.chat: false"
            ) from error
    return None


def finish(
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    stops: Sequence[str] = (),
) -> str:
    """Text of a response, up to its first end token and its first stop text.

    Other special tokens remain in the text, so that they count as errors in scoring. The prefilled start of
    the response (`Problem.prefill`) is not included; scorers that need the whole text prepend it.

    Args:
        tokens: token ids of the response.
        end_token_ids: end-of-sequence and end-of-turn tokens.
        stops: stop texts, none of them empty.
    """
    text = tokenizer.decode(list(before_end(tokens, end_token_ids)), skip_special_tokens=False)
    assert isinstance(text, str)
    return cut(text, stops)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary, special tokens and chat template."""
    return digest(
        {
            "vocabulary": tokenizer.get_vocab(),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }
    )

"""`dparallel chat`: a conversation, turn by turn."""

import sys
from collections.abc import Callable
from typing import Any

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import check_prompts
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import ChatTemplateError, Messages, check_chat_template, encode_chat


class ChatError(UserError):
    """A model that cannot converse, or a turn that cannot be decoded; the message names the remedy."""


def check_can_chat(tokenizer: Any) -> None:
    try:
        check_chat_template(tokenizer)
    except ChatTemplateError as error:
        raise ChatError(f"{error}, or use `dparallel generate --prompt`") from error


def turn_prompt(
    messages: Messages, tokenizer: Any, model: DiffusionTransformer, decoding: DecodingConfig
) -> list[int]:
    """Token ids of a conversation that awaits the assistant.

    Raises:
        ChatError: a conversation that the template refuses or the model has no room for.
    """
    try:
        tokens = encode_chat(tokenizer, messages)
        check_prompts(model, [tokens], decoding)
    except ValueError as error:
        raise ChatError(f"{error}, or forget the conversation with /reset; this turn was dropped") from error
    return tokens


def converse(respond: Callable[[Messages], str]) -> None:
    """Read turns from stdin until its end or `/exit`; `respond` shows and returns each answer.

    A turn that fails or is interrupted leaves the conversation as it was.
    """
    messages: Messages = []
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        import readline  # noqa: F401  (gives `input` line editing and a history)

        _say("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C interrupts an answer.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line == "/exit":
                return
            if line == "/reset":
                messages = []
                _say("The conversation is forgotten.")
            elif line:
                turn = [*messages, {"role": "user", "content": line}]
                messages = [*turn, {"role": "assistant", "content": respond(turn)}]
        except EOFError:
            return
        except ChatError as error:
            _say(str(error))
        except KeyboardInterrupt:
            _say("\nInterrupted; nothing was added to the conversation. /exit or Ctrl-D ends it.")


def _say(text: str) -> None:
    print(text, file=sys.stderr)

"""`dparallel chat`: a conversation, turn by turn."""

import sys
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from dparallel.config import DecodingConfig
from dparallel.decoding import check_prompts
from dparallel.models.backbone import DiffusionTransformer

Messages = list[dict[str, str]]  # `role` (user, assistant) and `content` of each, as chat templates take them


class ChatError(ValueError):
    """A model that cannot converse, or a turn that cannot be decoded; the message names the remedy."""


def check_chat_template(name: str, tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise ChatError(
            f"{name} has no chat template, so it knows no turns: use `dparallel generate --prompt`, or add "
            "a chat_template to its tokenizer"
        )


def turn_prompt(
    messages: Messages, tokenizer: Any, model: DiffusionTransformer, decoding: DecodingConfig
) -> list[int]:
    """Token ids of a conversation that awaits the assistant.

    Raises:
        ChatError: a conversation that the template refuses or the model has no room for.
    """
    try:
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        check_prompts(model, [tokens], decoding)
    except (TemplateError, ValueError) as error:
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

"""`dparallel chat`: a conversation in the terminal."""

import argparse
import sys
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from dparallel.cli.model import answer, open_decoding, open_model, open_tokenizer, text_of
from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import DecodingError, check_prompts
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import ChatTemplateError, Messages, check_chat_template, encode_chat


class ChatError(UserError):
    """The model cannot chat, or a turn cannot be decoded; the message names the remedy."""


def chat(options: argparse.Namespace) -> None:
    """Run a conversation on stdin and stdout; see `converse`."""
    decoding = open_decoding(options)
    tokenizer = open_tokenizer(options)
    check_can_chat(tokenizer)
    model = open_model(options)

    def respond(messages: Messages) -> str:
        prompt = turn_prompt(messages, tokenizer, model, decoding)
        try:
            response = answer(model, tokenizer, prompt, decoding, options.plain, options.stop)
            return text_of(response, tokenizer, model.config, options.stop)
        except DecodingError as error:  # not enough memory: the conversation continues without this turn
            raise ChatError(f"{error}; this turn was dropped") from error

    converse(respond)


def check_can_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ChatError if the tokenizer has no chat template."""
    try:
        check_chat_template(tokenizer)
    except ChatTemplateError as error:
        raise ChatError(f"{error}, or use `dparallel generate --prompt`") from error


def turn_prompt(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    model: DiffusionTransformer,
    decoding: DecodingConfig,
) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's next turn.

    Raises:
        ChatError: the chat template rejects the conversation, or it is too long for the model.
    """
    try:
        tokens = encode_chat(tokenizer, messages)
        check_prompts(model, [tokens], decoding)
    except UserError as error:
        raise ChatError(f"{error}, or clear the conversation with /reset; this turn was dropped") from error
    return tokens


def converse(respond: Callable[[Messages], str]) -> None:
    """Read turns from stdin until its end or `/exit`; `respond` shows and returns each response.

    A turn that fails or is interrupted does not change the conversation.
    """
    messages: Messages = []
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        import readline  # noqa: F401  (gives `input` line editing and a history)

        _say("/reset clears the conversation, /exit or Ctrl-D ends it, Ctrl-C interrupts an answer.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line == "/exit":
                return
            if line == "/reset":
                messages = []
                _say("The conversation is cleared.")
            elif line:
                _check_text(line)
                turn = [*messages, {"role": "user", "content": line}]
                messages = [*turn, {"role": "assistant", "content": respond(turn)}]
        except EOFError:
            return
        except ChatError as error:
            _say(str(error))
        except KeyboardInterrupt:
            _say("\nInterrupted; nothing was added to the conversation. /exit or Ctrl-D ends it.")


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:  # invalid bytes of stdin are read as surrogates
        raise ChatError(f"this line is not a text in UTF-8 ({error}); this turn was dropped") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)

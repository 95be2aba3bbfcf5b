"""Prompts to token ids, and committed tokens to text that can be sent before the response is finished."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from dparallel.problems.prompts import Messages, chat_text, finish, front_tokens
from dparallel.problems.stops import cut

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoded in place of the first bytes of a character


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, mask_token_id: int) -> list[int]:
    """Token ids of a text, with the tokens that the tokenizer adds in front, once."""
    ids = encode_plain(tokenizer, text, mask_token_id)
    front = front_tokens(tokenizer, "a")
    return ids if ids[: len(front)] == front else front + ids


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, mask_token_id: int, template: str | None = None
) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's next turn.

    Raises:
        ChatTemplateError: there is no template, or it rejects the conversation.
    """
    return encode_plain(tokenizer, chat_text(tokenizer, messages, template), mask_token_id)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, mask_token_id: int) -> list[int]:
    """Token ids of a text, in which the mask token's text is ordinary text, without tokens in front."""
    mask = tokenizer.convert_ids_to_tokens([mask_token_id])[0]
    if not mask or mask not in text:
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids: list[int] = []
    for place, part in enumerate(text.split(mask)):
        if place:
            plain = tokenizer.encode(mask, add_special_tokens=False, split_special_tokens=True)
            ids += [token for token in plain if token != mask_token_id]
        ids += tokenizer.encode(part, add_special_tokens=False) if part else []
    return ids


class TextStream:
    """The text of a response as it is committed; what was sent once stays as it is."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int], stops: Sequence[str] = ()
    ):
        self.tokenizer, self.end_token_ids, self.stops = tokenizer, end_token_ids, stops
        self.sent = ""
        self.stopped = False  # whether the text was cut at a stop text
        self._tokens: list[int] = []

    def push(self, tokens: Sequence[int], final: bool = False) -> str:
        """What the committed `tokens`, all of them from the first on, add to the text.

        Characters whose last bytes are not committed, and what may be the beginning of a stop text, are held
        back, unless the response is finished.
        """
        if not final and len(tokens) == len(self._tokens):
            return ""
        self._tokens = list(tokens)
        whole = finish(tokens, self.tokenizer, self.end_token_ids)
        text = cut(whole, self.stops)
        self.stopped = text != whole
        if not final:
            text = text[: _sure(text, self.stops)]
        if not text.startswith(self.sent):  # later tokens may still complete it
            return ""
        added, self.sent = text[len(self.sent) :], text
        return added


def _sure(text: str, stops: Sequence[str]) -> int:
    """Length of the beginning of `text` that no further token and no stop text can change."""
    end = len(text.rstrip(REPLACEMENT))
    longest = max(map(len, stops), default=0)
    return next(
        (
            start
            for start in range(max(0, end - longest + 1), end)
            if any(stop.startswith(text[start:end]) for stop in stops)
        ),
        end,
    )

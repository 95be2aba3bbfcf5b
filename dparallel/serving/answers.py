"""Objects of OpenAI's API: responses, chunks of streams, and models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import modes_of
from dparallel.decoding.stops import before_end
from dparallel.rules.rules import RULES
from dparallel.serving.engine import Served
from dparallel.serving.jobs import Draft, Finished, Progress
from dparallel.serving.texts import TextStream


@dataclass
class Choice:
    """A response of a request, as far as it is committed."""

    index: int
    served: Served
    stops: Sequence[str]
    finished: Finished | None = None
    said: int = 0  # tokens whose log-probabilities were sent
    text: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self.text = TextStream(self.served.tokenizer, self.ends, self.stops)

    @property
    def ends(self) -> list[int]:
        return list(self.served.model.config.end_token_ids)

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        if self.finished is None:
            return None
        ended = bool(self.finished.tokens) and self.finished.tokens[-1] in self.ends
        return "stop" if ended or self.text.stopped else "length"

    def take(self, event: Progress | Finished) -> str:
        """What an event adds to the text."""
        if isinstance(event, Finished):
            self.finished = event
        return self.text.push(event.tokens, final=self.finished is not None)

    def new_logprobs(self, event: Progress | Finished) -> list[tuple[int, float]]:
        """Tokens and log-probabilities at commit that an event adds, without the end token."""
        tokens = before_end(event.tokens, self.ends)
        added = zip(tokens[self.said :], event.confidence[self.said : len(tokens)], strict=True)
        self.said = max(self.said, len(tokens))
        return [(token, math.log(confidence) if confidence > 0 else -9999.0) for token, confidence in added]

    def token_text(self, token: int) -> str:
        return str(self.served.tokenizer.decode([token], skip_special_tokens=False))


@dataclass(frozen=True)
class Answer:
    """What all objects of one answer have in common."""

    id: str
    created: int
    model: str
    chat: bool
    logprobs: bool

    def _object(self, kind: str, choices: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **further}

    def whole(
        self, choices: Sequence[Choice], events: Sequence[Finished], prompt_tokens: int
    ) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        shown = []
        for choice, event in zip(choices, events, strict=True):
            text = choice.take(event)
            entry: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
            entry["logprobs"] = self._logprobs(choice, event)
            if self.chat:
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                entry["text"] = text
            shown.append(entry)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, shown, usage=usage(prompt_tokens, events))

    def first_chunk(self, choice: Choice, decoding: DecodingConfig | None) -> dict[str, Any] | None:
        """What is known before the first forward pass: the role in a chat, and `decoding`; None if neither.

        Args:
            decoding: how the choice is decoded, if the stream says it.
        """
        if not self.chat and decoding is None:
            return None
        entry: dict[str, Any] = {"index": choice.index}
        entry |= {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": ""}
        if decoding is not None:
            entry["decoding"] = decoding.model_dump(mode="json")
        return self._chunk(entry)

    def chunk(self, choice: Choice, event: Progress | Finished, canvas: bool) -> dict[str, Any] | None:
        """What a forward pass added to a choice; None if there is nothing to say."""
        text, logprobs = choice.take(event), self._logprobs(choice, event)
        drafted = event.draft if canvas else None
        if not text and drafted is None and choice.finished is None and not _any(logprobs):
            return None
        entry: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        entry["logprobs"] = logprobs
        if self.chat:
            entry["delta"] = {"content": text} if text else {}
        else:
            entry["text"] = text
        if drafted is not None:
            entry["canvas"] = _canvas(choice, drafted)
        return self._chunk(entry)

    def usage_chunk(self, prompt_tokens: int, events: Sequence[Finished]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind, [], usage=usage(prompt_tokens, events))

    def _chunk(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry = {"finish_reason": None, "logprobs": None, **entry}
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [entry])

    def _logprobs(self, choice: Choice, event: Progress | Finished) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        added = [(choice.token_text(token), logprob) for token, logprob in choice.new_logprobs(event)]
        if self.chat:
            return {
                "content": [
                    {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                    for text, logprob in added
                ],
                "refusal": None,
            }
        return {
            "tokens": [text for text, _ in added],
            "token_logprobs": [logprob for _, logprob in added],
            "top_logprobs": None,
            "text_offset": None,
        }


def _any(logprobs: dict[str, Any] | None) -> bool:
    return logprobs is not None and bool(logprobs.get("content") or logprobs.get("tokens"))


def _canvas(choice: Choice, draft: Draft) -> dict[str, Any]:
    return {
        "forward": draft.denoise_step,
        "positions": draft.positions,
        "token_ids": draft.tokens,
        "tokens": [choice.token_text(token) for token in draft.tokens],
        "confidences": draft.confidences,
        "committed": draft.committed,
    }


def usage(prompt_tokens: int, events: Sequence[Finished]) -> dict[str, Any]:
    """Tokens, forward passes and tokens per forward pass (TPF), summed over the choices, and the longest
    of their times from taking a row to the end."""
    tokens, nfe = sum(len(event.tokens) for event in events), sum(event.nfe for event in events)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "nfe": nfe,
        "tokens_per_forward": tokens / nfe if nfe else 0.0,
        "decode_seconds": max((event.seconds for event in events), default=0.0),
    }


def model_object(served: Served, created: int, template: str | None) -> dict[str, Any]:
    """A model of `/v1/models`: what requests may ask of it, and how it decodes by default.

    Args:
        template: chat template instead of that of the tokenizer.
    """
    config = served.model.config
    fitted = served.model.commit_rule is not None
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "dparallel",
        "max_model_len": config.max_position_embeddings,
        "end_token_ids": list(config.end_token_ids),
        "chat": template is not None or served.tokenizer.chat_template is not None,
        "modes": modes_of(config.attention_pattern),
        "rules": [name for name, rule in RULES.items() if fitted or not rule.needs_weights],
        "decoding": served.decoding.model_dump(mode="json"),
    }

"""Decodings replayed in an HTML page, one forward pass at a time: the data and the drawing of all pages."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Step
from dparallel.models.token_texts import token_texts
from dparallel.pages import canvas
from dparallel.pages.html import inline_json, part, template

DIGITS = 4


class Replays:
    """The decodings of a page.

    Args:
        readings: whether forward passes are given with all their predictions; otherwise only the tokens that
            each of them committed are known.
    """

    def __init__(self, readings: bool):
        self.readings = readings
        self.rows: list[dict[str, Any]] = []
        self._words: dict[tuple[str, bool], int] = {}  # (text, whether it ends a response) -> index
        self._decodings: dict[DecodingConfig, int] = {}

    def add(
        self,
        *,
        subject: str,
        label: str,
        prompt: str,
        decoding: DecodingConfig,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Sequence[int],
        tokens: Sequence[int],
        commit_step: Sequence[int],
        confidence: Sequence[float],
        nfe: int,
        num_tokens: int,
        steps: Sequence[Step] | None = None,
    ) -> int:
        """Add a decoding; returns its index.

        Args:
            subject: what was decoded, such as the model's name.
            label: its name in the list of decodings.
            tokens, commit_step, confidence, nfe, num_tokens: see `decoding.canvas.Generation`; a negative
                `commit_step` marks a token of given text.
            steps: its forward passes in order; by default made from the commits.
        """

        def word(token: int) -> int:
            entry = str(tokenizer.decode([token])), token in end_token_ids
            return self._words.setdefault(entry, len(self._words))

        if steps is None:
            steps = _commits(tokens, commit_step, confidence, nfe)
        forwards = [
            {
                "offsets": step.offsets,
                "words": [word(token) for token in step.tokens],
                "probability": _rounded(step.probability),
                "entropy": _rounded(step.entropy),
                "commit": [int(commit) for commit in step.commit],
            }
            for step in steps
        ]
        self.rows.append(
            {
                "subject": subject,
                "label": label,
                "prompt": prompt,
                "decoding": self._decodings.setdefault(decoding, len(self._decodings)),
                "words": [word(token) for token in tokens],
                "pieces": token_texts(tokenizer, tokens),
                "commit_step": list(commit_step),
                "confidence": _rounded(confidence),
                "num_tokens": num_tokens,
                "forwards": forwards,
            }
        )
        return len(self.rows) - 1

    def html(self, chooser: str) -> Markup:
        """The part of a page that replays; needs the page's style and `script`.

        Args:
            chooser: label of the list of decodings.
        """
        trace = {
            "readings": self.readings,
            "decodings": [
                {name: value for name, value in decoding.model_dump(mode="json").items() if value is not None}
                for decoding in self._decodings
            ],
            "ends": [place for place, (_, end) in enumerate(self._words) if end],
            "words": [text for text, _ in self._words],
            "rows": self.rows,
        }
        page = template(__package__, "replay.html")
        return Markup(page.render(chooser=chooser, readings=self.readings, data=inline_json(trace)))


def style() -> str:
    """The style sheet of a page that replays decodings."""
    return canvas.style() + part(__package__, "replay.css")


def script() -> str:
    """The script of a page that replays decodings."""
    return canvas.script() + part(__package__, "replay.js")


def _commits(
    tokens: Sequence[int], commit_step: Sequence[int], confidence: Sequence[float], nfe: int
) -> list[Step]:
    """Forward passes with what they committed; tokens filled in without a prediction are left out."""
    steps = []
    for number in range(nfe):
        offsets = [
            place for place, step in enumerate(commit_step) if step == number and confidence[place] > 0
        ]
        steps.append(
            Step(
                row=0,
                denoise_step=number,
                done=number == nfe - 1,
                offsets=offsets,
                tokens=[tokens[place] for place in offsets],
                probability=[confidence[place] for place in offsets],
                entropy=[],
                commit=[True] * len(offsets),
            )
        )
    return steps


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]

"""A self-contained HTML page that replays a decoding, one forward pass at a time."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from transformers import PreTrainedTokenizerBase

from dparallel.cli.display import token_texts
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation, Step
from dparallel.models.backbone import DiffusionConfig

DIGITS = 4


def trace_page(
    model_name: str,
    decoding: DecodingConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: DiffusionConfig,
    prompts: Sequence[str],
    generations: Sequence[Generation],
    steps: Sequence[Step],
    note: str | None = None,
) -> str:
    """The page as text; it loads no other resources.

    Args:
        prompts, generations: per row, in order.
        steps: all Steps reported by `generate`, in order.
        note: a sentence to show, such as that prompts were omitted.
    """
    words: dict[int, int] = {}  # token id -> index in the page's list of texts

    def word(token: int) -> int:
        return words.setdefault(token, len(words))

    forwards: list[list[dict[str, list]]] = [[] for _ in generations]
    for step in steps:
        forwards[step.row].append(
            {
                "offsets": step.offsets,
                "words": [word(token) for token in step.tokens],
                "probability": _rounded(step.probability),
                "entropy": _rounded(step.entropy),
                "commit": [int(commit) for commit in step.commit],
            }
        )
    rows = [
        {
            "prompt": prompt,
            "words": [word(token) for token in generation.tokens],
            "pieces": token_texts(tokenizer, generation.tokens),
            "commit_step": generation.commit_step,
            "confidence": _rounded(generation.confidence),
            "num_tokens": generation.num_tokens,
            "forwards": forwards[row],
        }
        for row, (prompt, generation) in enumerate(zip(prompts, generations, strict=True))
    ]
    trace = {
        "model": model_name,
        "note": note,
        "decoding": {name: value for name, value in decoding.model_dump().items() if value is not None},
        "ends": [word(token) for token in config.end_token_ids],
        "words": [tokenizer.decode([token]) for token in words],
        "rows": rows,
    }
    page = _part("page.html").replace("/*STYLE*/", _part("page.css")).replace("/*SCRIPT*/", _part("page.js"))
    return page.replace("/*TRACE*/", _inline_json(trace))  # last, so that the data is not modified


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]


def _inline_json(value: Any) -> str:
    """JSON that is safe inside HTML, for tokens such as `</script>` or `<!--`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

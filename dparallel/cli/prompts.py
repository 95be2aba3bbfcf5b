"""The prompts that `dparallel generate` reads and the lines that it writes, one JSON object each."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProtocolConfig
from dparallel.decoding.generate import check_prompts
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import render
from dparallel.problems.sources import Problem


class PromptError(UserError):
    """A prompt that cannot be read or decoded; the message names where it stands and the remedy."""


@dataclass(frozen=True)
class Request:
    """`where` names the prompt's place in messages; `record` is the JSON object it came in."""

    where: str
    prompt: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A response with its forwards and its number of tokens, as `Generation` counts them."""

    response: str
    nfe: int
    num_tokens: int


def result_line(request: Request, result: Result) -> str:
    """A line of JSON: the object read, and the result."""
    return json.dumps(request.record | asdict(result)) + "\n"


def read_requests(path: Path, prompt_field: str) -> list[Request]:
    """One request per line; blank lines are skipped.

    Args:
        path: a file, or `-` for stdin.

    Raises:
        PromptError: naming the file and the line that cannot be used.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if name == "stdin" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"--prompts {path}: {error.strerror}; give a readable JSONL file") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"--prompts {path}: not a text file in UTF-8 ({error})") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise PromptError(f"--prompts {path} holds no prompt; give one JSON object per line")
    return [_request(f"{name}, line {number}", line, prompt_field) for number, line in lines]


def _request(where: str, line: str, prompt_field: str) -> Request:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error}); write one object per line") from error
    if not isinstance(record, dict):
        raise PromptError(f"{where}: holds {type(record).__name__}, expected an object of fields")
    prompt = record.get(prompt_field)
    if not isinstance(prompt, str):
        found = f"is {prompt!r}, not a text" if prompt_field in record else "is missing"
        known = ", ".join(record) or "none"
        raise PromptError(f"{where}: field {prompt_field!r} {found}; its fields: {known}; see --prompt-field")
    if taken := [field.name for field in fields(Result) if field.name in record]:
        raise PromptError(f"{where}: field {taken[0]!r} would be overwritten by the result; rename it")
    return Request(where, prompt, record)


def encode(
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
    model: DiffusionTransformer,
    decoding: DecodingConfig,
    raw: bool,
) -> list[list[int]]:
    """Token ids of every prompt, all of them fit to be decoded.

    Args:
        raw: take the text as it is, even where the tokenizer has a chat template.

    Raises:
        PromptError: naming the first prompt that this model cannot decode, and why.
    """
    return [_encode(request, tokenizer, model, decoding, raw) for request in requests]


def _encode(
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    model: DiffusionTransformer,
    decoding: DecodingConfig,
    raw: bool,
) -> list[int]:
    if not request.prompt.strip():
        raise PromptError(f"{request.where}: the prompt is empty")
    try:
        request.prompt.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, or a byte of an argument
        raise PromptError(f"{request.where}: not a text in UTF-8 ({error})") from error
    protocol = ProtocolConfig(chat=not raw and tokenizer.chat_template is not None)
    try:
        tokens = render(Problem("1", request.where, request.prompt), protocol, tokenizer)
        check_prompts(model, [tokens], decoding)
    except UserError as error:
        raise PromptError(f"{request.where}: {error}") from error
    return tokens

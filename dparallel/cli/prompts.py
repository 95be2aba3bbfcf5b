"""Read prompts and format results of `dparallel generate`, one JSON object per line."""

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
from dparallel.decoding.generate import check_prompts, longest_first
from dparallel.models.backbone import DiffusionTransformer
from dparallel.problems.prompts import render_all
from dparallel.problems.sources import Problem


class PromptError(UserError):
    """A prompt cannot be read or decoded; the message names its location and the remedy."""


@dataclass(frozen=True)
class Request:
    """A prompt; `where` is its location for messages, `record` the JSON object that contained it."""

    where: str
    prompt: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A response with its number of forward passes and tokens, as in `Generation`."""

    response: str
    nfe: int
    num_tokens: int


def result_line(request: Request, result: Result) -> str:
    """A line of JSON: the request's object with the result added."""
    return json.dumps(request.record | asdict(result)) + "\n"


def read_requests(path: Path, prompt_field: str) -> list[Request]:
    """Read one request per line; blank lines are skipped.

    Args:
        path: a file, or `-` for stdin.
        prompt_field: name of the field with the prompt.

    Raises:
        PromptError: names the file and line that cannot be used.
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
    """Token ids of all prompts, checked to fit the model.

    Args:
        raw: encode the text without the tokenizer's chat template.

    Raises:
        PromptError: names a prompt that the model cannot decode, the longest one first, and the reason.
    """
    prompts = render(requests, tokenizer, raw)
    for place in longest_first(prompts):
        try:
            check_prompts(model, [prompts[place]], decoding)
        except UserError as error:
            raise PromptError(f"{requests[place].where}: {error}") from error
    return prompts


def render(requests: Sequence[Request], tokenizer: PreTrainedTokenizerBase, raw: bool) -> list[list[int]]:
    """Token ids of all prompts; raises a PromptError for one that is no text or fails in the template."""
    for request in requests:
        _check_text(request)
    protocol = ProtocolConfig(chat=not raw and tokenizer.chat_template is not None)
    problems = [Problem("1", request.where, request.prompt) for request in requests]
    try:
        return render_all(problems, protocol, tokenizer)
    except UserError as error:  # it names the request
        raise PromptError(str(error)) from error


def _check_text(request: Request) -> None:
    if not request.prompt.strip():
        raise PromptError(f"{request.where}: the prompt is empty")
    try:
        request.prompt.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, or an invalid byte of an argument
        raise PromptError(f"{request.where}: not a text in UTF-8 ({error})") from error

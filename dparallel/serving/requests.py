"""What a request asks of the decoding thread: its jobs, checked before any of them is queued."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dparallel.config.base import UserError, explain
from dparallel.config.decoding import DecodingConfig, combined
from dparallel.decoding.generate import check_ids, check_prompts, row_seed
from dparallel.decoding.infill import check_infill, fitted, gap_blocks
from dparallel.models.commit_rule import check_commit_rule
from dparallel.problems.stops import stop_at
from dparallel.serving.bodies import Body, ChatBody, CompletionBody
from dparallel.serving.engine import Served
from dparallel.serving.errors import RequestError
from dparallel.serving.jobs import Event, Job
from dparallel.serving.limits import Limits
from dparallel.serving.texts import encode_messages, encode_plain, encode_text

LENGTHS = ("gen_length", "block_length")


@dataclass(frozen=True)
class Row:
    """A response that is asked for: the arguments of a `Job` that come from the request."""

    prompt: list[int]
    decoding: DecodingConfig
    seed: int
    max_tokens: int | None
    gap: int | None

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the request gives."""
        return len(self.prompt) - (self.gap or 0)


def rows_of(body: Body, served: Served, limits: Limits, template: str | None = None) -> list[Row]:
    """The responses that a request asks for: the choices of the first prompt, then those of the next.

    Raises:
        RequestError: a field of the request, or its prompt, cannot be used with this model.
    """
    prompts = _encoded(body, served, template)
    if len(prompts) * body.n > limits.most_choices:
        raise RequestError(
            400,
            f"{len(prompts)} prompts with n={body.n} are {len(prompts) * body.n} responses: ask for at most "
            f"{limits.most_choices} in one request",
            param="n",
        )
    rows = []
    for prompt in prompts:
        gap = cut = None
        try:
            if isinstance(body, CompletionBody) and body.suffix:
                prompt, decoding, gap = _infill(body, served, prompt, limits)
            else:
                decoding, cut = _decoding(body, served, len(prompt), limits)
                check_prompts(served.model, [prompt], decoding)
            check_commit_rule(decoding, served.model.commit_rule)
        except UserError as error:
            raise RequestError(400, str(error), "invalid_prompt") from error
        for choice in range(body.n):
            seed = None if decoding.seed is None else (decoding.seed + choice) % 2**63
            without_seed = decoding.model_copy(update={"seed": None})
            rows.append(Row(prompt, without_seed, row_seed(seed, prompt), cut, gap))
    return rows


def job_of(row: Row, body: Body, served: Served, deadline: float, listen: Callable[[Event], None]) -> Job:
    """The job that decodes a row; `listen` gets its events in the decoding thread."""
    stop = stop_at(served.tokenizer, body.stop) if row.decoding.stop_at_eos else None  # an infill has none
    drafts = body.stream and body.stream_mode == "canvas"

    return Job(
        model=served.name,
        prompt=row.prompt,
        decoding=row.decoding,
        seed=row.seed,
        listen=listen,
        stop=stop,
        max_tokens=row.max_tokens,
        gap=row.gap,
        progress=body.stream,
        drafts=drafts,
        deadline=deadline,
    )


def _encoded(body: Body, served: Served, template: str | None) -> list[list[int]]:
    mask = served.model.config.mask_token_id
    try:
        if isinstance(body, ChatBody):
            turns = [message.turn for message in body.messages]
            return [encode_messages(served.tokenizer, turns, mask, template)]
        return [
            encode_text(served.tokenizer, prompt, mask) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]
    except UserError as error:
        raise RequestError(400, str(error), "invalid_prompt") from error


def _decoding(
    body: Body, served: Served, prompt_length: int, limits: Limits
) -> tuple[DecodingConfig, int | None]:
    """How a prompt is decoded, and the number of tokens after which the response is cut.

    The response's canvas has the default length, or more for a larger `max_tokens`. A default that does not
    fit after the prompt is lowered.
    """
    given = _given(body)
    decoding, most = _merged(served.decoding, given), body.most_tokens
    if "gen_length" not in given and most is not None and most > decoding.gen_length:
        decoding = _merged(served.decoding, given | {"gen_length": _rounded_up(most, decoding.block_length)})
    held = served.model.config.max_position_embeddings
    room = min(held, limits.context or held) - prompt_length
    asked = decoding.gen_length if "gen_length" in given else (most or 1)
    if asked > room:
        raise RequestError(
            400,
            f"the prompt has {prompt_length} tokens and the response up to {asked}, but at most "
            f"{prompt_length + room} fit together: shorten the prompt"
            + (f", or ask for at most {room} tokens" if room > 0 else ""),
            "context_length_exceeded",
            "messages" if isinstance(body, ChatBody) else "prompt",
        )
    if decoding.gen_length > room:
        whole_blocks = room // decoding.block_length * decoding.block_length
        shorter = {"gen_length": whole_blocks} if whole_blocks else dict.fromkeys(LENGTHS, room)
        decoding = _merged(served.decoding, given | shorter)
    return decoding, most if most is not None and most < decoding.gen_length else None


def _infill(
    body: CompletionBody, served: Served, prompt: list[int], limits: Limits
) -> tuple[list[int], DecodingConfig, int]:
    """Prompt, gap and suffix as a canvas, how it is decoded, and the length of the gap.

    The gap has `max_tokens` tokens, or the default length of a response.
    """
    config = served.model.config
    check_ids("the prompt", prompt, config)
    decoding = _merged(served.decoding, _given(body))
    gap = body.most_tokens or decoding.gen_length
    suffix = encode_plain(served.tokenizer, body.suffix, config.mask_token_id)
    room = min(config.max_position_embeddings, limits.context or config.max_position_embeddings)
    if (length := len(prompt) + gap + len(suffix)) > room:
        raise RequestError(
            400,
            f"the prompt and its suffix have {length - gap} tokens and the text between them {gap}, but at "
            f"most {room} fit together: shorten them, or ask for fewer tokens by max_tokens",
            "context_length_exceeded",
            "prompt",
        )
    canvas = [*prompt, *[config.mask_token_id] * gap, *suffix]
    check_infill(served.model, [canvas], decoding)
    return canvas, fitted(decoding, len(gap_blocks(canvas, config.mask_token_id, decoding))), gap


def _given(body: Body) -> dict[str, Any]:
    """The settings of decoding that a request gives."""
    given = body.knobs
    for name in ("temperature", "top_p", "seed"):
        if getattr(body, name) is not None:
            given[name] = getattr(body, name)
    return given


def _rounded_up(tokens: int, block_length: int) -> int:
    return -(-tokens // block_length) * block_length


def _merged(default: DecodingConfig, given: dict[str, Any]) -> DecodingConfig:
    settings = {**combined(given, default.stated()), "compile": False}
    if not settings.get("temperature"):  # they have no effect
        settings.pop("top_k", None)
    if not settings.get("temperature") or settings.get("top_p") == 1:
        settings.pop("top_p", None)
    try:
        return DecodingConfig.model_validate(settings)
    except ValidationError as error:
        raise RequestError(400, explain(error), "invalid_value", _named(error)) from error


def _named(error: ValidationError) -> str | None:
    place: Sequence[Any] = error.errors()[0]["loc"]
    return str(place[0]) if place else None

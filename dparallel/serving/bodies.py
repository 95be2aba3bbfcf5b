"""Bodies of requests: OpenAI's fields, and the settings of decoding beside them."""

import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveInt,
    StrictBool,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from dparallel.config.base import LIST, VALUE, Config, explain, form, plain_message
from dparallel.config.decoding import DecodingConfig
from dparallel.serving.errors import RequestError

# Settings of decoding that are fields of OpenAI's requests already, or not chosen by requests.
NOT_KNOBS = ("temperature", "top_p", "seed", "compile")
KNOBS = [name for name in DecodingConfig.model_fields if name not in NOT_KNOBS]
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields whose effect is not supported, with the values that have no effect.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

SECTION = re.compile(r"Input should be a section(, or the path of a config file)?")  # words of config files


class StreamOptions(Config):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # random padding against eavesdroppers; not sent


class TextPart(Config):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _no_other_part(cls, data: Any) -> Any:
        kind = data.get("type", "text") if isinstance(data, Mapping) else "text"
        if kind != "text":
            raise ValueError(
                f"a part of type={repr(kind)[:80]} is not supported: give text as "
                "{type: text, text: ...}, and leave other parts out"
            )
        return data


class Message(Config):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(VALUE)] | Annotated[list[TextPart], Tag(LIST)],
        Discriminator(form, "wrong_form", "Give a text, or a list of its parts"),
    ]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, data: Any) -> Any:
        """An assistant's turn that a client sends back has fields such as `refusal` and `tool_calls`."""
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value not in (None, []) and key != "name"}

    @property
    def turn(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _Common(Config):
    """Fields of both endpoints."""

    foreign: ClassVar[Mapping[str, str]] = DecodingConfig.foreign

    model: str | None = None
    max_tokens: PositiveInt | None = None
    temperature: NonNegativeFloat | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: PositiveInt = 1
    stop: list[str] = Field([], max_length=16)
    stream: StrictBool = False
    stream_options: StreamOptions = StreamOptions()
    stream_mode: Literal["text", "canvas"] = "text"

    @field_validator("stop", mode="before")
    @classmethod
    def _list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _drafts_are_streamed(self) -> "_Common":
        if self.stream_mode == "canvas" and not self.stream:
            raise ValueError("stream_mode='canvas' without stream: give stream: true as well")
        return self

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError(f"stop={stop!r}: a stop text is empty: leave it out")
        return stop

    @property
    def knobs(self) -> dict[str, Any]:
        """The settings of decoding that the request gives; `DecodingConfig` checks their values."""
        given = {name: getattr(self, name) for name in KNOBS}
        return {name: value for name, value in given.items() if value is not None}


if TYPE_CHECKING:
    _Body = _Common
else:  # a field for each setting; `DecodingConfig` checks the limits

    def _kind_of(name):
        kind = DecodingConfig.model_fields[name].annotation
        return StrictBool if kind is bool else kind

    _Body = create_model(
        "_Body",
        __base__=_Common,
        __module__=__name__,
        **{name: (_kind_of(name) | None, None) for name in KNOBS},
    )


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None
    logprobs: StrictBool = False

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionBody(_Body):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str = ""
    logprobs: int | None = Field(None, ge=0, le=1)

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_of_its_forms(cls, prompt: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """A mistake is said once, and not for every form that a prompt may have."""
        forms = "give a text, its token ids, or a list of at least one of them"
        try:
            read = handler(prompt)
        except ValidationError as error:
            own = [plain_message(each) for each in error.errors() if each["type"] == "value_error"]
            said = own[0] if own else f"{forms}, got {textwrap.shorten(repr(prompt), 80)}"
            raise ValueError(said) from None
        if read == []:
            raise ValueError(f"{forms}, got []")
        return read

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids, one for each response."""
        prompt: Any = self.prompt
        return list(prompt) if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]


def _is_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


Body = ChatBody | CompletionBody


def parse(kind: type[ChatBody] | type[CompletionBody], raw: bytes) -> Any:
    """The request in a body.

    Raises:
        RequestError: it is not JSON, or names the field that cannot be used.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})", "invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError(400, f"the body is {_kind(data)}, not an object of fields", "invalid_json")
    data = {name: value for name, value in data.items() if value is not None and name not in IGNORED}
    for name in [name for name in data if name in WITHOUT_EFFECT]:
        if not any(data[name] == value for value in WITHOUT_EFFECT[name]):
            raise RequestError(400, f"{name} is not supported: leave it out", "unsupported_parameter", name)
        del data[name]
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        message = SECTION.sub("Input should be an object", explain(error))
        raise RequestError(400, message, "invalid_value", _first_field(error)) from error


def _first_field(error: ValidationError) -> str | None:
    mistake = error.errors()[0]
    unknown = mistake.get("ctx", {}).get("unknown", [])
    return str(next(iter([*mistake["loc"], *unknown]), "")) or None


def _kind(data: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(data), "a number")

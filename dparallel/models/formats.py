"""Config fields and tensor names of the checkpoint formats: native, LLaDA and Dream.

All peculiarities of model families are handled here; the rest of the project uses one model class.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dparallel.config.base import UserError, plain_message
from dparallel.models import names
from dparallel.models.backbone import DiffusionConfig
from dparallel.models.names import Names
from dparallel.models.unsupported import unsupported


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message names the file, field or tensor."""


Count = Annotated[int, Field(ge=1, le=2**28)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Off = Literal[False] | None  # a switch that would select an unsupported architecture


class RopeParameters(BaseModel):
    """Rotary embedding settings as written by transformers 5; only the default type is supported."""

    model_config = ConfigDict(strict=True, extra="forbid")
    rope_type: Literal["default"] = "default"
    rope_theta: Positive | None = None


class Fields(BaseModel):
    """Fields of a config.json: those that are used, and those for which only one value is supported."""

    model_config = ConfigDict(strict=True)
    names: ClassVar[dict[str, str]] = {}  # field name -> name in the file, where they differ
    own_head_size: ClassVar[bool] = False  # whether head_dim may be another number than size / heads

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    max_position_embeddings: Count
    rope_theta: Positive | None = None
    rms_norm_eps: Positive
    tie_word_embeddings: bool | None = None
    mask_token_id: int
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    rope_parameters: RopeParameters | None = Field(None, exclude=True)
    rope_scaling: Off = Field(None, exclude=True)
    partial_rotary_factor: Literal[1] | None = Field(None, exclude=True)
    head_dim: int | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _one_rope_theta(self) -> "Fields":
        nested = self.rope_parameters.rope_theta if self.rope_parameters else None
        if self.rope_theta is None and nested is None:
            raise ValueError("no rope_theta, expected a number above 0")
        if None not in (self.rope_theta, nested) and self.rope_theta != nested:
            raise ValueError(
                f"rope_theta={self.rope_theta} and rope_parameters.rope_theta={nested}: drop one"
            )
        self.rope_theta = self.rope_theta or nested
        return self

    @model_validator(mode="after")
    def _whole_heads(self) -> "Fields":
        """Heads must divide the hidden size, head groups the heads, and rotary embeddings need even sizes."""
        shared = ("hidden_size", "num_attention_heads", "num_key_value_heads")
        of_size, of_heads, of_groups = (self.names.get(name, name) for name in shared)
        size, heads, groups = (getattr(self, name) for name in shared)
        stated = self.own_head_size and self.head_dim is not None
        if not stated and size % (2 * heads):
            raise ValueError(
                f"{of_size}={size} and {of_heads}={heads}, expected a multiple of twice the heads"
            )
        if groups and heads % groups:
            raise ValueError(f"{of_heads}={heads} and {of_groups}={groups}, expected a divisor of the heads")
        if stated and (self.head_dim or 0) % 2:
            raise ValueError(f"head_dim={self.head_dim}, expected an even number")
        if not stated and self.head_dim not in (None, size // heads):
            raise ValueError(
                f"head_dim={self.head_dim}; only {of_size} / {of_heads} = {size // heads} is known"
            )
        return self

    @abstractmethod
    def to_config(self) -> DiffusionConfig:
        """The model that these fields describe."""

    def _shared(self) -> dict[str, Any]:
        """Arguments of `DiffusionConfig` common to all formats."""
        return self.model_dump(include={*Fields.model_fields}, exclude_none=True)


class NativeFields(Fields):
    """The native format; other fields of the file, such as the dtype, are kept."""

    model_config = ConfigDict(extra="allow")
    own_head_size: ClassVar[bool] = True

    head_dim: Count | None = None
    qk_norm: bool | None = None
    qkv_bias: bool | None = None
    predicts_next: bool | None = None
    # Switches of other architectures, which a file may name only at the value that this model has.
    hidden_act: Literal["silu"] | None = None
    use_sliding_window: Off = None
    use_mrope: Off = None
    mlp_bias: Off = None

    def to_config(self) -> DiffusionConfig:
        return DiffusionConfig.from_dict(self.model_dump(exclude_none=True))


_LLADA_NAMES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}


class LladaFields(Fields):
    """Published LLaDA checkpoints."""

    names: ClassVar[dict[str, str]] = _LLADA_NAMES
    model_config = ConfigDict(alias_generator=lambda name: _LLADA_NAMES.get(name, name))

    embedding_size: Count | None = None
    include_qkv_bias: bool | None = None
    eos_token_id: int
    pad_token_id: int

    block_type: Literal["llama"] = "llama"
    activation_type: Literal["silu"] = "silu"
    layer_norm_type: Literal["rms"] = "rms"
    layer_norm_with_affine: Literal[True] = True
    bias_for_layer_norm: Off = None
    rope: Literal[True] = True
    rope_full_precision: Literal[True] = True
    alibi: Off = None
    include_bias: Off = None
    attention_layer_norm: Off = None
    multi_query_attention: Off = None
    input_emb_norm: Off = None
    scale_logits: Off = None
    clip_qkv: Off = None

    def to_config(self) -> DiffusionConfig:
        size = {"vocab_size": self.embedding_size or self.vocab_size}
        return DiffusionConfig(**self._shared() | size, qkv_bias=bool(self.include_qkv_bias), family="llada")


class DreamFields(Fields):
    """Published Dream checkpoints."""

    # Other architectures of this model_type are block-causal or do not predict the next token.
    architectures: Annotated[list[Literal["DreamModel"]], Field(min_length=1, max_length=1)] = ["DreamModel"]
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[True] = True  # for queries, keys and values; usually not stated
    use_mrope: Off = None
    use_sliding_window: Off = None

    def to_config(self) -> DiffusionConfig:
        # No field states it, but Dream's modeling code always adds biases to queries, keys and values.
        return DiffusionConfig(**self._shared(), qkv_bias=True, family="dream", predicts_next=True)


class Format(NamedTuple):
    """A checkpoint format: config fields and tensor names."""

    fields: type[Fields]
    names: Names
    family: str | None = None  # of its models, as `DiffusionConfig.family`; None for any


NATIVE = "dparallel"
FORMATS = {
    NATIVE: Format(NativeFields, names.NATIVE),
    "llada": Format(LladaFields, names.LLADA, "llada"),
    "Dream": Format(DreamFields, names.LLAMA, "dream"),
}


def publishers(family: str) -> dict[str, Format]:
    """The formats of a family's published models, by `model_type`; all formats for a family without one."""
    own = {name: known for name, known in FORMATS.items() if known.family == family}
    return own or {name: known for name, known in FORMATS.items() if known.family is not None}


def read_fields(raw: dict[str, Any], file: object) -> tuple[Format, DiffusionConfig]:
    """The format for the `model_type` in a config.json, and the model that its fields describe.

    Raises:
        CheckpointError: unknown format, or unsupported values of fields; the message names `file`.
    """
    known = FORMATS.get(str(raw.get("model_type")))
    if reason := unsupported(raw):
        raise CheckpointError(f"{file} {reason}; known: {', '.join(FORMATS)}")
    if known is None:
        raise CheckpointError(f"{file} has model_type={raw.get('model_type')!r}; known: {', '.join(FORMATS)}")
    try:
        return known, known.fields.model_validate(raw).to_config()
    except ValidationError as error:
        raise CheckpointError(f"{file} {_explain(error.errors()[0], raw)}") from error


def _explain(error: Any, raw: dict[str, Any]) -> str:
    """Describe a validation error: the field, the value found and the expected value."""
    if not error["loc"]:  # concerns several fields, which the message names
        return f"has {plain_message(error)}"
    field = str(error["loc"][0])
    if error["type"] == "missing" and field not in raw:
        return f"has no {field}, which a model of model_type={raw['model_type']!r} needs"
    shown = repr(raw[field])
    found = f"has {field}={shown if len(shown) <= 200 else shown[:200] + '…'}"
    if error["type"] == "extra_forbidden":
        return f"{found}, of which {error['loc'][-1]} is not known for {raw['model_type']}"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if error["type"] == "literal_error":
        return f"{found}; only {expected} is known for {raw['model_type']}"
    for words, shorter in (
        ("greater than or equal to", "at least"),
        ("greater than", "above"),
        ("less than or equal to", "at most"),
    ):
        expected = expected.replace(words, shorter)
    return f"{found}, expected {expected}"


def is_computed(name: str) -> bool:
    """Whether a tensor is derived from config.json, such as rotary frequencies stored by old code."""
    return name.endswith(".inv_freq")

"""Base class of all settings: strict numbers and texts, and one-line validation errors."""

import difflib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError

from dparallel.config.paths import shipped_files


class UserError(ValueError):
    """A mistake that the user can correct; the message names the value, the limit and the remedy.

    Commands print it as one line. Any other exception is a bug and keeps its traceback.
    """


class ConfigError(UserError):
    """An invalid configuration; the message names the key, the reason and a valid value."""


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class How:
    """Marks settings that affect speed, placement or batching, but not the result."""


HOW = How()  # used as `batch_size: Annotated[PositiveInt, HOW] = 64`


def explain(error: ValidationError, called: Callable[[str], str] = str) -> str:
    """Format all validation errors in one line, each as `key: what is wrong, got the value`.

    Args:
        called: maps a key to the name under which the user gave it, such as `--gen-length`.
    """
    return "; ".join(_explain(mistake, called) for mistake in error.errors()).replace("\0", "\\0")


def _explain(mistake: Any, called: Callable[[str], str]) -> str:
    """Format one entry of pydantic's `errors()`."""
    place = [str(part) for part in mistake["loc"] if part not in FORMS]
    message = plain_message(mistake)
    if mistake["type"] == "unknown_key":
        known, inner, foreign = (mistake["ctx"][name] for name in ("known", "inner", "foreign"))
        reasons = {
            key: foreign.get(key) or f"unknown key; {nearest(str(key), known, inner)}".strip()
            for key in mistake["ctx"]["unknown"]
        }
        unknown = [f"{called('.'.join([*place, str(key)]))}: {reason}" for key, reason in reasons.items()]
        if reasons.keys() <= foreign.keys():
            return "; ".join(unknown)
        return " ".join([*unknown, f"known: {', '.join(known)}"])
    if mistake["type"] == "value_error":  # raised by our validators, whose messages name the values
        return f"{called('.'.join(place))}: {message}" if place else message
    if mistake["type"] == "missing":
        return f"{called('.'.join(place))}: required key is missing"
    if mistake["type"] == "tuple_type":  # also raised for an override of one index of a list that is not set
        message = "Input should be a whole list"
    if mistake["type"] == "model_type":
        message = "Input should be a section"
    if mistake["type"] == "too_short":
        message = f"number of entries must be at least {mistake['ctx']['min_length']}"
    if mistake["type"] == "string_pattern_mismatch" and mistake["ctx"]["pattern"] == NAME_PATTERN:
        message = "must consist of letters, digits, _, - and ., and begin with a letter or a digit"
    key = called(".".join(place)) if place else "(top level)"
    given = textwrap.shorten(repr(mistake["input"]), 80)
    if mistake["type"] == "literal_error" and (known := re.findall("'([^']*)'", mistake["ctx"]["expected"])):
        near = nearest(str(mistake["input"]), known)
        return f"{key}: unknown value {given}; {near}known: {', '.join(known)}"
    if mistake["type"] in ("model_type", "dict_type") and isinstance(mistake["input"], str):
        kind = mistake.get("ctx", {}).get("class_name", place[-1] if place else "")
        return f"{key}: Input should be a section, or the path of a config file, got {given}" + _files(
            mistake["input"], kind
        )
    return f"{key}: {message}, got {given}"


def _files(given: str, kind: str) -> str:
    """The config files of the package that hold a section of a kind, such as `RecipeConfig`, with a hint."""
    folders = (f"{kind.removesuffix('Config').lower()}s/", f"{kind}/")
    known = [file for file in shipped_files() if file.startswith(folders)]
    if not known:
        return ""
    names = {file.rpartition("/")[2].partition(".")[0]: file for file in known}
    name = given.rpartition("/")[2].partition(".")[0]
    near = f"did you mean {names[name]!r}? " if name in names else nearest(name, names)
    return f"; {near}known: {', '.join(known)}"


# Forms of a setting, which are omitted from the location of a mistake.
VALUE, LIST, SECTION, RECIPE, ADAPTER = FORMS = ("<value>", "<list>", "<section>", "<recipe>", "<adapter>")


def form(value: Any) -> str:
    """Discriminator for settings that accept several forms, so that errors refer to the given form only."""
    if isinstance(value, Mapping | BaseModel):
        return SECTION
    return LIST if isinstance(value, list | tuple) else VALUE


def kind_of(settings: Mapping[str, Any]) -> str:
    """The `file_kind` whose settings have all these keys, if there is one; otherwise ""."""
    kinds = [
        kind for kind in Config.__subclasses__() if kind.file_kind and set(settings) <= set(kind.model_fields)
    ]
    return kinds[0].file_kind if len(kinds) == 1 else ""


def plain_message(mistake: Any) -> str:
    """Message of an entry of pydantic's `errors()`, without pydantic's prefix."""
    return str(mistake["msg"].removeprefix("Value error, "))


def nearest(name: str, known: Sequence[str] | Mapping[str, str], inner: Sequence[str] = ()) -> str:
    """A "did you mean" hint with the most similar known name, or "" if none is similar.

    If several known names begin with `name`, as `gsm8k` with its endings, the hint has all of them.

    Args:
        known: valid names at this level; of a mapping, the keys, for which the hint has the values.
        inner: dotted names of the keys one level below.
    """
    shown = known if isinstance(known, Mapping) else {path: path for path in known}
    longer = [shown[path] for path in shown if path.rpartition("/")[2].startswith(name)]
    longer = longer if len(name) > 2 else []
    if len(longer) > 1:
        return f"did you mean {', '.join(map(repr, longer[:-1]))} or {longer[-1]!r}? "
    names = {path.rpartition(".")[2]: path for path in inner} | dict(shown)
    swapped = [other for other in names if sorted(other) == sorted(name)]
    near = swapped or difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    return f"did you mean {names[near[0]]!r}? " if near else ""


def _refuse_text(value: Any, error: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise PydanticKnownError(error)
    return value


def _refuse_null_characters(value: Any) -> Any:
    if isinstance(value, str) and "\0" in value:
        shown = textwrap.shorten(repr(str(value)), 80)
        raise ValueError(f"{shown} holds a null character, which no path or text may hold: take it out")
    return value


STRICT: dict[str, Any] = {  # validators that run before pydantic's own conversion to the type
    "str": {"type": "no-info", "function": _refuse_null_characters},
    "int": {"type": "no-info", "function": lambda value: _refuse_text(value, "int_type")},
    "float": {"type": "no-info", "function": lambda value: _refuse_text(value, "float_type")},
}


def _strict(schema: Any) -> Any:
    """Make all numbers in `schema`, at any depth, reject text and booleans, and all texts null characters.

    1e3 remains a valid integer.
    """
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict) or schema.get("function") in STRICT.values():
        return schema
    kind = schema.get("type")
    if isinstance(kind, str) and kind in STRICT:  # else these are fields, of which one is called `type`
        return {"type": "function-before", "function": STRICT[kind], "schema": schema}
    return {key: part if key in ("metadata", "default") else _strict(part) for key, part in schema.items()}


class Config(BaseModel):
    """Base class of frozen settings. Numbers reject text and booleans, texts null characters; unknown keys
    are errors.

    Raises:
        ConfigError: raised by the constructor, with all mistakes in one line. `model_validate` and
            similar methods raise pydantic's ValidationError; `explain` formats it the same way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # Of settings that fill files: what such a file describes, and how it is given; for messages.
    file_kind: ClassVar[str] = ""
    # Names that others give to settings, with what to do instead; for messages about unknown keys.
    foreign: ClassVar[Mapping[str, str]] = {}

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    # Keeps pydantic from calling this constructor for nested settings, so that errors name the full key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        """Reject unknown keys here, where the known keys of this section are available for the message."""
        if isinstance(data, Mapping):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                inner = [
                    f"{name}.{key}"
                    for name, field in cls.model_fields.items()
                    if isinstance(field.annotation, type) and issubclass(field.annotation, Config)
                    for key in field.annotation.model_fields
                ]
                foreign = {key: cls.foreign[key] for key in unknown if key in cls.foreign}
                known = sorted(cls.model_fields)
                context = {"unknown": unknown, "known": known, "inner": inner, "foreign": foreign}
                raise PydanticCustomError("unknown_key", "unknown key {unknown}; known: {known}", context)
        return data

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _strict(handler(source))

    def how_names(self) -> set[str]:
        """Names of the settings that do not determine the result: those marked `HOW`."""
        return {name for name, field in type(self).model_fields.items() if HOW in field.metadata}

    def what(self) -> dict[str, Any]:
        """The settings that determine the result, as JSON values: all except `how_names`."""
        return _split(self, self.model_dump(mode="json"))[0]

    def how(self) -> dict[str, Any]:
        """The settings `how_names`, as JSON values; sections without such settings are omitted."""
        return _split(self, self.model_dump(mode="json"))[1]


def joined(what: Any, how: Any) -> Any:
    """All settings, as JSON values, from the two parts that `Config.what` and `Config.how` return."""
    if isinstance(what, dict):
        return what | {name: joined(what.get(name), part) for name, part in how.items()}
    if isinstance(what, list):
        return [joined(part, how.get(str(place), {})) for place, part in enumerate(what)]
    return how if what is None else what


def _split(value: Any, dumped: Any) -> tuple[Any, Any]:
    """Split a value into (what, how), recursively; `how` is an empty dict if all settings matter."""
    if isinstance(value, Config):
        marked = value.how_names()
        parts = [(name, getattr(value, name), part) for name, part in dumped.items()]
    elif isinstance(value, dict):
        marked = set()
        parts = [
            (name, inner, part) for inner, (name, part) in zip(value.values(), dumped.items(), strict=True)
        ]
    elif isinstance(value, tuple | list):
        both = [_split(inner, part) for inner, part in zip(value, dumped, strict=True)]
        how = {str(index): how for index, (_, how) in enumerate(both) if how}
        return [what for what, _ in both], how
    else:
        return dumped, {}
    what_parts, how_parts = {}, {}
    for name, inner, part in parts:
        what, how = ({}, part) if name in marked else _split(inner, part)
        if name not in marked:
            what_parts[name] = what
        if name in marked or how:
            how_parts[name] = how
    return what_parts, how_parts

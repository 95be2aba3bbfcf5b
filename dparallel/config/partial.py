"""Settings of which all are optional: what a form or a caller may give to override those of a config file."""

import inspect
import json
import re
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model

from dparallel.config.base import Config
from dparallel.config.files import quoted

UNPLAIN = re.compile(r"[\x7f-\x9f]")  # JSON may hold these characters as they are, YAML may not
ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


@cache
def partial_of(settings: type[Config]) -> type[BaseModel]:
    """A model with the same settings and limits as `settings`, at any depth, none of which is required.

    Its JSON schema has the descriptions of the docstrings. Sections of named parts, such as `students`, may
    be empty. What concerns several settings together is checked only when they override a config; see
    `overrides_of`.
    """
    texts = descriptions(settings)
    fields: dict[str, Any] = {}
    for name, info in settings.model_fields.items():
        kept = [limit for limit in info.metadata if not isinstance(limit, str)]
        if get_origin(info.annotation) is dict:  # an empty section changes nothing
            kept = [limit for limit in kept if not hasattr(limit, "min_length")]
        annotation = _partial(info.annotation)
        field = Field(default=None, description=texts.get(name), json_schema_extra=_as_in_form)
        fields[name] = (Annotated[annotation, *kept] if kept else annotation, field)
    return create_model(
        f"{settings.__name__}Overrides",
        __config__=ConfigDict(
            title=f"{settings.__name__.removesuffix('Config').removesuffix('Settings')} settings",
            extra="forbid",
            allow_inf_nan=False,
        ),
        __doc__=inspect.cleandoc(settings.__doc__ or "").split("\n\n")[0],
        **fields,
    )


def overrides_of(given: BaseModel | Mapping[str, Any] | None) -> list[str]:
    """What is set in a model of `partial_of`, or in its JSON values, as overrides `key.sub=value`.

    A null sets a setting to null, where null is one of its values; elsewhere the model and its JSON schema
    refuse it. An empty section changes nothing; a list, also an empty one, replaces the whole list.
    """
    values = given.model_dump(mode="json", exclude_unset=True) if isinstance(given, BaseModel) else given
    return [
        f"{key}={UNPLAIN.sub(_escaped, json.dumps(value, ensure_ascii=False))}"
        for key, value in _leaves(values or {})
    ]


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def descriptions(settings: type) -> dict[str, str]:
    """Descriptions of settings, by name, from the `Args` of the class's docstring."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, arguments = (inspect.getdoc(settings) or "").partition("Args:\n")
    for line in arguments.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        entry = ENTRY.match(line[4:]) if not line.startswith(" " * 5) else None
        if entry is not None:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):  # an empty one changes nothing
        return [
            leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}{quoted(str(key))}.")
        ]
    return [(prefix.removesuffix("."), value)]


def _partial(annotation: Any) -> Any:
    """An annotation with the models in it replaced by partial ones; those in lists stay whole."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return partial_of(annotation)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[_partial(inner[0]), *inner[1:]]
    if origin in (Union, types.UnionType):
        return Union[tuple(_partial(each) for each in inner)]  # noqa: UP007
    if origin is dict:
        return types.GenericAlias(dict, (inner[0], _partial(inner[1])))
    return annotation


def _as_in_form(schema: dict[str, Any]) -> None:
    """No default, as the file has the value, and null only where it is a value of the setting.

    Prefect's server takes null as a value of all settings that are not required and have one type.
    """
    schema.pop("default", None)
    if "type" in schema:
        schema["not"] = {"type": "null"}
    if "patternProperties" in schema:  # names of other patterns are none
        schema["additionalProperties"] = False

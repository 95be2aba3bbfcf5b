"""Settings from YAML files, with dotted overrides on top."""

import difflib
import textwrap
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dparallel.config.base import Config, ConfigError, plain_message

Loaded = TypeVar("Loaded", bound=Config)


def load_config(model: type[Loaded], path: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Read a YAML file, lay `key.sub=value` overrides over it, and validate.

    A value that is a string ending in `.yaml`, `.yml` or `.json` is replaced by that file's
    content (a path relative to the file that names it), so a recipe is written once and shared.

    Raises:
        ConfigError: naming the file, the key, the value and the remedy.
    """
    data = _read(Path(path))
    for override in overrides or []:
        data = _override(data, override, Path(path).parent)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: " + "; ".join(_explain(model, each) for each in error.errors())
        ) from error


def _read(path: Path, including: tuple[Path, ...] = ()) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file (looked in {Path.cwd()}); see configs/")
    if path.resolve() in including:
        raise ConfigError(f"{path} includes itself")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, expected keys and values")
    return _inline(data, path.parent, (*including, path.resolve()))


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _inline(value: Any, folder: Path, including: tuple[Path, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {key: _inline(each, folder, including) for key, each in value.items()}
    if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        return _read(folder / value, including)
    return value


def _override(data: dict, override: str, folder: Path) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = _inline(yaml.safe_load(text), folder)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value: {error}") from error
    return _replace(data, key.split("."), value, override)


def _replace(data: Any, keys: list[str], value: Any, override: str) -> dict:
    if not isinstance(data, dict):
        raise ConfigError(f"override {override!r}: {keys[0]!r} lies below a plain value, not a section")
    rest = _replace(data.get(keys[0], {}), keys[1:], value, override) if keys[1:] else value
    return {**data, keys[0]: rest}


def _explain(model: type[Config], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: unknown key; {hint}known: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: required key is missing"
    if error["type"] == "value_error":
        return f"{key}: {plain_message(error)}"
    return f"{key}: {plain_message(error)}, got {textwrap.shorten(repr(error['input']), 80)}"


def _fields_at(model: type[Config], location: tuple) -> list[str]:
    """The known keys of the section at `location`."""
    annotation: Any = model
    for part in location:
        if part == "[key]":  # the name itself was refused
            break
        if isinstance(annotation, type) and issubclass(annotation, Config):
            annotation = annotation.model_fields[part].annotation
        else:
            annotation = annotation.__args__[-1]  # dict[str, Section]: its values' section
    return sorted(annotation.model_fields)

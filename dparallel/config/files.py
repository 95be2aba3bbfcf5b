"""Load settings from YAML or JSON files, with dotted overrides."""

import contextlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dparallel.config.base import Config, ConfigError, explain, kind_of, nearest
from dparallel.config.paths import PATHS, Written, find_config, shipped_configs, shipped_files, written
from dparallel.config.roots import check_path

NAMED = ("students", "benchmarks", "sweeps", "fixed", "baselines", "columns")  # sections whose keys are names

INPUTS = ("path", "chat_template", "model", "adapter", "teacher")  # settings that are the path of an input
CONFIG_FILES = (".yaml", ".yml", ".json")
NAME_IN_KEY = re.compile(r'("(?:[^"\\]|\\.)*"|[^.=]*)([.=]|\Z)')  # and what ends it

Loaded = TypeVar("Loaded", bound=Config)


def load_config(model: type[Loaded], path: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Load a YAML (1.2) or JSON file, apply `key.sub=value` overrides, and validate.

    A string value that ends in `.yaml`, `.yml` or `.json` is replaced by the content of that file, except
    inside lists. Relative paths are relative to the file that holds them, and in overrides to the working
    folder. Config files that do not exist there are looked up among those that come with the package.
    Values of overrides are YAML; a number in their key is a list index, and a name in double quotes may
    contain dots: `students."v1.2".region=block`.

    Args:
        model: settings class to validate with.
        overrides: such as `["training.lora.rank=16", "sources.0.path=data.jsonl"]`.

    Raises:
        ConfigError: names the file, the key, the value and the remedy.
    """
    return make_config(model, read_settings(path), str(path), overrides)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file with its included files, not validated.

    Raises:
        ConfigError: names the file and the reason.
    """
    return _read(find_config(_path_of(os.fspath(path))))


def make_config(
    model: type[Loaded],
    settings: dict[str, Any],
    named: str,
    overrides: Sequence[str] | None = None,
) -> Loaded:
    """Apply overrides to settings, and validate.

    Args:
        named: name of the settings, for messages.
        overrides: as in `load_config`.

    Raises:
        ConfigError: starts with `named`, and names the key, the value and the remedy.
    """
    for override in overrides or []:
        settings = _override(settings, override)
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        if settings.keys() - model.model_fields.keys() and (kind := kind_of(settings)):
            what, _, use = kind.partition(": ")
            wanted = model.file_kind.partition(":")[0]
            raise ConfigError(f"{named}: is the file of {what}, not of {wanted}: {use}") from error
        raise ConfigError(f"{named}: {explain(error)}") from error


def with_inputs(
    settings: dict[str, Any], change: Callable[[str, str], str], section: str = ""
) -> dict[str, Any]:
    """Settings in which `change` is applied to the paths of all inputs: models and files of problems.

    Args:
        change: called with a key of `INPUTS` and its path.
        section: key of `settings`, as in `_included`.
    """

    def changed(key: str, value: Any) -> Any:
        if key in INPUTS and section not in NAMED and isinstance(value, str):
            return change(key, value)
        if key == "data_files" and isinstance(value, dict):
            return {split: change(key, path) for split, path in value.items()}
        if isinstance(value, list):
            return [changed("", part) for part in value]
        return with_inputs(value, change, key) if isinstance(value, dict) else value

    return {key: changed(key, value) for key, value in settings.items()}


def _path_of(text: str) -> Path:
    """The path of a config file, with the home folder in place of `~`."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r}: no file can have this name ({error.reason})") from None
    if "\0" in text:
        raise ConfigError(f"{text!r}: no file can have this name: take the null character out")
    return Path(os.path.expanduser(text))


def _read(path: Path, including: tuple[str, ...] = ()) -> dict[str, Any]:
    """Content of a file, with included files in place."""
    place = os.path.realpath(path)
    if place in including:
        raise ConfigError(f"{path} includes itself")
    check_path("config file", place)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(
            f"{path}: no such config file (looked in {Path.cwd()} and {shipped_configs()}){_similar(path)}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    data = parse_json(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, expected keys and values")
    return _included(data, path.parent, (*including, place))


def _similar(path: Path) -> str:
    """A "did you mean" hint with a config beside `path`, or one that comes with the package."""
    known = {Path(file).stem: file for file in shipped_files()}
    with contextlib.suppress(OSError):
        beside = [other for other in sorted(os.listdir(path.parent)) if other.endswith(CONFIG_FILES)]
        known |= {Path(other).stem: str(path.with_name(other)) for other in beside}
    stem = path.stem if path.suffix in CONFIG_FILES else path.name
    hint = f"did you mean {known[stem]!r}?" if stem in known else nearest(stem, known).strip()
    return f"; {hint}" if hint else ""


class _Constructor(SafeConstructor):
    """YAML 1.2 core types; dates are text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def parse_yaml(text: str, named: str) -> Any:
    """Parse one YAML 1.2 document of plain values: 0150 is 150, 1:30 and dates are text, 5e8 is a number.

    Raises:
        ConfigError: one line that starts with `named`.
    """
    try:
        yaml = YAML(typ="safe", pure=True, plug_ins=[])  # the C parser implements YAML 1.1
        yaml.Constructor = _Constructor
        data = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{named}: not valid YAML: {error.problem or error.context}{place}") from error
    except (YAMLError, ValueError, LookupError, RecursionError) as error:  # includes a wrong !!int or !!bool
        raise ConfigError(f"{named}: not valid YAML: {' '.join(str(error).split())}") from error
    return _plain(data, named)


def parse_json(text: str, named: str) -> Any:
    """Parse JSON; NaN and duplicate keys are errors.

    Raises:
        ConfigError: one line that starts with `named`.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{named}: not valid JSON: {error}") from error
    return _plain(data, named)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _plain(data: Any, named: str) -> Any:
    """Check that `data` can be stored as JSON: no set, no list within itself, no half surrogate pair."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{named}: holds what JSON cannot ({error})") from error
    return data


def _included(value: Any, folder: Path, including: tuple[str, ...] = (), section: str = "") -> Any:
    """`value`, with names of config files replaced by the content of these files, and other texts `Written`.

    Args:
        section: key of `value`. In sections of named parts, keys are the user's, such as a student `model`.
    """
    if isinstance(value, dict):
        return {
            key: written(part, folder)
            if key in PATHS and section not in NAMED
            else _included(part, folder, including, str(key))
            for key, part in value.items()
        }
    if isinstance(value, str) and not isinstance(value, Written) and value.endswith(CONFIG_FILES):
        return _read(find_config(_path_of(value), folder), including)
    return written(value, folder)


def split_override(override: str) -> tuple[list[str], str | None]:
    """The names in the key of an override `key.sub=value`, and its value; None if there is no `=`."""
    names: list[str] = []
    for found in NAME_IN_KEY.finditer(override):
        names.append(_unquoted(found[1]))
        if found[2] != ".":
            break
    return names, override[found.end() :] if found[2] == "=" else None


def quoted(name: str) -> str:
    """A name as it stands in the key of an override: in quotes if it could be read as something else."""
    return name if re.fullmatch(r'[^\s".=]+', name) else json.dumps(name, ensure_ascii=False)


def _unquoted(name: str) -> str:
    try:
        return str(json.loads(name)) if name.startswith('"') else name
    except ValueError:  # in no pair of quotes: no setting has this name
        return name


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    names, text = split_override(override)
    if text is None or names == [""]:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    value = parse_yaml(text, f"override {override!r}")
    return _included(_replace(data, _plain(names, f"override {override!r}"), value, override), Path.cwd())


def _replace(data: Any, keys: list[str], value: Any, override: str, above: str = "") -> Any:
    """A copy of `data` with `value` at the path `keys`; missing sections are created.

    Args:
        above: path of `data`, as it stands in the key of an override.
    """
    if not keys:
        return value
    if isinstance(data, list):
        index = _index(data, keys[0], override, above)
        part = _replace(data[index], keys[1:], value, override, f"{above}.{index}")
        return [*data[:index], part, *data[index + 1 :]]
    if not isinstance(data, dict):
        held = textwrap.shorten(json.dumps(data, ensure_ascii=False), 80)
        raise ConfigError(
            f"override {override!r}: {keys[0]!r} lies below a plain value, not a section: {above} is {held}; "
            f"replace it as a whole, as {_whole(above, keys)}, if it may be a section"
        )
    # Names of students and sweeps may contain dots: take the longest name that exists.
    length = next((end for end in range(len(keys), 1, -1) if ".".join(keys[:end]) in data), 1)
    name, rest = ".".join(keys[:length]), keys[length:]
    place = f"{above}.{quoted(name)}" if above else quoted(name)
    return {**data, name: _replace(data.get(name, {}), rest, value, override, place)}


def _index(data: list[Any], key: str, override: str, above: str) -> int:
    if not key.isdecimal() or int(key) >= len(data):
        valid = f"give an index from 0 to {len(data) - 1}" if data else "give the whole list"
        if not key.removeprefix("-").isdecimal():
            valid += f"; {above} is a list: to make it a section, replace it as a whole, as "
            valid += _whole(above, [key])
        raise ConfigError(f"override {override!r}: {key!r} in a list of {len(data)}: {valid}")
    return int(key)


def _whole(place: str, keys: list[str]) -> str:
    """An override of the section at `place` instead of one of the setting `keys` in it."""
    inner = "VALUE"
    for key in reversed(keys):
        inner = f"{{{quoted(key)}: {inner}}}"
    return f"'{place}={inner}'"

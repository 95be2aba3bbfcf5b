"""Decode defaults of a checkpoint: the settings of decoding that count where a caller states none.

They are part of the checkpoint, in generation_config.json under the key `dparallel`:

    {"decoding": {"block_length": 12, "rule": "entropy", "threshold": 0.5, …}, "chosen": {"benchmark": …}}

`decoding` holds settings of `DecodingConfig`; `chosen`, which is optional, says where they come from. What a
caller states counts first, then the settings of a config or protocol, then these, then the ones built in.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dparallel.config.base import ConfigError, explain
from dparallel.config.decoding import DecodingConfig, combined
from dparallel.config.modes import MODES
from dparallel.models.config_file import PATTERN
from dparallel.models.formats import CheckpointError
from dparallel.models.weights import read_json
from dparallel.stages.files import is_there, write_atomically
from dparallel.stages.generation_file import EMPTY, GENERATION, KEY, with_defaults

log = logging.getLogger(__name__)

DECODING, CHOSEN = "decoding", "chosen"
PLAIN = (str, int, float, bool)
REMEDY = f'correct the key "{KEY}" in it, or delete that key'


@dataclass(frozen=True)
class Defaults:
    """Decode defaults of a checkpoint.

    Attributes:
        settings: of `DecodingConfig`, as they are written there; empty if the checkpoint states none.
        chosen: where they come from, for example `{"benchmark": "coins", "split": "validation"}`.
        file: the checkpoint's generation_config.json.
        attention_pattern: of the model, which the mode has to suit.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    file: Path = Path(GENERATION)
    attention_pattern: str | None = None

    def decoding(self, **stated: Any) -> DecodingConfig:
        """How the model is decoded if only `stated` is given, such as `threshold=0.3`.

        Raises:
            UserError: as `resolve`.
        """
        return self.resolve(stated)[0]

    def resolve(
        self, *stated: Mapping[str, Any], called: Callable[[str], str] = str
    ) -> tuple[DecodingConfig, dict[str, Any]]:
        """Complete what is stated with these defaults.

        Args:
            stated: settings of decoding in the order in which they count: of a caller, then of a config.
            called: maps a setting to the name under which the caller gave it, such as `--gen-length`.

        Returns:
            The decoding, and those of its settings that these defaults supply.

        Raises:
            ConfigError: what is stated is invalid, or does not go with the defaults that remain beside it.
            CheckpointError: the defaults are invalid by themselves.
        """
        given = combined(*stated)
        settings = combined(given, self.settings)
        kept = {name: value for name, value in settings.items() if name not in given}
        try:
            decoding = DecodingConfig.model_validate(settings)
        except ValidationError as error:
            self._check(kept)
            beside = f"; beside {self.sentence(kept)}: give other values instead" if kept else ""
            raise ConfigError(f"{explain(error, called)}{beside}") from error
        if "mode" in kept and self.attention_pattern not in MODES[decoding.mode].patterns:
            raise CheckpointError(
                f"{self.file} has mode={decoding.mode!r} in its decode defaults, which does not suit the "
                f"model's attention_pattern={self.attention_pattern!r} (its config.json): {REMEDY}"
            )
        return decoding, kept

    def sentence(self, kept: Mapping[str, Any]) -> str:
        """Which settings come from the checkpoint, and where they were chosen, for a message of one line."""
        listed = ", ".join(f"{name} {_text(value)}" for name, value in kept.items())
        return f"the checkpoint's decode defaults {listed} ({self.file}{self._origin})"

    @property
    def _origin(self) -> str:
        benchmark, split = self.chosen.get("benchmark"), self.chosen.get("split")
        if benchmark is None:
            return ""
        origin = f", chosen on {split} problems of {benchmark}" if split else f", as in benchmark {benchmark}"
        lost = self.chosen.get("keeps_accuracy") is False
        return f"{origin}, where it loses more than was allowed" if lost else origin

    def _check(self, kept: Mapping[str, Any]) -> None:
        """Raise a CheckpointError if the defaults are invalid by themselves, and nothing given mends them."""
        if any(name in self.settings and name not in kept for name in ("rule", "mode")):
            return
        try:
            DecodingConfig.model_validate(self.settings)
        except ValidationError as error:
            raise CheckpointError(
                f"{self.file} has decode defaults that this version of dparallel cannot use "
                f"({explain(error)}): give other values instead, update dparallel, or {REMEDY}"
            ) from error


def read_defaults(folder: Path) -> Defaults:
    """The decode defaults of a checkpoint; without settings if it states none.

    Rules, modes and settings that this version does not know are read as they are, and refused where they
    would be used.

    Raises:
        CheckpointError: generation_config.json is damaged.
    """
    file = folder / GENERATION
    if not file.is_file():
        return Defaults(file=file)
    stated = read_json(file).get(KEY)
    if stated is None:
        return Defaults(file=file)
    settings, chosen = _object(file, stated, DECODING), _object(file, stated, CHOSEN)
    if unknown := [name for name in stated if name not in (DECODING, CHOSEN)]:
        raise CheckpointError(
            f"{file} has {', '.join(unknown)} under {KEY}, where only {DECODING} and {CHOSEN} belong; "
            f"settings of decoding belong under {KEY}.{DECODING}: {REMEDY}"
        )
    for name, value in settings.items():
        if not isinstance(value, PLAIN):
            raise CheckpointError(
                f"{file} has {KEY}.{DECODING}.{name}={value!r}, expected a text, a number or a truth value: "
                f"{REMEDY}"
            )
    config = folder / "config.json"
    pattern = read_json(config).get(PATTERN) if config.is_file() else None
    return Defaults(settings, chosen, file, pattern)


def write_defaults(
    folder: Path, settings: Mapping[str, Any] | None, chosen: Mapping[str, Any] | None = None
) -> bool:
    """Replace the decode defaults of a checkpoint; what else generation_config.json holds is kept.

    Args:
        settings: of `DecodingConfig`, as `DecodingConfig.portable` returns them; None or empty removes them.
        chosen: where they come from.

    Returns:
        Whether the file changed.

    Raises:
        CheckpointError: the file is damaged.
        FileError: it cannot be written.
    """
    file = folder / GENERATION
    before = file.read_bytes() if is_there(file) and read_json(file) is not None else EMPTY
    defaults = {DECODING: dict(settings), **({CHOSEN: dict(chosen)} if chosen else {})} if settings else None
    after = with_defaults(before, defaults)
    if after == before:
        return False
    write_atomically(file, after)
    return True


def decoding_of_model(model: Any) -> DecodingConfig:
    """How a model is decoded if nothing is said: by the defaults of its checkpoint, else by those built in.

    Raises:
        UserError: as `Defaults.resolve`.
    """
    defaults: Defaults | None = getattr(model, "defaults", None)
    if defaults is None:
        return DecodingConfig()
    decoding, kept = defaults.resolve()
    if kept:
        log.info("decoding with %s", defaults.sentence(kept))
    return decoding


def _object(file: Path, stated: Any, name: str) -> dict[str, Any]:
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file} has {KEY}={stated!r}, expected an object: {REMEDY}")
    value = stated.get(name, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} has {KEY}.{name}={value!r}, expected an object: {REMEDY}")
    return value


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

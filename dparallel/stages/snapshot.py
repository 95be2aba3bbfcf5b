"""An experiment as it was when its run started, so that all its stages use the same settings and code.

A run hands its snapshot to the stages that run in other processes and on other machines. It is kept as
`runs/<experiment>/configs/<digest>.yaml`, a config file from which the same run can be started again.
"""

import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML

from dparallel.config.base import Config, ConfigError, explain
from dparallel.config.experiment import RUNS, DistillConfig, StudentConfig
from dparallel.config.files import load_config, make_config
from dparallel.config.paths import is_url
from dparallel.stages.code import stage_digest
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import digest

CONFIGS = "configs"  # folder in the experiment's folder


class Snapshot(BaseModel):
    """Settings and code of a run, as small JSON values.

    Attributes:
        config: the config file that the user named.
        overrides: the overrides that the user gave.
        settings: all settings, with included files and overrides.
        code: digests of the code by stage; of benchmarks by `benchmark-<name>`, and of students that decode
            during their training by `training-<name>`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    overrides: tuple[str, ...] = ()
    settings: dict[str, Any]
    code: dict[str, str]

    def experiment(self) -> DistillConfig:
        """The settings, validated; ConfigError names the mistake."""
        return make_config(DistillConfig, self.settings, self.config)

    def as_parameter(self) -> dict[str, Any]:
        """The snapshot as JSON values that mean the same in all working folders of this machine."""
        settings = {**self.settings, "runs": os.path.abspath(self.settings.get("runs", RUNS))}
        if (store := settings.get("store")) is not None and not is_url(store):
            settings["store"] = os.path.abspath(store)
        return {**self.model_dump(mode="json"), "settings": settings}

    @property
    def file(self) -> Path:
        """The config file that `keep` writes."""
        folder = Path(self.settings.get("runs", RUNS), self.settings["name"], CONFIGS)
        return folder / f"{digest(self.settings)[:10]}.yaml"

    def keep(self) -> Path:
        """Write the settings as a config file, unless it exists; returns the file."""
        if not self.file.exists():
            arguments = shlex.join([self.config, *self.overrides])
            settings = self.as_parameter()["settings"]
            text = io.StringIO()
            yaml = YAML(typ="safe", pure=True)
            yaml.allow_unicode, yaml.default_flow_style, yaml.width = True, False, 4096
            yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
            yaml.dump(settings, text)
            write_atomically(self.file, f"# {arguments}\n{text.getvalue()}")
        return self.file


def take_snapshot(config: str | dict[str, Any], overrides: Sequence[str] | None = None) -> Snapshot:
    """The snapshot of a run that starts now, or `config` itself if it is that of a run in progress.

    Args:
        config: a config file, or a snapshot as JSON values.
        overrides: as in `load_config`; further ones if `config` is a snapshot.

    The environment names the store of settings without one (`DPARALLEL_STORE`), and the folder of runs of
    snapshots without one (`DPARALLEL_RUNS`).

    Raises:
        ConfigError: names the file, the key, the value and the remedy.
    """
    if isinstance(config, str):
        loaded = load_config(DistillConfig, config, list(overrides or []))
        if "store" not in loaded.model_fields_set and (store := os.environ.get("DPARALLEL_STORE")):
            settings = {**loaded.model_dump(mode="json", exclude_unset=True), "store": store}
            loaded = make_config(DistillConfig, settings, "DPARALLEL_STORE")
        return snapshot_of(loaded, config, overrides)
    try:
        snapshot = Snapshot.model_validate(config)
    except ValidationError as error:
        raise ConfigError(f"config: neither a file nor a run's snapshot: {explain(error)}") from error
    if "runs" not in snapshot.settings and (runs := os.environ.get("DPARALLEL_RUNS")):
        snapshot = snapshot.model_copy(update={"settings": {**snapshot.settings, "runs": runs}})
    if not overrides:
        return snapshot
    changed = make_config(DistillConfig, snapshot.settings, snapshot.config, overrides)
    return snapshot_of(changed, snapshot.config, [*snapshot.overrides, *overrides])


def snapshot_of(config: DistillConfig, file: str, overrides: Sequence[str] | None = None) -> Snapshot:
    """The snapshot of settings that were loaded from `file` with `overrides`."""
    return Snapshot(
        config=file,
        overrides=tuple(overrides or ()),
        settings=config.model_dump(mode="json", exclude_unset=True),
        code=code_of(config),
    )


def code_of(config: DistillConfig) -> dict[str, str]:
    """Digests of the running code, as in `Snapshot.code`."""
    decoding = {name: recipe for name, recipe in config.recipes.items() if recipe.rollouts is not None}
    settings: dict[str, Config] = {
        "trajectories": config.trajectories,
        "training": config.training,
        **{
            f"training-{name}": StudentConfig(training=config.training, recipe=recipe)
            for name, recipe in decoding.items()
        },
        "merging": config.merging,
        **{f"benchmark-{name}": benchmark for name, benchmark in config.benchmarks.items()},
    }
    digests = {label: stage_digest(label.partition("-")[0], part) for label, part in settings.items()}
    return {label: found for label, found in digests.items() if found is not None}

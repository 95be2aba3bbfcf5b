"""Names of flow runs, by which those of different experiments are told apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import runtime
from pydantic import BaseModel

from tasks.checks import all_overrides, stated_name
from tasks.tracking.describe import with_changes


def flow_run_name() -> str:
    """Name of the flow run in progress; given to Prefect, which calls it when the run starts."""
    return name_of(runtime.flow_run.flow_name, runtime.flow_run.parameters)


def name_of(flow: str, parameters: Mapping[str, Any]) -> str:
    """Title of a flow run and what was overridden, as MLflow shows it: `tiny: training fast (seed=1)`.

    Args:
        parameters: of the flow run, JSON values; they need not be valid.
    """
    return _encodable(with_changes(title_of(flow, parameters), _overrides(parameters)))


def title_of(flow: str, parameters: Mapping[str, Any]) -> str:
    """Experiment, flow, and student or benchmark: `tiny: training fast`."""
    words = [flow, parameters.get("student"), parameters.get("benchmark")]
    return _encodable(f"{experiment_of(parameters)}: {' '.join(str(word) for word in words if word)}")


def experiment_of(parameters: Mapping[str, Any]) -> str:
    """Name of the experiment, or of its config file if that cannot be read or lies outside of the roots."""
    config = parameters.get("config")
    named = stated_name(config, _overrides(parameters))
    return _encodable(named or ("unknown" if isinstance(config, Mapping) else Path(str(config)).stem))


def _overrides(parameters: Mapping[str, Any]) -> list[str]:
    """Those of a run in progress, whose snapshot is the config, and those of the parameters."""
    config, settings = parameters.get("config"), parameters.get("settings")
    begun = config.get("overrides") if isinstance(config, Mapping) else None
    values = settings if isinstance(settings, BaseModel | Mapping) else None
    texts = [*_listed(begun), *all_overrides(values, _listed(parameters.get("overrides")))]
    return [text for text in texts if isinstance(text, str)]


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _encodable(name: str) -> str:
    """The name without null characters and half surrogate pairs, which databases refuse."""
    return name.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")

"""Names of flow runs, by which those of different experiments are told apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import runtime

from tasks.checks import all_overrides, stated_name
from tasks.tracking.describe import with_changes


def flow_run_name() -> str:
    """Name of the flow run in progress; given to Prefect, which calls it when the run starts."""
    return name_of(runtime.flow_run.flow_name, runtime.flow_run.parameters)


def name_of(flow: str, parameters: Mapping[str, Any]) -> str:
    """Title of a flow run and what was overridden, as MLflow shows it: `tiny: training fast (seed=1)`.

    Args:
        parameters: of the flow run; they need not be valid.
    """
    return with_changes(title_of(flow, parameters), _overrides(parameters))


def title_of(flow: str, parameters: Mapping[str, Any]) -> str:
    """Experiment, flow, and student or benchmark: `tiny: training fast`."""
    words = [flow, parameters.get("student"), parameters.get("benchmark")]
    return f"{experiment_of(parameters)}: {' '.join(str(word) for word in words if word)}"


def experiment_of(parameters: Mapping[str, Any]) -> str:
    """Name of the experiment, or of its config file if that cannot be read or lies outside of the roots."""
    config = parameters.get("config")
    named = stated_name(config, _overrides(parameters))
    return named or ("unknown" if isinstance(config, Mapping) else Path(str(config)).stem)


def _overrides(parameters: Mapping[str, Any]) -> list[str]:
    """Those of a run in progress, whose snapshot is the config, and those of the parameters."""
    config = parameters.get("config")
    begun = config.get("overrides") if isinstance(config, Mapping) else None
    given = all_overrides(parameters.get("settings"), parameters.get("overrides"))
    return [str(each) for each in (*(begun or []), *given)]

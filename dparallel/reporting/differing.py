"""Which settings of past runs differ: of their benchmarks, and of the stages that these were made from."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dparallel.config.paths import PATHS
from dparallel.evaluation.cases import STUDENT
from dparallel.reporting.read import Benchmark
from dparallel.stages.manifest import Manifest

Json = dict[str, Any]
CHARACTERS = 60  # of a value that are shown
ABSENT = object()


def differing_settings(benchmarks: Sequence[Benchmark]) -> list[Json]:
    """The settings that differ between runs, as rows {setting, values: {run: text}}.

    Paths of local files do not count; models are compared by their fingerprints. A section that is not known
    of all runs, because the stage that holds it was removed, is left out. A part that only some runs have is
    one row.

    Args:
        benchmarks: several of each run.
    """
    by_run: dict[str, Json] = {}
    for benchmark in benchmarks:
        settings = by_run.setdefault(benchmark.run, {"benchmarks": {}, **_made_from(benchmark)})
        settings["benchmarks"][benchmark.name] = _settings(benchmark.manifest)
    known = set.intersection(*(set(settings) for settings in by_run.values()))
    runs = list(by_run)
    return [
        {"setting": key, "values": {run: _text(value) for run, value in zip(runs, values, strict=True)}}
        for section in sorted(known)
        for key, values in _differences(section, [settings[section] for settings in by_run.values()])
    ]


def _made_from(benchmark: Benchmark) -> Json:
    """The settings of the trainings, and of the trajectories that the first of them has learned from."""
    trainings, inputs = benchmark.trainings(), benchmark.manifest.inputs
    models = {name: digest[:12] for name, digest in inputs.items() if not name.startswith(STUDENT)}
    settings: Json = {"fingerprints": models}
    for name, made in trainings.items():
        of_student = _settings(made)
        settings.setdefault("students", {})[name.removeprefix(STUDENT)] = of_student.get("recipe")
        settings.setdefault("training", of_student.get("training"))
    recorded = next(filter(None, map(benchmark.trajectories, trainings.values())), None)
    if recorded is not None:
        settings["trajectories"] = _settings(recorded)
    return settings


def _settings(manifest: Manifest) -> Json:
    """All settings of a stage that are no local paths, in sections; items of a list by their number."""
    what = _sections(manifest.config)
    return _merged(what, _without_paths(manifest.how))


def _sections(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(place): _sections(item) for place, item in enumerate(value)}
    return {key: _sections(part) for key, part in value.items()} if isinstance(value, dict) else value


def _without_paths(how: Json) -> Json:
    return {
        key: _without_paths(part) if isinstance(part, dict) else part
        for key, part in how.items()
        if key not in PATHS
    }


def _merged(what: Json, how: Json) -> Json:
    merged = dict(what)
    for key, part in how.items():
        within = merged.get(key)
        merged[key] = _merged(within, part) if isinstance(within, dict) and isinstance(part, dict) else part
    return merged


def _differences(key: str, values: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
    """The settings that differ, with the values of all runs."""
    if all(value == values[0] for value in values):
        return []
    if not all(isinstance(value, dict) for value in values):
        return [(key, values)]
    names = dict.fromkeys(name for value in values for name in value)
    return [
        difference
        for name in names
        for difference in _differences(f"{key}.{name}", [value.get(name, ABSENT) for value in values])
    ]


def _text(value: Any) -> str:
    """A value as it could stand in an override, cut; of one that is not there, a dash."""
    if value is ABSENT:
        return "-"
    if isinstance(value, str) and value.isprintable() and value.strip():
        return textwrap.shorten(value, CHARACTERS)
    if isinstance(value, Mapping) and len(json.dumps(value)) > CHARACTERS:
        return f"{{{', '.join(value)}}}" if len(value) < 4 else f"{{{', '.join(list(value)[:3])}, …}}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1]}…"

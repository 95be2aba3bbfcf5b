"""What `dparallel eval` prints: a table with a row for each measurement, then how each was made."""

from collections.abc import Sequence
from typing import Any

from dparallel.config.decoding import DecodingConfig
from dparallel.evaluation.texts import (
    KINDS,
    MEASURED,
    accuracy_text,
    interval_notes,
    measured_text,
    sandbox_notes,
    score_text,
)
from dparallel.reporting.tables import Column, Table

Json = dict[str, Any]


def report(results: Sequence[Json]) -> str:
    """A table with a row for each measurement, then how they were decoded and where the files are."""
    columns = [
        Column("protocol", lambda row: row["protocol"], text=True),
        Column("version", lambda row: str(row["version"])),
        Column("accuracy %", lambda row: "".join(_shares(row)[:1])),
        Column("n", lambda row: str(next(iter(row["metrics"].values()))["judged"])),
        Column("further metrics %", lambda row: ", ".join(_shares(row)[1:]), text=True),
        Column("NFE", lambda row: f"{row['nfe']:.1f}"),
        Column("TPF", lambda row: f"{row['tpf']:.2f}"),
        Column("TPS", lambda row: f"{row['tps']:.0f}"),
        Column("latency s", lambda row: f"{row['latency']:.3g}"),
        Column("measured", _measured, text=True),
    ]
    table = Table(f"{results[0]['model']} ({results[0]['fingerprint'][:12]})", columns, results)
    notes = [
        *interval_notes(list(map(_kinds, results))),
        "Latency is that of one prompt alone, TPS that of a batch.",
        MEASURED,
    ]
    weaker = sandbox_notes(row["sandbox"] for row in results)
    return "\n\n".join([table.caption, table.markdown(), "\n".join(notes), *weaker, *map(_details, results)])


def _shares(row: Json) -> list[str]:
    """Every metric of a measurement with its value and standard error, in percent where it is a share."""
    texts = []
    for name, found in row["metrics"].items():
        if "score" in found:
            texts.append(f"{name} {score_text(found['score'], found['stderr'])} (no %)")
        elif found["judged"]:
            number = accuracy_text(found["share"], found["stderr"], found["interval"], row["sandbox"])
            texts.append(f"{name} {number}")
    return texts


def _kinds(row: Json) -> dict[str, list[str]]:
    """Metrics by what they are, for `interval_notes`."""
    metrics: dict[str, Json] = {name: found for name, found in row["metrics"].items() if found["judged"]}
    scores = [name for name, found in metrics.items() if "score" in found]
    found = {
        "scores": scores,
        "metrics": [name for name in metrics if name not in scores],
        "graded": [name for name in metrics if metrics[name]["kind"] == "mean" and name not in scores],
        "pooled": [name for name in metrics if metrics[name]["kind"] == "pooled"],
        "lower_is_better": [name for name in metrics if metrics[name].get("lower_is_better")],
    }
    assert set(found) == set(KINDS)
    return found


def _details(row: Json) -> str:
    overridden = row["overridden"]
    instead = {
        name: f" ({origin}: {value})"
        for name, values in overridden.items()
        for origin, value in values.items()
        if origin != "used" and value is not None  # a setting that the other mode or rule does not have
    }
    settings = [
        f"{name} {value}{instead.get(name, '')}"
        for name, value in row["decoding"].items()
        if name in overridden or _is_told(name, value)
    ]
    listed = ", ".join(f"{name} {value}" for name, value in row["of_checkpoint"].items())
    source = "" if row["protocol_file"] is None else f" ({row['protocol_file']})"
    limit = "" if row["limit"] is None else f"; limit {row['limit']}"
    problems = f"{row['samples'] // row['repeats']} problems"
    if row["repeats"] > 1:
        problems += f", {row['repeats']} responses to each"
    changes = [f"  with       {' '.join(row['set'])}"] if row["set"] else []
    return "\n".join(
        [
            row["protocol"],
            f"  protocol   version {row['version']}{source}",
            f"  model      {row['model']}, fingerprint {row['fingerprint']}",
            f"  data       {'; '.join(row['data'])}; {problems}{limit}",
            *changes,
            f"  decoding   {', '.join(settings)}",
            *([f"  of these   {listed} are the checkpoint's decode defaults"] if listed else []),
            f"  device     {row['hardware']}; batch size {', '.join(map(str, row['batch_sizes']))}",
            f"  measured   {_measured(row)}",
            f"  samples    {row['files']['samples']}",
            *(f"  verdicts   {folder} ({name})" for name, folder in row["files"]["verdicts"].items()),
        ]
    )


def _measured(row: Json) -> str:
    return measured_text(row["measured_on"], row["reused"], row["samples"])


def _is_told(name: str, value: Any) -> bool:
    """Whether a setting of decoding is shown: the main ones, and those that are not at their default."""
    default = DecodingConfig.model_fields[name].default
    return name in ("gen_length", "block_length", "rule") or value != default

"""Files that were cut off or emptied: they are refused by name with a remedy, or done without."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dparallel.config.experiment import MEASUREMENTS
from dparallel.stages.manifest import MANIFEST
from dparallel.stages.metrics_log import METRICS
from tests.failures.conftest import Place
from tests.failures.experiment import results
from tests.failures.table import Row

CHECKPOINT = "*/training-*/checkpoints/step-*"


@dataclass(frozen=True)
class Damage:
    """A file that is damaged before a stage runs.

    Attributes:
        what: the file, for the table.
        stage: the stage that made it.
        file: pattern of the file in the folder of runs; the last match is damaged.
        how: cut off in the middle, or empty.
        finished: whether its stage is finished; otherwise it was killed at its end.
        run: the stage that is run next; by default the one that made the file.
        taken: what is done without the file, for the table; by default it is refused.
        said: what the log says of this.
        all: every match is damaged.
    """

    what: str
    stage: str
    file: str
    how: str = "truncated"
    finished: bool = True
    run: str | None = None
    taken: str | None = None
    said: str = ""
    all: bool = False


DAMAGES = [
    Damage("shard", "trajectories", "*/trajectories-*/part-00003.parquet", run="training"),
    Damage("shard", "trajectories", "*/trajectories-*/part-00003.parquet", "emptied", finished=False),
    Damage("manifest", "trajectories", f"*/trajectories-*/{MANIFEST}", run="training"),
    Damage("manifest", "merging", f"*/merging-*/{MANIFEST}", "emptied", run="benchmark"),
    Damage("adapter", "training", "*/training-*/adapter/adapter_model.safetensors", run="merging"),
    Damage(
        "adapter",
        "training",
        "*/training-*/adapter/adapter_model.safetensors",
        "emptied",
        finished=False,
        taken="it is written again",
    ),
    Damage(
        "newest checkpoint",
        "training",
        f"{CHECKPOINT}/state.safetensors",
        finished=False,
        taken="goes on from the one before it, as its log says",
        said="; going on from train step 35",
    ),
    Damage(
        "`checkpoint.json` of the newest checkpoint",
        "training",
        f"{CHECKPOINT}/checkpoint.json",
        "emptied",
        finished=False,
        taken="goes on from the one before it, as its log says",
        said="; going on from train step 35",
    ),
    Damage("all checkpoints", "training", f"{CHECKPOINT}/state.safetensors", finished=False, all=True),
    Damage(
        "`metrics.jsonl`",
        "training",
        f"*/training-*/{METRICS}",
        finished=False,
        taken="the curve lacks what was cut off",
    ),
    Damage(
        "`metrics.jsonl`",
        "training",
        f"*/training-*/{METRICS}",
        "emptied",
        finished=False,
        taken="the curve lacks what was in it",
    ),
    Damage(
        "`stage.json`",
        "trajectories",
        "*/trajectories-*/stage.json",
        finished=False,
        taken="it is written again, with a warning",
        said="was missing or damaged; it is written again",
    ),
    Damage("merged model", "merging", "*/merging-*/model.safetensors", run="benchmark"),
    Damage("samples", "benchmark", f"{MEASUREMENTS}/samples/*/*.parquet"),
    Damage("samples", "benchmark", f"{MEASUREMENTS}/samples/*/*.parquet", "emptied", finished=False),
    Damage("verdicts", "benchmark", f"{MEASUREMENTS}/verdicts/*/*.parquet", finished=False),
    Damage("certainty map", "benchmark", f"{MEASUREMENTS}/certainty/*.json", "emptied", finished=False),
    Damage("`results.json`", "benchmark", "*/benchmark-*/results.json"),
]


def name(damage: Damage) -> str:
    words = (damage.what, damage.how, "finished" if damage.finished else "unfinished")
    return "-".join(words).replace("`", "").replace(" ", "_")


def curve(metrics: Path) -> list[int]:
    """The train steps in the whole lines of a file."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["train_step"] for line in lines]


@pytest.mark.parametrize("damage", DAMAGES, ids=name)
def test_a_file_is_damaged(
    place: Place, reference: Path, shown: Callable[[Row], None], damage: Damage
) -> None:
    shutil.copytree(reference / "runs", place.runs)
    flow = damage.run or damage.stage
    if flow != damage.stage:
        shutil.rmtree(place.stage(flow))
    if not damage.finished:
        (place.stage(damage.stage) / MANIFEST).unlink()
    matches = sorted(place.runs.glob(damage.file))
    files = matches if damage.all else matches[-1:]
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage.how == "truncated" else b"")

    left = curve(files[-1]) if damage.file.endswith(METRICS) else None
    with place.start(flow, *(["-v"] if damage.taken else [])) as run:
        code, said = run.code(), run.said
        assert run.leaves_no_process()
    lost, outcome = "that file", f"{damage.taken}"
    if damage.taken is None:
        assert code in (1, 2), said
        assert any(str(file) in run.last or str(file.parent) in run.last for file in files), said
        assert "delete" in run.last, said
        assert "Traceback" not in said
        for file in files:
            file.unlink()
        told = [MANIFEST] if damage.finished and damage.what != "manifest" else []
        if damage.all:  # what the message tells to delete
            shutil.rmtree(files[0].parents[1])
        for file in told:
            (place.stage(damage.stage) / file).unlink()
        outcome = "refused: one line with the file and what to delete"
        if code == 2:
            assert said.startswith("error: ")
            assert said.count("\n") == 1
            outcome += ", before anything starts"
        lost = "all steps" if damage.all else "that file"
    else:
        assert code == 0, said
        assert damage.said in said
        assert left is None or left == curve(files[-1])
    place.same_again(damage.stage)
    assert len(results(place.runs)) >= 3
    state = "finished" if damage.finished else "unfinished"
    again = "same result" if damage.taken else "same result once it is deleted"
    shown(Row(f"{damage.what} {damage.how}", f"{damage.stage}, {state}", outcome, lost, again))

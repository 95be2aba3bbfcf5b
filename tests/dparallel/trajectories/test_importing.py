"""Published responses in place of a recording: finished texts, and whole trajectories."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import DistillConfig, TrajectoriesConfig
from dparallel.config.files import load_config
from dparallel.config.imported import ImportedConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.config.sources import SourceConfig
from dparallel.distillation.data import check_samples, check_teacher, load_samples
from dparallel.distillation.recipe import make_views
from dparallel.models.backbone import DiffusionConfig
from dparallel.models.checkpoints import read_config
from dparallel.preflight.checks import check_experiment
from dparallel.problems.columns import Columns
from dparallel.problems.embedded import MASK, embedded_task
from dparallel.problems.registry import load_problems
from dparallel.problems.sources import ProblemsError
from dparallel.tiny.tokenizer import build_tokenizer
from dparallel.trajectories import store
from dparallel.trajectories.importing import from_canvases
from dparallel.trajectories.record import record_shards, run_stage
from tests.dparallel.distillation.conftest import CONFIGS, shipped

DECODING = DecodingConfig(gen_length=36, block_length=12, rule="steps", steps=36)


def published(count: int) -> list[dict[str, Any]]:
    """Rows as dParallel publishes them: questions, and the teacher's responses as text."""
    task, rng = embedded_task("coins"), random.Random(0)
    problems = zip(range(count), task.problems("train", seed=0), strict=False)
    return [
        {"question": problem.prompt, "llm_response": task.draw_solution(problem, rng), "gt": problem.answer}
        for _, problem in problems
    ]


def settings(path: Path, **changes: Any) -> TrajectoriesConfig:
    imported = changes.pop("imported", {"response": "llm_response"})
    problems = {
        "benchmark": "dataset",
        "sources": [{"path": str(path), **changes.pop("source", {})}],
        "protocol": {"prompt": "{question}"},
    }
    return TrajectoriesConfig(
        **{
            "problems": ProblemsConfig(**problems),
            "decoding": DECODING,
            "shard_size": 3,
            "imported": ImportedConfig(**imported),
            **changes,
        }
    )


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def canvases(prompt: list[int], response: list[int], commit_step: list[int], mask: int) -> list[list[int]]:
    """The canvases after each forward pass."""
    return [
        prompt + [token if step <= now else mask for token, step in zip(response, commit_step, strict=True)]
        for now in range(max(commit_step) + 1)
    ]


def test_finished_responses_are_samples_of_unknown_steps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows, tokenizer = published(5), build_tokenizer()
    config = settings(written(tmp_path / "data.jsonl", rows))
    inputs = {"teacher": str(tiny_checkpoint)}
    record_shards(config, inputs, tmp_path / "out", [1])  # as a worker does
    manifest = run_stage(config, inputs, tmp_path / "out")
    assert manifest.counts == {"rows": 5, "correct": 0, "incorrect": 0, "unknown": 5}
    assert not {"nfe", "tpf"} & set(manifest.metrics)
    model = read_config(tiny_checkpoint)
    for row, given in zip(store.load(tmp_path / "out").to_pylist(), rows, strict=True):
        words = tokenizer.encode(given["llm_response"], add_special_tokens=False)
        assert row["response_ids"] == words + [model.eos_token_id] * (36 - len(words))
        assert row["prompt_ids"] == tokenizer.encode(given["question"], add_special_tokens=False)
        assert (row["num_tokens"], row["response"]) == (len(words) + 1, given["llm_response"])
        assert [row[name] for name in ("commit_step", "confidence", "nfe", "correct")] == [None] * 4

    check_teacher(tmp_path / "out", tiny_checkpoint)
    samples, _ = load_samples(tmp_path / "out", only_correct=False, max_length=None)
    assert samples.commit_step is None
    recipe = shipped("certainty_forcing")
    check_samples(samples, recipe, model)
    views = make_views(recipe, samples.responses[0], None, model.end_token_ids, np.random.default_rng(0))
    assert len(views) == 2
    for name in ("trajectory_ordered", "d3llm"):
        with pytest.raises(ConfigError, match="needs the steps at which the teacher committed"):
            check_samples(samples, shipped(name), model)


def test_whole_trajectories_have_the_steps_and_the_verdicts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, rng, tokenizer = read_config(tiny_checkpoint), random.Random(1), build_tokenizer()
    rows, steps = published(4), []
    for number, row in enumerate(rows):
        prompt = tokenizer.encode(row["question"], add_special_tokens=False)[number % 2 :]
        words = tokenizer.encode(row["llm_response"], add_special_tokens=False)
        response = words + [model.eos_token_id] * (36 - len(words))
        steps.append([rng.randrange(6) for _ in range(35)] + [5])
        row["prompt_ids"] = prompt
        row["canvases"] = canvases(prompt, response, steps[-1], model.mask_token_id)
        row["is_correct"] = (True, False, None, 1)[number]
    imported = {"trajectory": "canvases", "correct": "is_correct"}
    config = settings(written(tmp_path / "data.jsonl", rows), imported=imported)
    manifest = run_stage(config, {"teacher": str(tiny_checkpoint)}, tmp_path / "out")
    assert manifest.counts == {"rows": 4, "correct": 2, "incorrect": 1, "unknown": 1}
    assert manifest.metrics["nfe"] == 6
    made = store.load(tmp_path / "out").to_pylist()
    assert [row["commit_step"] for row in made] == steps
    assert [row["correct"] for row in made] == [True, False, None, True]
    assert [row["prompt_ids"] for row in made] == [row["prompt_ids"] for row in rows]
    assert [row["response"] for row in made] == [row["llm_response"] for row in rows]
    samples, counts = load_samples(tmp_path / "out", only_correct=True, max_length=None)
    assert counts["rows_used"] == 2
    check_samples(samples, shipped("d3llm"), model)


def test_steps_by_hand() -> None:
    model = DiffusionConfig(mask_token_id=1, eos_token_id=2)
    made = from_canvases(np.array([[1, 7, 1], [1, 7, 8], [6, 7, 8]]), model)
    assert (made.tokens, made.commit_step, made.nfe) == ([6, 7, 8], [2, 0, 1], 3)
    with pytest.raises(ProblemsError, match="1 positions are masked in its last canvas"):
        from_canvases(np.array([[1, 7, 1], [1, 7, 8]]), model)
    for changed in ([[6, 7, 1], [5, 7, 8]], [[6, 7, 1], [1, 7, 1], [6, 7, 8]]):
        with pytest.raises(ProblemsError, match="a token changes after it was committed, or is masked again"):
            from_canvases(np.array(changed), model)


@pytest.mark.parametrize(
    ("imported", "row", "message"),
    [
        ({"response": "text"}, {}, r"data\.jsonl: no column 'text'; its columns: question"),
        (
            {"response": "llm_response"},
            {"llm_response": " "},
            "row 1: column 'llm_response' holds ' '",
        ),
        ({"response": "llm_response"}, {"llm_response": f"Tom {MASK}"}, "row 1: .*holds the mask token"),
        (
            {"trajectory": "c"},
            {"prompt_ids": [5], "c": [[5, 6], [5]]},
            "row 1: .*no list of canvases",
        ),
        (
            {"trajectory": "c"},
            {"prompt_ids": [5], "c": [[5, 6]]},
            "row 1: its response has 1 position",
        ),
        (
            {"trajectory": "c"},
            {"prompt_ids": [5], "c": [[6] * 37]},
            "row 1: a canvas does not start with",
        ),
        ({"trajectory": "c"}, {"prompt_ids": [5], "c": [[5] + [1] * 36]}, "row 1: 36 positions are masked"),
        (
            {"response": "llm_response", "correct": "gt"},
            {},
            "row 1: column 'gt' holds .*expected true",
        ),
    ],
)
def test_what_is_no_response_is_named_with_its_row(
    imported: dict, row: dict, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "data.jsonl", [{**published(1)[0], **row}])
    with pytest.raises(ProblemsError, match=message):
        run_stage(settings(path, imported=imported), {"teacher": str(tiny_checkpoint)}, tmp_path / "out")


def test_a_response_that_is_too_long_is_cut(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "data.jsonl", [{"question": "Tom 7", "llm_response": "7 " * 40}])
    run_stage(settings(path), {"teacher": str(tiny_checkpoint)}, tmp_path / "out")
    assert "1 of 1 responses are longer than gen_length=36 and cut" in caplog.text
    [row] = store.load(tmp_path / "out").to_pylist()
    assert row["num_tokens"] == 36
    assert len(set(row["response_ids"])) == 1


def test_columns_are_those_of_the_problems_for_any_selection(tmp_path: Path) -> None:
    rows = [{"a": f"{n}", "b": n} for n in range(10)]
    one, two = (written(tmp_path / f"{name}.jsonl", rows) for name in ("one", "two"))
    sources = (
        SourceConfig(path=str(one), split="train[6:9]+train[:2]", columns={"x": "b"}),
        SourceConfig(path=str(two), count=4, seed=3, columns={"x": "b"}),
        SourceConfig(path=str(two), columns={"x": "b"}),
    )
    config = ProblemsConfig(
        benchmark="dataset",
        sources=sources,
        protocol=ProtocolConfig(prompt="{a}"),
        rows="[1:17]",
        count=12,
        seed=1,
    )
    problems, columns = load_problems(config), Columns(config, ["x"])
    expected = [int(problem.prompt) for problem in problems]
    assert [record["x"] for record in columns.read(range(12))] == expected
    assert [record["x"] for record in columns.read(range(3, 7))] == expected[3:7]


@pytest.mark.parametrize(
    ("imported", "message"),
    [
        ({}, "response=None, trajectory=None: give exactly one of them"),
        ({"response": "a", "trajectory": "b"}, "give exactly one of them"),
        (
            {"response": "a", "prompt_ids": "b"},
            "prompts of finished texts are tokenized here",
        ),
    ],
)
def test_settings_that_exclude_each_other(imported: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImportedConfig(**imported)


def test_generated_problems_have_no_published_responses() -> None:
    with pytest.raises(ConfigError, match="imported with problems.benchmark='coins'"):
        TrajectoriesConfig(
            problems=ProblemsConfig(benchmark="coins", count=1),
            decoding=DECODING,
            imported=ImportedConfig(response="a"),
        )
    assert "imported" not in TrajectoriesConfig(
        problems=ProblemsConfig(benchmark="coins", count=1), decoding=DECODING
    ).model_dump(mode="json")


@pytest.mark.parametrize("imported", ["{response: llm_response}", "{trajectory: canvases}"])
def test_recipes_that_need_steps_are_refused_before_anything_runs(
    imported: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = written(tmp_path / "data.jsonl", published(1))
    problems = f"{{benchmark: dataset, sources: [{{path: {data}}}], protocol: {{prompt: '{{question}}'}}}}"
    overrides = [f"teacher={tiny_checkpoint}", f"runs={tmp_path}", "training.only_correct=false"]
    overrides += [f"trajectories.problems={problems}", f"trajectories.imported={imported}"]
    config = load_config(DistillConfig, CONFIGS / "tiny.yaml", overrides)
    assert any(recipe.needs_steps for recipe in config.recipes.values())
    if "trajectory" in imported:
        check_experiment(config, stages=[])
        return
    with pytest.raises(
        ConfigError, match=r"students\.\w+\.masking=trajectory needs the steps .* finished resp"
    ):
        check_experiment(config, stages=[])

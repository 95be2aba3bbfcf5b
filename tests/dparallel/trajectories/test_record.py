import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.problems import ProblemsConfig
from dparallel.decoding.canvas import Step
from dparallel.decoding.generate import generate
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.judging import score
from dparallel.problems.prompts import encode_problems
from dparallel.problems.registry import load_problems, problems_digest
from dparallel.stages.lease import LeaseHeldError
from dparallel.stages.manifest import StageError
from dparallel.stages.sharing import ROUNDS
from dparallel.trajectories import record, store
from dparallel.trajectories.record import record_shards, run_stage, summarize
from tests.dparallel.evaluation.oracle import dataset

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)


def config(count: int = 7, shard_size: int = 3, **changes) -> TrajectoriesConfig:
    problems = ProblemsConfig(benchmark="coins", count=count)
    return TrajectoriesConfig(
        **{"problems": problems, "decoding": DECODING, "shard_size": shard_size, "batch_size": 4, **changes}
    )


def inputs(checkpoint: Path) -> dict[str, str]:
    return {"teacher": str(checkpoint)}


def test_every_row_is_what_the_teacher_decoded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = run_stage(config(), inputs(tiny_checkpoint), tmp_path / "out")
    assert sorted(manifest.files) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    table = store.load(tmp_path / "out").to_pylist()

    problems = load_problems(config().problems)
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    prompts = encode_problems(problems, config().problems.protocol, tokenizer, model, DECODING)
    for row, problem, prompt in zip(table, problems, prompts, strict=True):
        (expected,) = generate(model, [prompt], DECODING)
        assert (row["problem_id"], row["reference"]) == (problem.problem_id, problem.reference)
        assert row["prompt_ids"] == prompt
        assert row["response_ids"] == expected.tokens
        assert row["commit_step"] == expected.commit_step
        assert row["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
        assert (row["nfe"], row["num_tokens"]) == (expected.nfe, expected.num_tokens)
        [verdict] = score([problem], [row["response"]], config().problems.protocol)
        assert row["correct"] == verdict.metrics["solution"]
        assert row["seed"] is None


def test_a_recording_that_revises_holds_the_last_change_of_each_token(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The step at which a token became what it is in the end, after which it was predicted again."""
    decoding = DecodingConfig(
        gen_length=12, block_length=6, mode="revising", threshold=0.1, stop_at_eos=False
    )
    run_stage(config(decoding=decoding), inputs(tiny_checkpoint), tmp_path / "out")
    table = store.load(tmp_path / "out").to_pylist()
    model = load_model(tiny_checkpoint)
    changed = 0
    for row in table:
        steps: list[Step] = []
        [expected] = generate(model, [row["prompt_ids"]], decoding, observe=steps.extend)
        assert (row["response_ids"], row["nfe"]) == (expected.tokens, expected.nfe)
        shown: list[int | None] = [None] * 12
        last = [-1] * 12
        for step in steps:
            for offset, token, new in zip(step.offsets, step.tokens, step.commit, strict=True):
                if new:
                    changed += shown[offset] is not None
                    shown[offset], last[offset] = token, step.denoise_step
        assert shown == row["response_ids"]
        assert last == row["commit_step"] == expected.commit_step
    assert changed, "a random model changes its mind"


def test_counts_and_metrics_by_hand() -> None:
    shard = [
        {"correct": True, "nfe": 5, "num_tokens": 30},
        {"correct": False, "nfe": 10, "num_tokens": 10},
        {"correct": None, "nfe": 9, "num_tokens": 20},
    ]
    counts, metrics = summarize(store.pa.Table.from_pylist(shard))
    assert counts == {"rows": 3, "correct": 1, "incorrect": 1, "unknown": 1}
    assert metrics == {"nfe": 8.0, "tpf": 60 / 24, "accuracy": 0.5}


def test_unknown_correctness_is_counted_and_has_no_accuracy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom 7"}\n{"prompt": "Ann 3 pens"}\n', encoding="utf-8")
    problems = dataset(tmp_path / "p.jsonl")
    manifest = run_stage(config(problems=problems), inputs(tiny_checkpoint), tmp_path / "out")
    assert manifest.counts == {"rows": 2, "correct": 0, "incorrect": 0, "unknown": 2}
    assert "accuracy" not in manifest.metrics
    assert manifest.metrics["rows_per_second"] > 0
    assert store.load(tmp_path / "out")["correct"].to_pylist() == [None, None]


def test_a_problems_file_that_changed_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    settings = config(problems=dataset(path))
    path.write_text('{"prompt": "Tom 7"}\n', encoding="utf-8")
    run_stage(settings, inputs(tiny_checkpoint), tmp_path / "out")
    run_stage(settings, inputs(tiny_checkpoint), tmp_path / "out")
    path.write_text('{"prompt": "Ann 7"}\n', encoding="utf-8")
    with pytest.raises(StageError, match="made from other problems"):
        run_stage(settings, inputs(tiny_checkpoint), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()  # the same, had the run not finished
    with pytest.raises(StageError, match=r"part-00000\.parquet holds other problems"):
        run_stage(settings, inputs(tiny_checkpoint), tmp_path / "out")


def test_what_only_a_scorer_reads_is_no_part_of_a_shard(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An additional column does not invalidate a recorded shard."""
    first = run_stage(config(), inputs(tiny_checkpoint), tmp_path / "out")
    richer = [
        dataclasses.replace(problem, extra={"tests": [problem.prompt]})
        for problem in load_problems(config().problems)
    ]
    monkeypatch.setattr(record, "load_problems", lambda _: richer)
    assert run_stage(config(), inputs(tiny_checkpoint), tmp_path / "out") == first
    (tmp_path / "out" / "manifest.json").unlink()
    again = run_stage(config(), inputs(tiny_checkpoint), tmp_path / "out")
    assert again.files == first.files
    assert problems_digest(richer) == problems_digest(load_problems(config().problems))
    assert problems_digest(richer, extra=True) != problems_digest(richer)
    assert problems_digest([dataclasses.replace(richer[0], prefill="7")]) != problems_digest(richer[:1])


def test_a_response_is_cut_and_judged_by_its_protocol(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = config(count=2).model_dump()
    settings["problems"]["protocol"] = {"stops": [" "], "scorers": ["exact", "coins"]}
    run_stage(TrajectoriesConfig.model_validate(settings), inputs(tiny_checkpoint), tmp_path / "cut")
    run_stage(config(count=2), inputs(tiny_checkpoint), tmp_path / "whole")
    cut, whole = (store.load(tmp_path / name).to_pylist() for name in ("cut", "whole"))
    assert [row["response"] for row in cut] == [row["response"].split(" ")[0] for row in whole]
    assert [row["prompt_ids"] for row in cut] == [row["prompt_ids"] for row in whole]
    assert [row["correct"] for row in cut] == [False, False]


def test_a_finished_stage_is_not_redone_and_a_missing_shard_alone_is(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run_stage(config(), inputs(tiny_checkpoint), out)
    assert run_stage(config(), inputs(tiny_checkpoint), out) == first

    shards = sorted(out.glob("part-*.parquet"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].unlink()
    (out / "manifest.json").unlink()
    (out / ".part-00002.parquet.1.partial").write_text("half a shard", encoding="utf-8")
    again = run_stage(config(), inputs(tiny_checkpoint), out)
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert again.fingerprint == first.fingerprint
    assert not list(out.glob(".part-*"))


def test_a_resumed_recording_keeps_its_shards_and_may_decode_in_other_batches(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_stage(config(), inputs(tiny_checkpoint), out)
    names = ["problem_id", "response_ids", "commit_step"]
    first = store.load(out).select(names)
    (out / "part-00001.parquet").unlink()
    (out / "manifest.json").unlink()
    again = run_stage(config(shard_size=2, batch_size=1), inputs(tiny_checkpoint), out)
    assert (again.how["shard_size"], again.how["batch_size"]) == (3, 1)
    assert store.load(out).select(names) == first


def test_a_resumed_shard_of_another_teacher_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_stage(config(), inputs(tiny_checkpoint), out)
    (out / "manifest.json").unlink()
    shard = out / "part-00000.parquet"
    table, metadata = store.read_shard(shard)
    shard.unlink()
    store.write_shard(shard, table.to_pylist(), metadata.model_copy(update={"teacher": "another"}))
    with pytest.raises(StageError, match=r"part-00000\.parquet was made by .*another"):
        run_stage(config(), inputs(tiny_checkpoint), out)


def test_what_does_not_fit_is_refused_before_decoding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    long = config(decoding=DecodingConfig(gen_length=60, block_length=6))
    with pytest.raises(ValueError, match=r"problem coins-train-0-00000 .*12 tokens.*gen_length=60"):
        run_stage(long, inputs(tiny_checkpoint), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.slow
def test_a_run_killed_in_the_middle_leaves_whole_shards_and_its_rerun_only_adds(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings, out = config(count=150, shard_size=1), tmp_path / "out"
    program = (
        "import sys; from dparallel.config.experiment import TrajectoriesConfig as Config; "
        "from dparallel.trajectories.record import run_stage; "
        "run_stage(Config.model_validate_json(sys.argv[1]), {'teacher': sys.argv[2]}, sys.argv[3])"
    )
    arguments = [settings.model_dump_json(), str(tiny_checkpoint), str(out)]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments])
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 3:
        assert process.poll() is None, "the recording ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    assert not (out / "manifest.json").exists()
    survivors = {shard: shard.stat().st_mtime_ns for shard in out.glob("part-*.parquet")}
    assert 3 <= len(survivors) < 150
    assert all(pq.read_table(shard).num_rows == 1 for shard in survivors)

    resumed = run_stage(settings, inputs(tiny_checkpoint), out)
    assert {shard: shard.stat().st_mtime_ns for shard in survivors} == survivors
    whole = run_stage(settings, inputs(tiny_checkpoint), tmp_path / "whole")
    assert store.load(out).equals(store.load(tmp_path / "whole"))
    assert resumed.counts == whole.counts
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["counts"]["rows"] == 150


def test_any_parts_in_any_order_make_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = run_stage(config(), inputs(tiny_checkpoint), tmp_path / "whole")
    asked: list[list[int]] = []

    def workers(missing: list[int]) -> list[str]:
        """The last shard first, one of them twice; the worker of the first one dies in the first round."""
        asked.append(missing)
        for numbers in ([2], [1, 2], [0])[: 2 if len(asked) == 1 else 3]:
            record_shards(config(), inputs(tiny_checkpoint), tmp_path / "parts", numbers)
        return ["part 3: Crashed"] if len(asked) == 1 else []

    parts = run_stage(config(), inputs(tiny_checkpoint), tmp_path / "parts", workers)
    assert asked == [[0, 1, 2], [0]]
    assert parts.files == whole.files, "sizes and hashes"
    assert parts.counts == whole.counts
    assert parts.fingerprint == whole.fingerprint
    assert parts.metrics["rows_per_second"] > 0
    asked.clear()
    assert run_stage(config(), inputs(tiny_checkpoint), tmp_path / "parts", workers) == parts
    assert not asked, "a finished stage asks nobody"


def test_shards_that_stay_missing_are_named_with_the_last_failure(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out, rounds = tmp_path / "out", []

    def dies(missing: list[int]) -> list[str]:
        rounds.append(missing)
        if len(rounds) == 1:
            record_shards(config(), inputs(tiny_checkpoint), out, [1])
        return [f"part 1: Crashed in round {len(rounds)}"]

    with pytest.raises(StageError, match="2 of 3 shards are still missing") as error:
        run_stage(config(), inputs(tiny_checkpoint), out, dies)
    assert rounds == [[0, 1, 2], *[[0, 2]] * (ROUNDS - 1)]
    assert "part-00000.parquet; part-00002.parquet; part 1: Crashed in round 3" in str(error.value)
    assert not (out / "manifest.json").exists()
    assert run_stage(config(), inputs(tiny_checkpoint), out).counts["rows"] == 7


def test_workers_of_another_folder_are_not_asked_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rounds = []

    def delegate(missing: list[int]) -> list[str]:
        rounds.append(missing)
        record_shards(config(), inputs(tiny_checkpoint), tmp_path / "another", missing)
        return []

    with pytest.raises(StageError, match="do all workers share this folder"):
        run_stage(config(), inputs(tiny_checkpoint), tmp_path / "out", delegate)
    assert len(rounds) == 1


def test_a_shard_of_other_settings_is_refused_whoever_recorded_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def delegate(missing: list[int]) -> list[str]:
        record_shards(config(), inputs(tiny_checkpoint), tmp_path / "out", missing)
        shard = tmp_path / "out" / "part-00001.parquet"
        table, metadata = store.read_shard(shard)
        shard.unlink()
        store.write_shard(shard, table.to_pylist(), metadata.model_copy(update={"tokenizer": "another"}))
        return []

    with pytest.raises(StageError, match=r"part-00001\.parquet was made by .*another"):
        run_stage(config(), inputs(tiny_checkpoint), tmp_path / "out", delegate)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_shard_that_does_not_exist_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shard 3: 7 problems are 3 shards .* from 0 to 2"):
        record_shards(config(), inputs(tiny_checkpoint), tmp_path / "out", [0, 3])
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_second_run_is_refused_while_parts_record_for_the_first(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The first run holds the folder; its parts record in it; the second run changes nothing."""
    out = tmp_path / "out"

    def by_parts(indices: list[int]) -> list[str]:
        with pytest.raises(LeaseHeldError, match=f"{out} is in use by process {os.getpid()} on "):
            run_stage(config(), inputs(tiny_checkpoint), out)
        record_shards(config(), inputs(tiny_checkpoint), out, indices)
        return []

    first = run_stage(config(), inputs(tiny_checkpoint), out, by_parts)
    assert run_stage(config(), inputs(tiny_checkpoint), out) == first
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*first.files, "manifest.json", "stage.json"]
    )

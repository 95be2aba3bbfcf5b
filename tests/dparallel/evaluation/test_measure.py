from pathlib import Path

import pytest

from dparallel.config import DecodingConfig, ProblemsConfig
from dparallel.decoding import generate
from dparallel.evaluation.benchmarks import load_problems
from dparallel.evaluation.measure import LATENCY_SAMPLES, SAMPLES, measure, measure_once
from dparallel.evaluation.text import decode_response, encode_problems
from dparallel.manifest import StageError
from dparallel.models.checkpoints import load_model, load_tokenizer
from tests.dparallel.evaluation.oracle import dataset, own_answers

DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)


def test_a_measurement_is_what_decoding_gives(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    # The references are the model's own answers, two of five of them spoilt.
    problems = own_answers(tiny_checkpoint, tmp_path / "p.jsonl", DECODING, count=5, spoilt=2)
    found, samples = measure(model, tokenizer, problems, DECODING, batch_size=2)

    assert found.samples == 5
    assert found.accuracy == 0.6
    assert found.accuracy_stderr == pytest.approx((0.6 * 0.4 / 5) ** 0.5)
    assert found.answer_accuracy is None
    loaded = load_problems(problems)
    generations = generate(model, encode_problems(problems, loaded, tokenizer, model, DECODING), DECODING)
    tokens, nfe = sum(each.num_tokens for each in generations), sum(each.nfe for each in generations)
    assert found.nfe == pytest.approx(nfe / 5)
    assert found.tpf == pytest.approx(tokens / nfe)
    assert (found.decoding, found.batch_size) == (DECODING, 2)

    assert samples.schema == SAMPLES
    assert samples["response"].to_pylist() == [
        decode_response(tokenizer, each.tokens, model.config.eos_token_id) for each in generations
    ]
    assert samples["solution"].to_pylist() == [False, False, True, True, True]


def test_speed_is_of_the_batches_and_latency_of_single_prompts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that strikes at every forward: batches of 5 share theirs, single prompts do not."""
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    monkeypatch.setattr("dparallel.evaluation.measure.time.perf_counter", lambda: float(len(rows)))
    problems = ProblemsConfig(benchmark="coins", split="test", count=10)
    found, samples = measure(model, tokenizer, problems, DECODING, batch_size=5)

    nfe = samples["nfe"].to_pylist()[:LATENCY_SAMPLES]
    assert found.latency == sum(nfe) / LATENCY_SAMPLES
    alone = rows[-sum(nfe) :]
    assert alone == [1] * sum(nfe)
    batched = len(rows) - len(alone) - 3  # warm-ups: 5 rows in one forward, 1 row in another
    assert sum(samples["num_tokens"].to_pylist()) / found.tps == pytest.approx(batched + 1)


def test_coins_have_an_answer_score_too(tiny_checkpoint: Path) -> None:
    problems = ProblemsConfig(benchmark="coins", count=3)
    found, samples = measure(
        load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint), problems, DECODING, batch_size=3
    )
    assert (found.accuracy, found.answer_accuracy) == (0.0, 0.0)  # a random model
    assert samples["answer"].to_pylist() == [False] * 3


def test_a_problem_without_reference_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Tom"}\n')
    problems = dataset(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"problem p-00001 .*has no reference"):
        measure(load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint), problems, DECODING, 1)


class Loader:
    """Counts how often a model was asked for."""

    def __init__(self, checkpoint: Path):
        self.checkpoint, self.calls = checkpoint, 0

    def __call__(self):
        self.calls += 1
        return load_model(self.checkpoint), load_tokenizer(self.checkpoint)


def test_a_stored_measurement_is_found_and_a_stale_one_never(tiny_checkpoint: Path, tmp_path: Path) -> None:
    load, folder = Loader(tiny_checkpoint), tmp_path / "measurements"
    problems = own_answers(tiny_checkpoint, tmp_path / "p.jsonl", DECODING, count=3)
    first = measure_once(folder, "model", load, problems, DECODING, 2)
    assert measure_once(folder, "model", load, problems, DECODING, 2) == first
    assert load.calls == 1

    others = [
        measure_once(folder, "another model", load, problems, DECODING, 2),
        measure_once(folder, "model", load, problems, DECODING, 3),
        measure_once(folder, "model", load, problems, DECODING.model_copy(update={"threshold": 0.1}), 2),
        measure_once(folder, "model", load, problems.model_copy(update={"count": 2}), DECODING, 2),
    ]
    own_answers(tiny_checkpoint, tmp_path / "p.jsonl", DECODING, count=3, spoilt=1)  # same path, new content
    others.append(measure_once(folder, "model", load, problems, DECODING, 2))
    assert load.calls == 6
    assert others[-1][0].accuracy < first[0].accuracy
    assert len({name for _, name in [first, *others]}) == 6


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_half_a_stored_measurement_is_made_again(tiny_checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    load = Loader(tiny_checkpoint)
    problems = own_answers(tiny_checkpoint, tmp_path / "p.jsonl", DECODING, count=2)
    _, name = measure_once(tmp_path, "model", load, problems, DECODING, 2)
    (tmp_path / f"{name}{suffix}").unlink()
    measure_once(tmp_path, "model", load, problems, DECODING, 2)
    assert load.calls == 2
    assert (tmp_path / f"{name}{suffix}").is_file()


def test_a_damaged_stored_measurement_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    load = Loader(tiny_checkpoint)
    problems = own_answers(tiny_checkpoint, tmp_path / "p.jsonl", DECODING, count=2)
    _, name = measure_once(tmp_path, "model", load, problems, DECODING, 2)
    record = tmp_path / f"{name}.json"
    text = record.read_text()
    record.write_text(text[:50])
    with pytest.raises(StageError, match=f"{name}.json is damaged"):
        measure_once(tmp_path, "model", load, problems, DECODING, 2)
    record.write_text(
        text.replace('"model": "model"', '"model": "other"').replace('"model":"model"', '"model":"other"')
    )
    with pytest.raises(StageError, match=f"{name}.json was measured from something else"):
        measure_once(tmp_path, "model", load, problems, DECODING, 2)

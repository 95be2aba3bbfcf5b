"""Units to samples: in one process, with one model in memory, keyed by model, prompts, decoding and code."""

import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import BenchmarkConfig
from dparallel.config.files import load_config
from dparallel.decoding.generate import generate
from dparallel.decoding.memory import row_bytes
from dparallel.evaluation import decode
from dparallel.evaluation.bench import Bench, Unit, slices
from dparallel.evaluation.cases import Case
from dparallel.evaluation.decode import LATENCY_SAMPLES, sample, warm_up
from dparallel.evaluation.sharing import make_units
from dparallel.evaluation.store import SAMPLES
from dparallel.models import loader
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems.prompts import finish
from dparallel.stages import code, files
from tests.conftest import random_model
from tests.dparallel.evaluation.oracle import disturbed

CONFIGS = Path(__file__).parents[3] / "configs" / "benchmarks"
DECODING = DecodingConfig(gen_length=12, block_length=6, threshold=1.5)
COINS = {"benchmark": "coins", "count": 10}


def settings(**changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig.model_validate(
        {
            "test": {**COINS, "split": "test"},
            "validation": {**COINS, "split": "validation"},
            "reference": {"gen_length": 12, "block_length": 6, "rule": "steps", "steps": 12},
            "sweeps": {"entropy": {"decoding": DECODING.model_dump(), "thresholds": [0.5]}},
            "teacher_sweeps": ["entropy"],
            "student_sweeps": ["entropy"],
            "batch_size": 4,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    student = disturbed(tiny_checkpoint, tmp_path_factory.mktemp("students") / "student")
    return {"teacher": str(tiny_checkpoint), "student/other": str(student)}


def unit(model: str = "teacher", rows: tuple[int, int] = (0, 10), **changes: Any) -> dict[str, Any]:
    """A unit as sent to another process."""
    values = {"model": model, "split": "test", "decoding": DECODING.model_dump(), "slice": rows, **changes}
    return Unit.model_validate(values).model_dump(mode="json")


def test_samples_are_what_decoding_gives(inputs: dict[str, str], tmp_path: Path) -> None:
    bench = Bench(settings(), inputs, tmp_path)
    make_units(settings(), inputs, tmp_path, [unit(rows=(0, 5)), unit(rows=(5, 10))])
    samples = bench.samples(bench.samples_key("teacher", "test", DECODING), "test")
    model, tokenizer = load_model(inputs["teacher"]), load_tokenizer(inputs["teacher"])
    prompts = bench.prompts("teacher", "test")
    generations = generate(model, prompts, DECODING)
    assert samples.schema == SAMPLES
    assert samples["prompt_ids"].to_pylist() == prompts
    assert samples["response_ids"].to_pylist() == [each.tokens for each in generations]
    assert samples["commit_step"].to_pylist() == [each.commit_step for each in generations]
    assert samples["nfe"].to_pylist() == [each.nfe for each in generations]
    assert samples["num_tokens"].to_pylist() == [each.num_tokens for each in generations]
    assert samples["text"].to_pylist() == [
        finish(each.tokens, tokenizer, model.config.end_token_ids) for each in generations
    ]
    assert set(samples["batch_size"].to_pylist()) == {4}
    assert samples["seconds_alone"].null_count == 10 - LATENCY_SAMPLES


def test_speed_is_of_the_batches_and_latency_of_single_prompts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks at every forward pass: batches of 5 share its time, single prompts do not."""
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: forwards.append(len(arguments[0])))
    rows: list[int] = []  # for which threads were chosen

    @contextmanager
    def chosen(_: Any, count: int = 1) -> Iterator[None]:
        rows.append(count)
        monkeypatch.setattr(decode, "hardware", lambda: f"threads for {count}")
        yield
        monkeypatch.setattr(decode, "hardware", lambda: "threads for what comes next")

    monkeypatch.setattr(decode, "fitting_threads", chosen)
    monkeypatch.setattr("dparallel.evaluation.decode.time.perf_counter", lambda: float(len(forwards)))
    prompts = [[5, 6, 7 + row] for row in range(10)]
    samples = sample(model, tokenizer, prompts[:5], DECODING, 5)
    more = sample(model, tokenizer, prompts[5:], DECODING, 5, first_row=5)

    nfe = [*samples["nfe"].to_pylist(), *more["nfe"].to_pylist()]
    alone = [*samples["seconds_alone"].to_pylist(), *more["seconds_alone"].to_pylist()]
    assert alone[LATENCY_SAMPLES:] == [None, None]
    assert sum(alone[:LATENCY_SAMPLES]) == pytest.approx(sum(nfe[:LATENCY_SAMPLES]))
    warm_ups = 2 * 2  # of each slice: its batch and one row alone, a forward each
    batched = len(forwards) - sum(nfe[:LATENCY_SAMPLES]) - warm_ups
    seconds = [*samples["seconds"].to_pylist(), *more["seconds"].to_pylist()]
    assert sum(seconds) == pytest.approx(batched)
    assert batched < sum(nfe) / 2, "batches share forwards"
    assert rows == [5, 1, 5, 1], "a single prompt has the threads of a command that decodes it"
    assert set(samples["hardware"].to_pylist()) == {"threads for 5"}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_warm_up_needs_no_more_memory_than_what_it_warms_up_for(file: Path) -> None:
    """The whole response as one block would have `gen_length` positions of logits, 8 times the estimate."""
    config = load_config(BenchmarkConfig, file)
    sweeps = [sweep.decoding for sweep in config.sweeps.values()]
    llada = DiffusionConfig(
        vocab_size=126464,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        mask_token_id=126336,
    )
    prompts = [[5] * 100, [5] * 80]
    for decoding in (config.reference, *config.fixed.values(), *sweeps):
        filled, warm = warm_up(prompts, decoding)
        lengths = [len(prompt) + warm.gen_length for prompt in filled]
        assert lengths == [len(prompt) + decoding.gen_length for prompt in prompts], "canvases as long"
        needed, planned = (row_bytes(llada, max(lengths), each, torch.bfloat16) for each in (warm, decoding))
        assert needed <= planned


@pytest.mark.parametrize("mode", ["sequential", "multi_block", "revising", "pipelined"])
def test_a_warm_up_is_one_forward_that_reads_one_block(mode: Any) -> None:
    model, shapes = random_model(), []
    model.register_forward_hook(lambda module, arguments, logits: shapes.append(tuple(logits.shape[:2])))
    decoding = DecodingConfig(gen_length=24, block_length=6, mode=mode)
    generate(model, *warm_up([[5, 6, 7], [5, 6]], decoding), 2)
    assert shapes == [(2, 6)]


@pytest.mark.parametrize(
    ("total", "batch_size", "compiled", "sizes"),
    [
        (1319, 64, False, {219: 1, 220: 5}),  # at most 4 batches of 64
        (1319, 8, False, {62: 4, 63: 17}),  # at most 64 problems, for 4 batches of 8 are few
        (1319, 64, True, {1319: 1}),
        (64, 1, False, {64: 1}),
        (65, 1, False, {32: 1, 33: 1}),
    ],
)
def test_slices_are_even_and_cover_all_problems(
    total: int, batch_size: int, compiled: bool, sizes: dict[int, int]
) -> None:
    parts = slices(total, batch_size, DECODING.model_copy(update={"compile": compiled}))
    assert [row for part in parts for row in part] == list(range(total))
    lengths = [len(part) for part in parts]
    assert {length: lengths.count(length) for length in lengths} == sizes


def test_a_key_is_of_what_is_decoded_and_not_of_how(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(config: BenchmarkConfig, model: str = "teacher", decoding: DecodingConfig = DECODING) -> str:
        return Bench(config, inputs, tmp_path).samples_key(model, "test", decoding)

    first = key(settings())
    assert key(settings(batch_size=3)) == first
    assert key(settings(max_loss=0.5, sweep_test=True)) == first
    prefilled = {**COINS, "split": "test", "protocol": {"prefill": "7"}}
    others = [
        key(settings(), "student/other"),
        key(settings(), decoding=DECODING.model_copy(update={"threshold": 0.1})),
        key(settings(test={**COINS, "split": "test", "count": 2})),
        key(settings(test=prefilled)),
    ]
    monkeypatch.setattr("dparallel.evaluation.bench.code_digest", lambda modules: "another version")
    others.append(key(settings()))
    assert len({first, *others}) == 6
    assert set(code.DECODING) >= {"decoding/denoise.py", "models/backbone.py"}


def test_only_missing_slices_are_asked_for_whatever_the_batch_size(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_BATCHES", 1)
    monkeypatch.setattr("dparallel.evaluation.bench.SLICE_PROBLEMS", 1)
    case = [Case("teacher", "entropy", DECODING), Case("teacher", "the same", DECODING)]
    bench = Bench(settings(batch_size=5), inputs, tmp_path)
    assert [each.slice for each in bench.missing(case, "test")] == [(0, 5), (5, 10)]
    make_units(bench.config, inputs, tmp_path, [unit(rows=(0, 5))])
    assert [each.slice for each in bench.missing(case, "test")] == [(5, 10)]
    smaller = Bench(settings(batch_size=2), inputs, tmp_path)
    assert [each.slice for each in smaller.missing(case, "test")] == [(4, 6), (6, 8), (8, 10)]
    decode.decode_here(smaller, smaller.missing(case, "test"))
    assert not bench.missing(case, "test")
    assert bench.samples(bench.samples_key("teacher", "test", DECODING), "test")["row"].to_pylist() == list(
        range(10)
    )


def test_a_unit_is_plain_json() -> None:
    assert json.loads(json.dumps(unit())) == unit()
    assert Unit.model_validate(unit()).model_dump(mode="json") == unit()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (unit(model="pupil"), "model 'pupil'; the models are teacher, student/other"),
        (unit(rows=(5, 11)), r"slice \[5, 11\]; the 10 test problems"),
        (unit(rows=(5, 5)), r"slice \[5, 5\]"),
        ({"model": "teacher"}, "{'model': 'teacher'} is no unit: Field required"),
    ],
)
def test_a_unit_that_the_benchmark_does_not_have_is_refused(
    inputs: dict[str, str], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_units(settings(), inputs, tmp_path, [unit(), wrong])
    assert not list(tmp_path.iterdir()), "no unit is decoded"


def test_one_model_is_in_memory_at_every_moment_and_none_at_the_end(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[DiffusionTransformer]] = []
    alive, loaded = [], []

    def living() -> int:
        return sum(model() is not None for model in models)

    def counted(path: str) -> DiffusionTransformer:
        alive.append(living())
        loaded.append(path)
        model = load_model(path)
        models.append(weakref.ref(model))
        model.register_forward_pre_hook(lambda module, arguments: alive.append(living() - 1))
        return model

    monkeypatch.setattr(loader, "load_model", counted)
    units = [unit(model, rows) for rows in ((0, 5), (5, 10)) for model in ("student/other", "teacher")]
    certainty = unit("teacher", (0, 1), kind="certainty")
    make_units(settings(), inputs, tmp_path, [*units, certainty])
    assert loaded == [inputs["student/other"], inputs["teacher"]], "each once"
    assert set(alive) == {0}, "none while one is loaded, and no other while one decodes"
    assert living() == 0
    make_units(settings(), inputs, tmp_path, units)
    assert len(loaded) == 2, "what is there is not decoded again"


def test_what_another_process_decodes_meanwhile_is_kept(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system has no locks; the other process finishes while this one decodes the same unit."""
    monkeypatch.setattr(files, "_lock", lambda file: True)
    bench, units = Bench(settings(), inputs, tmp_path), [unit(rows=(0, 5)), unit(rows=(5, 10))]
    key = bench.samples_key("teacher", "test", DECODING)

    def overtaken(*arguments: Any) -> Any:
        samples = sample(*arguments)
        if not bench.store.has_samples(key, range(10)):
            with monkeypatch.context() as other_process:
                other_process.setattr(decode, "sample", sample)
                other_process.setattr(decode, "hardware", lambda: "theirs")
                make_units(settings(), inputs, tmp_path, units)
        return samples

    monkeypatch.setattr(decode, "sample", overtaken)
    make_units(settings(), inputs, tmp_path, units)
    assert set(bench.samples(key, "test")["hardware"].to_pylist()) == {"theirs"}


def test_two_that_need_the_same_samples_decode_them_once(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experiments of a folder of runs, with the same teacher."""
    decoded, start = list[int](), threading.Barrier(2)

    def counted(model: Any, tokenizer: Any, prompts: Any, *arguments: Any) -> Any:
        decoded.append(len(prompts))
        return sample(model, tokenizer, prompts, *arguments)

    def make(_: int) -> None:
        start.wait()
        make_units(settings(), inputs, tmp_path, [unit(rows=(0, 5)), unit(rows=(5, 10)), certain])

    certain = {**unit(rows=(0, 1)), "kind": "certainty"}
    monkeypatch.setattr(decode, "sample", counted)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, range(2)))
    assert decoded == [5, 5]
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.gpu
def test_no_memory_of_the_gpu_is_held_after_decoding(inputs: dict[str, str], tmp_path: Path) -> None:
    make_units(settings(), inputs, tmp_path / "first", [unit()])  # what cuBLAS keeps for good
    before = torch.cuda.memory_reserved()
    make_units(settings(), inputs, tmp_path / "second", [unit(), unit("student/other")])
    assert torch.cuda.memory_reserved() <= before


def test_decoding_ends_at_a_stop_text_of_the_protocol(inputs: dict[str, str], tmp_path: Path) -> None:
    """The words of the responses are the same up to the stop; the forward passes after it are not spent."""
    plain = Bench(settings(), inputs, tmp_path)
    make_units(settings(), inputs, tmp_path, [unit()])
    whole = plain.samples(plain.samples_key("teacher", "test", DECODING), "test")
    stop = max((text.split() for text in whole["text"].to_pylist()), key=len)[1]
    with_stop = settings(test={**COINS, "split": "test", "protocol": {"stops": [stop]}})
    bench = Bench(with_stop, inputs, tmp_path)
    key = bench.samples_key("teacher", "test", DECODING)
    assert key != plain.samples_key("teacher", "test", DECODING)
    assert bench.samples_key("teacher", "validation", DECODING) == plain.samples_key(
        "teacher", "validation", DECODING
    )
    make_units(with_stop, inputs, tmp_path, [unit()])
    samples = bench.samples(key, "test")
    pairs = zip(samples["text"].to_pylist(), whole["text"].to_pylist(), strict=True)
    assert all(short == long.partition(stop)[0] for short, long in pairs)
    assert sum(samples["nfe"].to_pylist()) < sum(whole["nfe"].to_pylist())
    assert sum(samples["num_tokens"].to_pylist()) < sum(whole["num_tokens"].to_pylist())

    published = DECODING.model_copy(update={"stop_at_eos": False})  # stop texts do not affect decoding
    assert bench.samples_key("teacher", "test", published) == plain.samples_key("teacher", "test", published)


def test_texts_of_samples_that_serve_all_stop_texts_are_whole(inputs: dict[str, str]) -> None:
    """Without `stop_at_eos`, protocols with other stop texts find the same samples."""
    model, tokenizer = load_model(inputs["teacher"]), load_tokenizer(inputs["teacher"])
    prompts = [[token + 5, 7] for token in range(4)]
    published = DECODING.model_copy(update={"stop_at_eos": False})

    def texts(decoding: DecodingConfig, *stops: str) -> list[str]:
        return sample(model, tokenizer, prompts, decoding, 4, LATENCY_SAMPLES, stops)["text"].to_pylist()

    whole = texts(published)
    stop = max(whole, key=len)[1:4]
    assert texts(published, stop) == whole
    assert texts(DECODING, stop) != whole

import itertools
import json
import math
import re

import pytest
import torch

from benchmarks.common.hardware import Forward, Limits, flops, measure_limits, recorded, traffic, weight_count
from benchmarks.common.shapes import SHAPES, random_model, random_workload, several_blocks, teacher_workload
from benchmarks.common.tables import table
from benchmarks.common.timing import Row, Timing
from benchmarks.decoding import best_batch, differing_share, main, one_by_one, summarise
from benchmarks.decoding_report import COLUMNS, TEXTS, Mark, Result, cpu_marks, gpu_marks, marks_table
from dparallel import DecodingConfig, generate
from dparallel.decoding.canvas import Generation
from dparallel.models.backbone import DiffusionConfig
from tests.benchmarks.tables import cells
from tests.conftest import random_model as tiny_random_model

CPU = torch.device("cpu")
# D 4, two heads of 2, one key/value head (E 2), feed-forward 3, two layers, vocabulary 5.
SMALL = DiffusionConfig(
    vocab_size=5,
    hidden_size=4,
    intermediate_size=3,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mask_token_id=4,
)


def test_flops_and_bytes_by_hand():
    """Two rows of three tokens that attend to seven keys each; logits are read at four positions.

    Weights of a layer: query and output 2·4·4 = 32, key and value 2·4·2 = 16, feed-forward 3·4·3 = 36;
    84 in total. Weights of the head: 4·5 = 20.
    """
    forward = Forward(rows=2, width=3, attended=7, read=4)
    first_layer = 6 * (2 * 84 + 4 * 7 * 4)  # six tokens: matrices; scores and mixing of seven keys
    last_layer = 6 * 2 * 16 + 4 * (2 * (32 + 36) + 4 * 7 * 4)
    head = 4 * 2 * 20
    assert flops(forward, SMALL) == first_layer + last_layer + head == 3024
    weights, keys_and_values, logits = 2 * 84 + 20, 2 * (2 * 7) * (2 + 2), 4 * 5
    assert traffic(forward, SMALL, itemsize=2) == 2 * (weights + keys_and_values + logits) == 640
    assert weight_count(SMALL) == 2 * 84 + 20 + 20


def test_weights_are_those_of_the_model():
    model = random_model(SHAPES["tiny-2l"].config, CPU, torch.float32)
    matrices = sum(each.numel() for each in model.parameters() if each.dim() == 2)
    assert weight_count(model.config) == matrices
    assert weight_count(SHAPES["llada-8b"].config) == pytest.approx(8.0e9, rel=0.01)


def test_recorded_shapes_are_those_sent():
    model = tiny_random_model()
    ids = torch.zeros(2, 6, dtype=torch.long)
    read = torch.zeros(2, 6, dtype=torch.bool)
    read[0, :3] = True
    with recorded(model) as forwards:
        model(ids)
        model(ids, logits_at=torch.zeros(2, 4, dtype=torch.long))
        model(ids, None, read)
    model(ids)
    assert forwards == [Forward(2, 6, 6, 12), Forward(2, 6, 6, 8), Forward(2, 6, 6, 3)]


def test_recorded_schedules_follow_the_cache():
    """Two blocks of four in two forwards each: `dual` computes a block where the canvas is cached."""
    model = tiny_random_model()
    decoding = {"gen_length": 8, "block_length": 4, "rule": "steps", "steps": 4, "stop_at_eos": False}
    for cache, widths in (("none", [11, 11, 11, 11]), ("prefix", [11, 8, 11, 4]), ("dual", [11, 4, 11, 4])):
        with recorded(model) as forwards:
            generate(model, [[5, 6, 7]], DecodingConfig(**decoding, cache=cache))
        assert [each.width for each in forwards] == widths
        assert {each.attended for each in forwards} == {11}
    with recorded(model) as forwards:
        one_by_one(model, [[5, 6, 7]], DecodingConfig(**decoding), 1)
    assert forwards == [Forward(1, 11, 11, 11)] * 4


def test_limits_are_those_of_the_fastest_round(monkeypatch):
    """A copy of 128 MiB reads and writes; a product of two 1024 x 1024 matrices; at best half a second."""
    seconds = itertools.cycle([2.0, 0.5, 1.0])
    monkeypatch.setattr("benchmarks.common.hardware.timed", lambda run, device: (run(), next(seconds)))
    limits = measure_limits(CPU, torch.float32)
    assert limits == Limits(bandwidth=2 * 2**27 / 0.5, matrix_rate=2 * 2**30 / 0.5)


def test_random_weights_are_the_same_numbers_in_every_dtype():
    config = SHAPES["tiny-2l"].config
    wide, narrow = (random_model(config, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(wide.lm_head.weight, narrow.lm_head.weight.float())
    assert wide.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_budget_takes_the_place_of_steps():
    """64 tokens in 16 steps: the entropy of four uniform predictions."""
    decoding = random_workload(SHAPES["tiny-8l"]).decoding
    several = several_blocks(decoding, vocabulary=100)
    assert (several.rule, several.mode, several.steps) == ("entropy_budget", "multi_block", None)
    assert several.threshold == pytest.approx(4 * math.log(100))
    entropy = several_blocks(DecodingConfig(gen_length=8, block_length=4, threshold=0.3), 100)
    assert (entropy.rule, entropy.mode, entropy.threshold) == ("entropy", "multi_block", 0.3)


def test_teacher_workload_judges_solutions():
    workload = teacher_workload()
    model = workload.build(CPU, torch.float32)
    prompts = workload.prompts(4)
    generations = generate(model, prompts, workload.decoding)
    share, stderr = workload.accuracy(generations)
    assert share >= 0.5
    assert stderr == pytest.approx(math.sqrt(share * (1 - share) / 4))
    wrong = [Generation([0] * 36, [0] * 36, [1.0] * 36, 1, 36)] * 4
    assert workload.accuracy(wrong) == (0, 0)


def generation(tokens: list[int], nfe: int = 4, num_tokens: int | None = None) -> Generation:
    steps = [0] * len(tokens)
    return Generation(tokens, steps, [1.0] * len(tokens), nfe, num_tokens or len(tokens))


def test_differing_share_by_hand():
    """Five tokens count, including the end of sequence, and one differs; positions after it do not count."""
    reference = [generation([7, 8, 2, 9], num_tokens=3), generation([7, 2, 2, 2], num_tokens=2)]
    ours = [generation([7, 9, 2, 2]), generation([7, 2, 5, 5])]
    assert differing_share(ours, reference) == pytest.approx(1 / 5)
    assert differing_share(ours[1:], reference[1:]) == 0


def test_summary_by_hand():
    """Twelve tokens in two calls; ratios are paired by round before the median is taken."""
    model = tiny_random_model()
    forwards = [Forward(1, 8, 8, 8), Forward(1, 8, 8, 4)]
    decoding = DecodingConfig(gen_length=4, block_length=4)
    tokens = [generation([5, 6, 7, 8])] * 3
    oracle = Timing(Row("oracle", decoding), [], forwards, tokens, [4.0, 8.0, 6.0])
    fast = Timing(Row("fast", decoding, 3), [], forwards, tokens, [1.0, 4.0, 2.0])
    work = [flops(each, model.config) for each in forwards]
    limits = Limits(bandwidth=1e30, matrix_rate=sum(work))
    result = summarise(fast, oracle, tokens, model, limits, None)
    assert result.tokens_per_second == pytest.approx(12 / 2)
    assert result.ratio == pytest.approx(3)  # of 4, 2 and 3
    assert result.ms == pytest.approx(1000)
    assert result.limit_ms == pytest.approx(500)
    assert result.of_limit == pytest.approx(0.5)
    assert result.limit_ratio == pytest.approx(6)
    assert (result.bound, result.differing, result.accuracy, result.peak_bytes) == ("compute", 0, None, None)
    memory = summarise(fast, oracle, tokens, model, Limits(1e3, 1e30), None)
    assert memory.bound == "memory"
    assert (
        memory.limit_ms
        == memory.memory_ms
        == pytest.approx(sum(traffic(each, model.config, 4) for each in forwards) / 2)
    )
    once = Timing(Row("slow", decoding), [], forwards, tokens, [2.0])
    assert summarise(once, oracle, tokens, model, limits, None).ratio == pytest.approx(2)


def test_best_batch_is_the_smallest_that_comes_close():
    def timing(batch_size, seconds, run=generate):
        row = Row("", DecodingConfig(gen_length=4, block_length=4), batch_size, run=run)
        return Timing(row, [], [], [generation([5, 6, 7, 8])], [seconds])

    timings = [timing(1, 3.0), timing(4, 1.0), timing(8, 0.98), timing(1, 0.1, run=one_by_one)]
    assert best_batch(timings) == 4
    assert best_batch([*timings, timing(16, 0.9)]) == 16


def result(**values) -> Result:
    usual = {
        "name": "dual cache",
        "dtype": "float32",
        "batch_size": 1,
        "exact": True,
        "compiled": False,
        "decoding": {"mode": "sequential", "cache": "none"},
        "seconds": [1.0],
        "tokens": 100,
        "tokens_per_second": 100.0,
        "ratio": 4.0,
        "nfe": 8.0,
        "forwards": 8,
        "ms": 2.0,
        "limit_ms": 0.5,
        "memory_ms": 0.1,
        "compute_bound": True,
        "peak_bytes": None,
        "differing": 0.0,
        "accuracy": None,
        "accuracy_stderr": None,
    }
    return Result(**{**usual, **values})


def test_cpu_marks():
    rows = [result(), result(ratio=9.0, exact=False), result(batch_size=32, ratio=9.5), result(ratio=2.0)]
    one, many = cpu_marks(rows)
    assert (one.measured, one.met) == (4.0, True)
    assert "2.00 ms per forward, 0.50 at the limit (compute), which allows 16.0 times" in one.holds
    assert (many.measured, many.wanted, many.met) == (9.5, 10, False)
    assert cpu_marks([result(dtype="bfloat16")]) == []


def test_gpu_marks():
    dual = {
        "dtype": "bfloat16",
        "decoding": {"mode": "sequential", "cache": "dual"},
        "ms": 2.8,
        "memory_ms": 2.0,
    }
    rows = [
        result(**dual, limit_ms=2.2),
        result(**{**dual, "ms": 3.5}, tokens_per_second=80.0),
        result(**dual, batch_size=16, tokens_per_second=550.0, limit_ms=1.1),
        result(**{**dual, "decoding": {"mode": "multi_block", "cache": "dual"}}, tokens_per_second=900.0),
    ]
    near, batch = gpu_marks(rows)
    assert (near.measured, near.met) == (pytest.approx(1.4), True)
    assert (batch.measured, batch.met) == (pytest.approx(5.5), False)
    assert "with both at the limit 11.0 times" in batch.holds  # 5.5 / (1.1/2.8) * (2.2/2.8)
    assert gpu_marks([result()]) == []
    _, first, second = cells(marks_table([near, Mark("x", 3.0, ">=", 2, "y")]))
    what = "dual cache, batch 1: times the bandwidth's time per forward"
    assert first[:4] == [what, "<= 1.5", "1.40", "yes"]
    assert second == ["x", ">= 2", "3.00", "yes", "y"]


def test_table_cells():
    row = result(exact=False, differing=0.034, accuracy=0.96, accuracy_stderr=0.0123, peak_bytes=3 * 2**30)
    titles, line = cells(table([row], COLUMNS, TEXTS))
    assert titles == list(COLUMNS)
    expected = "≈ dual cache|float32||1|100|4.00|8.0|2.00|25%|compute|3.0|3.40% differ|96.0 ± 1.2"
    assert line == expected.split("|")


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes most of a minute; results of compiled steps are tested with the decoders."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)


@pytest.mark.slow
def test_one_command_one_table(capsys, tmp_path, uncompiled):
    out = tmp_path / "decoding.json"
    main(["--prompts", "4", "--batch-sizes", "4", "--repeat", "1", "--device", "cpu", "--out", str(out)])
    printed = capsys.readouterr().out
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {"hardware", "threads", "torch", "commit"} <= record["machine"].keys()
    rows = record["rows"]
    assert [row["name"] for row in rows[:6]] == [
        "oracle: everything computed",
        "generate: only what is read",
        "+ end-of-text stop",
        "+ compile",
        "+ batches, refilled",
        "batches that wait for their slowest row",
    ]
    exact = [row for row in rows if row["exact"]]
    assert len({row["tokens"] for row in exact}) == 1
    assert {row["differing"] for row in exact} == {0}
    assert rows[0]["ratio"] == 1
    names = [row["name"] for row in rows if not row["exact"]]
    assert len(names) >= 5
    assert {"prefix cache", "dual cache", "several blocks", "several blocks, dual cache"} == {
        name.removesuffix(", compiled") for name in names
    }
    assert all(row["of_limit"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    lines = cells(printed)
    assert any(set(line) & {"yes", "no"} for line in lines if len(line) == 5), "the mark of batch 1"
    assert len([line for line in lines if line[0].startswith("≈ ")]) == len(names)


@pytest.mark.slow
def test_random_shape_in_two_dtypes(capsys, uncompiled):
    """Rows with a fixed number of forward passes; bf16 is compared with float32's tokens; no targets."""
    main(["--shape", "tiny-2l", "--dtype", "bfloat16", "float32", "--batch-sizes", "2", "--repeat", "1"])
    printed, said = capsys.readouterr()
    assert re.search(r"^generate: only what is read, batch 1 \.\.\. \d+ tokens/s, ", said, re.M)
    lines = cells(printed)
    rows = lines[1:]
    assert [line[1] for line in rows] == sorted((line[1] for line in rows), reverse=True)
    sequential = [line for line in rows if "several" not in line[0]]
    assert {line[6] for line in sequential} == {"8.0"}
    assert not any("end-of-text" in line[0] or "wait" in line[0] for line in rows)
    assert not any("mark" in line[0] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llada-9b"], "choose from .*'?llada-8b'?,.* '?tiny-2l'?, '?tiny-8l'?"),
        (["--batch-sizes", "0"], "'0': give a whole number of at least 1"),
        (["--prompts", "8", "--batch-sizes", "16"], "--prompts 8 does not fill batches of 16"),
        (["--decoding", "cache=dual"], "--decoding cache=: give KEY=VALUE with a key of gen_length"),
        (["--decoding", "threshold"], "--decoding threshold: give KEY=VALUE"),
        (["--decoding", "gen_length=35"], "gen_length=35 is not divisible by block_length=12"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert_matches(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--shape", "llada-8b"],
            r"--shape llada-8b needs a GPU, .* \(.*tiny-8l, tiny-2l\), or give --device cpu",
        ),
        (["--device", "cuda"], r"--device cuda: torch sees no GPU here; .* --device cpu"),
    ],
)
def test_a_missing_gpu_is_named_with_the_remedy(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert_matches(message, capsys.readouterr().err)


def assert_matches(message: str, text: str) -> None:
    assert re.search(message, " ".join(text.split())), text

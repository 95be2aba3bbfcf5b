import json
import re

import pytest
import torch

from benchmarks.common.hardware import recorded
from benchmarks.common.shapes import SHAPES, random_workload
from benchmarks.modes import as_next_token_model, committing, main, measure


@pytest.mark.slow
def test_every_row_commits_as_much_as_told(tmp_path, capsys):
    """16 tokens in blocks of 8, half a block per forward pass: 4 forward passes; token by token 16."""
    out = tmp_path / "result.json"
    command = [
        "--shape",
        "tiny-2l",
        "--commit-share",
        "0.5",
        "--batch-sizes",
        "1",
        "2",
        "--repeat",
        "1",
        "--compile",
    ]
    main([*command, "--device", "cpu", "--out", str(out)])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    printed, said = capsys.readouterr()
    assert len(re.findall(r"^.+, batch [12] \.\.\. \d+ tokens/s, \d+\.\d\d ms/forward$", said, re.M)) == 20
    assert [row["batch_size"] for row in rows] == [1] * 10 + [2] * 10
    for row in rows:
        assert row["name"] in printed
        wanted = 16 if row["name"].startswith("autoregressive") else 4
        assert row["nfe"] == pytest.approx(wanted, abs=1)  # an entropy budget is met approximately
    assert rows[0]["ratio"] == 1
    width = {row["name"]: row["width"] for row in rows[:10]}
    assert width["sequential"] == width["revising"] == 24  # a prompt of 8 and all 16
    assert width["autoregressive, exact cache"] == pytest.approx((9 + 15) / 16)  # prompt and a mask, then 1
    assert width["pipelined, exact cache"] < width["pipelined, no cache"] < 24


def test_a_second_model_shares_the_weights_and_changes_nothing_of_the_first():
    model = random_workload(SHAPES["tiny-2l"]).build(torch.device("cpu"), torch.float32)
    ids, read = torch.arange(6)[None], torch.tensor([[1, 2, 3, 4, 5]])
    before = model(ids, None, read)
    with recorded(model) as forwards:
        second = as_next_token_model(model)
        shifted = second(ids, None, read)
    assert len(forwards) == 1
    assert second.lm_head.weight is model.lm_head.weight
    assert second.config.end_token_ids == (second.config.mask_token_id,), "it ends no response"
    assert (second.config.predicts_next, second.config.attention_pattern) == (True, "causal")
    assert (model.config.predicts_next, model.config.attention_pattern) == (False, None)
    assert torch.equal(model(ids, None, read), before)
    assert not torch.equal(shifted, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--commit-share", "0.3"], r"0.3 of a block of 8 is 2.4 tokens: .* such as 0.125"),
        (["--commit-share", "0"], "give more than 0, at most 1"),
        (["--block-add-threshold", "1.5"], "give more than 0, at most 1"),
    ],
)
def test_bad_shares_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["--shape", "tiny-2l", "--device", "cpu", *options])
    assert re.search(message, capsys.readouterr().err)


def test_rows_that_take_minutes_to_compile_are_left_out():
    results, _ = measure(committing(SHAPES["tiny-2l"], 0.5), torch.device("cpu"), torch.float32, [1], 0.5, 1)
    assert [each.name for each in results if "compiled" in each.name] == []
    assert len(results) == 9


@pytest.mark.gpu
def test_a_small_shape_on_a_gpu():
    workload = committing(SHAPES["tiny-8l"], 0.25)
    results, _ = measure(workload, torch.device("cuda"), torch.bfloat16, [1], 0.5, 1, compiled=True)
    assert all(each.peak_bytes for each in results)

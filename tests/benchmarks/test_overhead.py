import pytest
import torch

from benchmarks import overhead
from benchmarks.common.plain_loop import plain_loop
from dparallel.decoding.generate import generate

PROMPTS = torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(1)).tolist()

# Operations of torch for a forward pass of the model, which itself takes about a hundred. A row above its
# limit does something that its mode does not need.
LIMITS = {
    "sequential, batch 1": 171,
    "dual cache, batch 1": 199,
    "several blocks, batch 1": 171,
    "autoregressive, batch 1": 190,
    "pipelined, batch 1": 213,
}


def test_the_plain_loop_gives_the_same_tokens():
    model = overhead.random_model("full")
    plain, ours = (loop(model, PROMPTS, overhead.SEQUENTIAL, 1) for loop in (plain_loop, generate))
    assert [(each.tokens, each.commit_step, each.nfe) for each in plain] == [
        (each.tokens, each.commit_step, each.nfe) for each in ours
    ]
    assert max(each.nfe for each in ours) < 64, "a threshold that commits several tokens"


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_has_few_operations(name):
    [row] = [row for row in overhead.rows() if row.name == name]
    assert overhead.operations(row, overhead.random_model(row.model), PROMPTS) <= LIMITS[name]


@pytest.mark.slow
def test_rows_are_timed_and_compared(capsys):
    overhead.main(["--repeat", "1", "--prompts", "2"])
    printed = capsys.readouterr().out
    for row in overhead.rows():
        assert f"| {row.name} " in printed


def test_compiled_rows_are_those_of_generate():
    added = overhead.rows(compiled=True)[len(overhead.rows()) :]
    assert [row.name for row in added] == [
        f"{row.name}, compiled" for row in overhead.rows() if row.run is generate
    ]
    assert all(row.decoding.compile for row in added)


@pytest.mark.gpu
def test_rows_are_timed_on_a_gpu(capsys):
    overhead.main(["--repeat", "1", "--prompts", "2", "--device", "cuda", "--compile"])
    assert "| pipelined, batch 1, compiled " in capsys.readouterr().out

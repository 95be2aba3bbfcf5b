"""Dream: its sampler, and block-wise decoding of a model that predicts the next position."""

import json

import pytest

from dparallel import generate, load_model
from dparallel.decoding.oracle import decode_one
from tests.conftest import GOLDEN
from tests.dparallel.decoding.golden_cases import decoding_of

CASES = json.loads((GOLDEN / "dream_decode.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dream_tiny():
    return load_model(GOLDEN / "dream_tiny", device="cpu")


def test_published_samplers_give_the_same(dream_tiny):
    assert len(CASES) == 36
    for case in CASES:
        decoding = decoding_of(case)
        for generation in (
            generate(dream_tiny, [case["prompt"]], decoding)[0],
            decode_one(dream_tiny, case["prompt"], decoding),
        ):
            assert generation.tokens == case["tokens"]
            assert generation.nfe == case.get("nfe", generation.nfe)


def test_in_one_batch(dream_tiny):
    for decoding in {decoding_of(case) for case in CASES}:
        cases = [case for case in CASES if decoding_of(case) == decoding]
        generations = generate(dream_tiny, [case["prompt"] for case in cases], decoding, batch_size=3)
        assert [each.tokens for each in generations] == [case["tokens"] for case in cases]

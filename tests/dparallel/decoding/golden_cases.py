"""Recorded decodings of the published loops, by feature."""

import json
from typing import Any

from dparallel import DecodingConfig, Generation
from tests.conftest import GOLDEN

Case = dict[str, Any]


def _load() -> dict[str, list[Case]]:
    cases: dict[str, list[Case]] = {}
    for case in json.loads((GOLDEN / "llada_decode.json").read_text(encoding="utf-8")):
        cases.setdefault(case.get("cache", case["rule"]), []).append(case)
    multi_block = json.loads((GOLDEN / "multi_block_decode.json").read_text(encoding="utf-8"))
    pipelined = json.loads((GOLDEN / "d2f_decode.json").read_text(encoding="utf-8"))
    return cases | {
        "multi_block": [{**case, "mode": "multi_block"} for case in multi_block],
        "pipelined": [
            {**case, "mode": "pipelined", "threshold": case["skip_threshold"]} for case in pipelined
        ],
        "pipelined_uncached": [
            {**case, "mode": "pipelined", "threshold": case["skip_threshold"], "cache": "none"}
            for case in pipelined
        ],
    }


CASES = _load()  # steps, entropy, confidence, prefix, dual, multi_block, pipelined, pipelined_uncached
assert sum(len(cases) for cases in CASES.values()) == 68 + 36 + 2 * 36


def decoding_of(case: Case) -> DecodingConfig:
    """The published loops never stop early."""
    known = {key: value for key, value in case.items() if key in DecodingConfig.model_fields}
    return DecodingConfig(**known, stop_at_eos=False)


def assert_agrees(generation: Generation, case: Case) -> None:
    """Tokens and NFE; cached loops spend an extra forward pass on blocks that their first one completed."""
    # The published pipeline truncates its tokens after an end-of-sequence token.
    published = (
        generation.tokens[: len(case["tokens"])] if case.get("mode") == "pipelined" else generation.tokens
    )
    assert published == case["tokens"]
    if "nfe" in case:
        assert generation.nfe == case["nfe"]
    else:
        assert generation.nfe <= case["reference_nfe"]

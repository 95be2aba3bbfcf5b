"""Diffusion language models of other architectures, which are refused by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Unsupported(NamedTuple):
    """A family that cannot be loaded.

    Attributes:
        models: its published models.
        needs: what its models compute that this package does not.
    """

    models: str
    needs: str


MOE = "layers of experts with a router"
BLOCKS = "attention by blocks in which the prompt is divided, too"

UNSUPPORTED = {  # by model_type
    "lladamoe": Unsupported("LLaDA-MoE-7B-A1B", MOE),
    "llada2_moe": Unsupported(
        "LLaDA2.0 and LLaDA2.1", f"{MOE}, rotary positions on a part of each head, and {BLOCKS}"
    ),
    "sdar": Unsupported("SDAR and TraDo", f"{BLOCKS}, of 4 to 64 positions"),
    "sdar_moe": Unsupported("SDAR-30B-A3B", f"{MOE}, and {BLOCKS}"),
    "Fast_dLLM_Qwen": Unsupported(
        "Fast-dLLM v2", f"{BLOCKS}, with logits shifted within a block, and sub-blocks"
    ),
    "diffusion_gemma": Unsupported(
        "DiffusionGemma", "Gemma's layers, and decoding from random tokens instead of masks"
    ),
    "a2d-qwen2": Unsupported("dllm's Qwen2.5 models", "an entry in FORMATS, since only names differ"),
    "a2d-qwen3": Unsupported("dllm's Qwen3 models", "an entry in FORMATS, since only names differ"),
    "a2d-llama": Unsupported("dllm's Llama models", "an entry in FORMATS, since only names differ"),
}
ALSO = {"llada21_moe": "llada2_moe"}  # other model_types of the same families


def unsupported(raw: Mapping[str, Any]) -> str | None:
    """Why the model of a config.json cannot be loaded, as part of a message; None if it is none of these."""
    kind = str(raw.get("model_type"))
    if kind == "llada" and "num_experts" in raw:  # as LLaDA-MoE is published
        kind = "lladamoe"
    found = UNSUPPORTED.get(ALSO.get(kind, kind))
    if found is None:
        return None
    return f"is of {found.models} (model_type={raw['model_type']!r}), which needs {found.needs}"

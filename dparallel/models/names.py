"""Names of tensors and modules in checkpoints of other projects, and their native names."""

import re
from collections.abc import Mapping
from functools import cached_property


class Names:
    """A one-to-one map between the native names of modules and those of a format."""

    def __init__(self, layers: str = "layers", **modules: str):
        """Store the names of a format.

        Args:
            layers: the list of layers, such as `model.layers`.
            modules: names by native name with `__` for dots, of the modules outside the layers and of those
                within a layer. Modules that are not listed keep their native names.
        """
        named = {native.replace("__", "."): name for native, name in modules.items()}
        self._layers = layers
        self._top = {native: named[native] for native in TOP if native in named}
        self._inner = {native: named[native] for native in LAYER if native in named}
        assert named.keys() == {*self._top, *self._inner}, "a name of no module"

    def native(self, name: str) -> str:
        """The native name of a tensor or module; unknown names are returned unchanged.

        `model.transformer.blocks.0.attn_out.weight` of LLaDA is `layers.0.attention.o_proj.weight`.
        """
        top, inner = self._natively
        if found := re.fullmatch(rf"{re.escape(self._layers)}\.(\d+)\.(.+)", name):
            return f"layers.{found[1]}.{_renamed(found[2], inner)}"
        return _renamed(name, top)

    def published(self, native: str) -> str:
        """The name in this format of a tensor or module; the inverse of `native`."""
        if found := re.fullmatch(r"layers\.(\d+)\.(.+)", native):
            return f"{self._layers}.{found[1]}.{_renamed(found[2], self._inner)}"
        return _renamed(native, self._top)

    @cached_property
    def _natively(self) -> tuple[dict[str, str], dict[str, str]]:
        top, inner = ({name: native for native, name in names.items()} for names in (self._top, self._inner))
        return top, inner


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The new name of a module, or of one of its tensors."""
    module, _, parameter = name.rpartition(".")
    if name in names:
        return names[name]
    return f"{names[module]}.{parameter}" if module in names else name


TOP = ("embedding", "norm", "lm_head")
LAYER = (
    "attention_norm",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "attention.q_norm",
    "attention.k_norm",
    "feed_forward_norm",
    "feed_forward.gate_proj",
    "feed_forward.up_proj",
    "feed_forward.down_proj",
)

NATIVE = Names()
LLADA = Names(
    layers="model.transformer.blocks",
    embedding="model.transformer.wte",
    norm="model.transformer.ln_f",
    lm_head="model.transformer.ff_out",
    attention_norm="attn_norm",
    attention__q_proj="q_proj",
    attention__k_proj="k_proj",
    attention__v_proj="v_proj",
    attention__o_proj="attn_out",
    feed_forward_norm="ff_norm",
    feed_forward__gate_proj="ff_proj",
    feed_forward__up_proj="up_proj",
    feed_forward__down_proj="ff_out",
)
# Of Llama, Qwen2, Qwen3 and Dream.
LLAMA = Names(
    layers="model.layers",
    embedding="model.embed_tokens",
    norm="model.norm",
    lm_head="lm_head",
    attention_norm="input_layernorm",
    **{f"attention__{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"attention__{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    feed_forward_norm="post_attention_layernorm",
    **{f"feed_forward__{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
)

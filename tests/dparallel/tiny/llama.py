"""Our weights as a Llama of `transformers`: the same layers with other names and causal attention."""

from transformers import LlamaConfig, LlamaForCausalLM

from dparallel.models.backbone import DiffusionTransformer

NAMES = {
    "embedding.": "model.embed_tokens.",
    "layers.": "model.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".attention.": ".self_attn.",
    ".feed_forward_norm.": ".post_attention_layernorm.",
    ".feed_forward.": ".mlp.",
}


def as_llama(model: DiffusionTransformer) -> LlamaForCausalLM:
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=None,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    llama.load_state_dict({_name(name): tensor for name, tensor in model.state_dict().items()}, strict=True)
    return llama.eval()


def _name(ours: str) -> str:
    if ours == "norm.weight":
        return "model.norm.weight"
    for old, new in NAMES.items():
        ours = ours.replace(old, new)
    return ours

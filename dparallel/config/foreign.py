"""Names of settings of decoding in published samplers and other libraries, and what to give here instead.

Each is refused with its sentence wherever a setting of decoding can be written: in configs, as an option of a
command, in `DecodingConfig` and in the body of a request.
"""

SUPPRESS = "only the end-of-sequence token can be suppressed: give suppress_eos: true"
IN_CHECKPOINT = "it is read from the checkpoint: correct it in its config.json"

FOREIGN_SETTINGS: dict[str, str] = {
    # Not built in.
    "cfg_scale": "classifier-free guidance (LLaDA), a second forward pass without the prompt, is not built "
    "in: leave it out, which is its default 0",
    "alg_temp": "Dream's random choice of positions is not built in: leave it out, which is its default 0; "
    "tokens are drawn with a temperature",
    "eps": "the end of Dream's schedule always is its default 0.001: leave it out",
    "confidence_eos_eot_inf": "ranking end tokens last (LLaDA) is not built in: give suppress_eos: true, or "
    "a block_length well below gen_length, which also avoids early ends",
    "suppress_tokens": SUPPRESS,
    "begin_suppress_tokens": SUPPRESS,
    "min_p": "it is not built in: give top_p or top_k",
    "repetition_penalty": "it is not built in: leave it out, which is its default 1",
    "num_return_sequences": "decode the prompt several times with other seeds; requests have n",
    "output_history": "the argument observe of generate is told every forward pass, --trace writes a page",
    # Other names.
    "remasking": "LLaDA's low_confidence is rule: steps, or with a threshold rule: confidence (Fast-dLLM) or "
    "rule: entropy (dParallel); random is not built in",
    "alg": "Dream's entropy, maskgit_plus and topk_margin are rule: dream_entropy, dream_maskgit_plus and "
    "dream_topk_margin; confidence_threshold and entropy_threshold are rule: confidence and rule: entropy; "
    "origin is not built in",
    "logits_eos_inf": "give suppress_eos: true",
    "early_stop": "d3LLM's early stop is stop_at_eos: true with eos_fill: immediate",
    "cache_delay_iter": "give settle_rounds",
    "refresh_interval": "give refresh_every",
    "skip_threshold": "D2F's smallest probability of a token is threshold, with rule: confidence",
    "use_cache": "give cache: prefix, or another one that goes with the mode",
    "dual_cache": "give cache: dual",
    "generation_method": "give mode: multi_block, or another mode",
    "diffusion_steps": "give steps, with rule: steps or one of Dream's",
    "max_length": "give gen_length, the length of the response without the prompt",
    "max_new_tokens": "give gen_length, a multiple of block_length",
    "do_sample": "give a temperature above 0, and a seed",
    "mask_id": IN_CHECKPOINT,
    "mask_token_id": IN_CHECKPOINT,
    "eos_token_id": IN_CHECKPOINT,
}

FOREIGN_RULES: dict[str, str] = {
    "low_confidence": "it is LLaDA's name of steps, and with a threshold of confidence or entropy",
    "random": "a random choice of positions (LLaDA) is not built in: give steps (the most confident)",
    "origin": "Dream's random choice of positions is not built in: give dream_entropy",
    "maskgit_plus": "give dream_maskgit_plus",
    "topk_margin": "give dream_topk_margin, or margin with a threshold",
    "confidence_threshold": "give confidence",
    "entropy_threshold": "give entropy",
}

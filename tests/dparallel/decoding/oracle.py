"""A slow, obvious decoder for one row: the truth that the batched one must equal."""

import torch


def decode_one(model, prompt, gen_length, block_length, rule, threshold=None, steps=None, stop_at_eos=True):
    """Returns (tokens, commit_step, nfe). The whole canvas is computed at every forward, in float64."""
    mask, eos = model.config.mask_token_id, model.config.eos_token_id
    canvas = list(prompt) + [mask] * gen_length
    commit_step = [None] * gen_length
    nfe = 0
    for start in range(len(prompt), len(canvas), block_length):
        block = range(start, start + block_length)
        for step in range(block_length):
            masked = [i for i in block if commit_step[i - len(prompt)] is None]
            if not masked:
                break
            with torch.no_grad():
                logits = model(torch.tensor([canvas]))[0].double()
            probability = logits.softmax(-1)
            entropy = {i: float(-(probability[i] * probability[i].log()).sum()) for i in masked}
            logits[:, mask] = -torch.inf
            token = {i: int(logits[i].argmax()) for i in masked}
            confidence = {i: float(probability[i, token[i]]) for i in masked}
            if rule == "steps":
                steps_per_block = steps // (gen_length // block_length)
                count = block_length // steps_per_block + (step < block_length % steps_per_block)
                chosen = sorted(masked, key=lambda i: -confidence[i])[:count]
            elif rule == "confidence":
                best = max(masked, key=lambda i: confidence[i])
                chosen = [i for i in masked if confidence[i] >= threshold or i == best]
            else:
                best = min(masked, key=lambda i: entropy[i])
                chosen = [i for i in masked if entropy[i] <= threshold or i == best]
            for i in chosen:
                canvas[i] = token[i]
                commit_step[i - len(prompt)] = nfe
            nfe += 1
            if stop_at_eos and _ended(canvas[len(prompt) :], commit_step, eos):
                last = nfe - 1
                rest = [step is None for step in commit_step]
                tokens = [eos if open_ else t for t, open_ in zip(canvas[len(prompt) :], rest, strict=True)]
                return tokens, [last if step is None else step for step in commit_step], nfe
    return canvas[len(prompt) :], commit_step, nfe


def _ended(response, commit_step, eos):
    for token, step in zip(response, commit_step, strict=True):
        if step is None:
            return False
        if token == eos:
            return True
    return False

"""LLaDA's and Dream's checkpoints with plain `transformers`, and a decoder of their own.

An export has a copy of this file beside the weights, and loads where dparallel is not installed:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    tokens, nfe = model.generate(input_ids)

The section `dparallel` of config.json holds the shape of the model, the names of the weights and the settings
of decoding.
"""

from typing import Any

import torch
from torch import Tensor

from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer

RULES = ("steps", "confidence", "entropy")


class PublishedConfig(DiffusionConfig):
    """A publisher's config.json with the section `dparallel`."""

    def __init__(self, dparallel: dict[str, Any] | None = None, **fields: Any):
        section = dparallel or {}
        super().__init__(**{**fields, **section.get("model", {})})
        self.dparallel = section


class LladaConfig(PublishedConfig):
    """LLaDA's."""

    model_type = "llada"

    def __init__(self, **fields: Any):  # transformers gives classes without one another constructor
        super().__init__(**fields)


class DreamConfig(PublishedConfig):
    """Dream's."""

    model_type = "Dream"

    def __init__(self, **fields: Any):
        super().__init__(**fields)


class PublishedModel(DiffusionTransformer):
    """A model whose weights have the publisher's names."""

    config_class = PublishedConfig  # type: ignore[assignment]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: Any, *arguments: Any, config: Any = None, **settings: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`."""
        if config is None:
            config = cls.config_class.from_pretrained(path)
        settings.setdefault("key_mapping", config.dparallel["names"])
        return super().from_pretrained(path, *arguments, config=config, **settings)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **settings: Any) -> tuple[Tensor, list[int]]:
        """Fill masks after the prompts, block by block; every row takes its own forward passes.

        Args:
            input_ids: int64 (B, P), prompts without padding.
            settings: gen_length, block_length, rule (steps, confidence or entropy), threshold, steps and
                stop_at_eos, where they differ from those in config.json.

        Returns:
            int64 (B, P + gen_length), and the number of forward passes of each row.

        Raises:
            ValueError: an unknown setting or rule, or the model is not of full attention.
        """
        if self.config.attention_pattern not in ("full", None):
            raise ValueError(
                f"attention_pattern={self.config.attention_pattern!r} (config.json): generate decodes models "
                "of full attention; take dparallel.load_model and dparallel.generate"
            )
        stated = self.config.dparallel["decoding"]
        if unknown := sorted(settings.keys() - {"threshold", "steps", *stated}):
            raise ValueError(f"{unknown[0]}: unknown setting; known: {', '.join(stated)}")
        settings = {**stated, **settings}
        if settings["rule"] not in RULES:
            raise ValueError(f"rule={settings['rule']!r}; known: {', '.join(RULES)}")
        rows = [self._fill(row[None], **settings) for row in input_ids]
        return torch.cat([canvas for canvas, _ in rows]), [nfe for _, nfe in rows]

    def _fill(
        self,
        prompt: Tensor,
        gen_length: int,
        block_length: int,
        rule: str,
        stop_at_eos: bool,
        threshold: float | None = None,
        steps: int | None = None,
    ) -> tuple[Tensor, int]:
        mask, ends, first = self.config.mask_token_id, self.config.end_token_ids, prompt.shape[1]
        canvas = torch.cat([prompt, prompt.new_full((1, gen_length), mask)], dim=1)
        blocks, nfe = gen_length // block_length, 0
        for start in range(first, first + gen_length, block_length):
            passes = 0
            while len(at := start + (canvas[0, start : start + block_length] == mask).nonzero()[:, 0]):
                logits = self(canvas, logits_at=at[None])[0]  # (n, V)
                token, score, chosen = _predict(logits, mask, rule, threshold)
                if rule == "steps":
                    quota, extra = divmod(block_length, (steps or gen_length) // blocks)
                    order = score.argsort(descending=True, stable=True)
                    chosen[order[: quota + (passes < extra)]] = True
                chosen[score.argmax()] = True
                canvas[0, at[chosen]] = token[chosen]
                nfe, passes = nfe + 1, passes + 1
                response = canvas[0, first:].tolist()
                end = next((place for place, token in enumerate(response) if token in ends), None)
                if stop_at_eos and end is not None and mask not in response[:end]:
                    return canvas.masked_fill(canvas == mask, ends[0]), nfe
        return canvas, nfe


class LladaModel(PublishedModel):
    """LLaDA."""

    config_class = LladaConfig  # type: ignore[assignment]


class DreamModel(PublishedModel):
    """Dream."""

    config_class = DreamConfig  # type: ignore[assignment]


def _predict(logits: Tensor, mask: int, rule: str, threshold: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token, score and whether the threshold selects it, for logits (n, V)."""
    log_probability = logits.float().log_softmax(-1)
    token = log_probability.index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf).argmax(-1)
    others = log_probability.exp().scatter(-1, token[:, None], 0.0)
    doubt = others.sum(-1)  # 1 - p, exact where p rounds to 1
    if rule != "entropy":
        limit = -1.0 if rule == "steps" or threshold is None else max(1 - threshold, 2.0**-53)
        return token, -doubt, doubt <= limit
    own = log_probability.gather(-1, token[:, None])[:, 0]
    own = (-doubt).log1p().where(doubt < 0.5, own.clamp(min=-1e4))
    entropy = -(others * log_probability.clamp(min=-1e4)).sum(-1) - own.exp() * own
    return token, -entropy, entropy <= (threshold if threshold is not None else -1.0)

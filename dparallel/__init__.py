"""dparallel: make masked diffusion language models decode in parallel."""

from dparallel.config import DecodingConfig
from dparallel.decoding import Generation, generate
from dparallel.models.checkpoints import load_model, load_tokenizer, save_model

__all__ = ["DecodingConfig", "Generation", "generate", "load_model", "load_tokenizer", "save_model"]

"""dparallel: make masked diffusion language models decode in parallel."""

import os

import torch

if not torch.cuda.is_available():  # before transformers or peft import deepspeed, which would guess, and warn
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation
from dparallel.decoding.generate import generate
from dparallel.models.checkpoints import load_model, load_tokenizer, save_model

__all__ = ["DecodingConfig", "Generation", "generate", "load_model", "load_tokenizer", "save_model"]

"""Shared fixtures. Tests never touch a network; two threads would only fight on small machines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import load_model, save_model
from dparallel.tiny.tokenizer import build_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def random_model(seed: int = 0, **shape) -> DiffusionTransformer:
    """A small random model whose predictions are far from uniform, so that rules have to choose."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "mask_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = DiffusionTransformer(DiffusionConfig(**{**defaults, "initializer_range": 0.3, **shape}))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> DiffusionTransformer:
    return random_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model of the coins vocabulary with its tokenizer, in our own format."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    save_model(random_model(), folder, tokenizer=build_tokenizer())
    return folder


@pytest.fixture(scope="session")
def llada_tiny() -> DiffusionTransformer:
    return load_model(GOLDEN / "llada_tiny", device="cpu")

"""Keep at most one model in memory, and none when its work is done."""

import gc
from collections.abc import Callable, Mapping
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.checkpoints import load_model, load_tokenizer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Loader:
    """Loads models by name; the previous model is released before the next one is read.

    Used as a context manager: at the end, the model is released and cached GPU memory is returned, so that
    processes started afterwards can use it. Callers must not keep references beyond that.
    """

    def __init__(self, paths: Mapping[str, str]):
        self.paths = paths
        self._name: str | None = None
        self._loaded: tuple[DiffusionTransformer, PreTrainedTokenizerBase] | None = None

    def load(self, name: str) -> tuple[DiffusionTransformer, PreTrainedTokenizerBase]:
        """Model and tokenizer of `paths[name]`; read from disk unless it is the model loaded last."""
        if self._loaded is None or name != self._name:
            self.release()
            self._loaded = load_model(self.paths[name]), load_tokenizer(self.paths[name])
            self._name = name
        return self._loaded

    def release(self) -> None:
        """Drop the loaded model and return its memory to the device."""
        if self._loaded is not None:
            self._loaded = None
            release_memory()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def release_memory() -> None:
    """Return memory of unreferenced tensors to the device for use by other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def releasing_memory(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate `work` so that memory of its models and tensors is returned to the device afterwards."""

    @wraps(work)
    def released(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return work(*arguments, **named)
        finally:
            release_memory()

    return released

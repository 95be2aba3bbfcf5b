"""One model in memory at a time, and none once the work with it is done."""

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
    """Loads models by name and lets go of the previous one before it reads the next.

    A context: at its end the model is released and a GPU's cached memory returned, so that a process
    started next finds it free. Callers must not keep references of their own beyond that.
    """

    def __init__(self, paths: Mapping[str, str]):
        self.paths = paths
        self._name: str | None = None
        self._loaded: tuple[DiffusionTransformer, PreTrainedTokenizerBase] | None = None

    def load(self, name: str) -> tuple[DiffusionTransformer, PreTrainedTokenizerBase]:
        """The model and tokenizer at `paths[name]`, read from disk unless they were asked for last."""
        if self._loaded is None or name != self._name:
            self.release()
            self._loaded = load_model(self.paths[name]), load_tokenizer(self.paths[name])
            self._name = name
        return self._loaded

    def release(self) -> None:
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
    """Return to the device what unreferenced tensors held; other processes may need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def releasing_memory(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`work`, after which the memory of its models and tensors is returned to the device."""

    @wraps(work)
    def released(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return work(*arguments, **named)
        finally:
            release_memory()

    return released

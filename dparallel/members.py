"""Members of the public API that need torch or transformers, imported when they are first used.

Importing these libraries takes seconds, which `dparallel --help` and programs that only read settings save.
"""

import importlib
import sys
from typing import Any

PACKAGE = sys.modules["dparallel"]
MODULES = {  # where members are defined; the types of the same names are declared in dparallel/__init__.py
    "ChatTemplateError": "dparallel.problems.prompts",
    "CheckpointError": "dparallel.models.formats",
    "Completion": "dparallel.completion",
    "DecodingError": "dparallel.decoding.canvas",
    "Generation": "dparallel.decoding.canvas",
    "Step": "dparallel.decoding.canvas",
    "complete": "dparallel.completion",
    "generate": "dparallel.decoding.generate",
    "load_model": "dparallel.models.checkpoints",
    "load_tokenizer": "dparallel.models.checkpoints",
    "save_model": "dparallel.models.checkpoints",
}


def member(name: str) -> Any:
    """A member of the package that is not imported yet; Python calls it where the package lacks a name.

    Raises:
        AttributeError: the package has no such member.
    """
    if name not in MODULES:
        raise AttributeError(f"module 'dparallel' has no attribute {name!r}", name=name, obj=PACKAGE)
    found = getattr(importlib.import_module(MODULES[name]), name)
    setattr(PACKAGE, name, found)
    return found


def members() -> list[str]:
    """Names of the public API, for `dir` and the pages of `pydoc`."""
    return sorted({*vars(PACKAGE), *PACKAGE.__all__})

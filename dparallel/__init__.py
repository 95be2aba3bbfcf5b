"""dparallel: make masked diffusion language models decode in parallel."""

from typing import TYPE_CHECKING

from dparallel.stages import starting as starting  # first: it handles Ctrl-C while the others are imported

# isort: split
from dparallel.config.base import ConfigError, UserError
from dparallel.config.decoding import DecodingConfig
from dparallel.rules.rules import RULES
from dparallel.version import __version__

if TYPE_CHECKING:
    from dparallel.completion import Completion, complete
    from dparallel.decoding.canvas import DecodingError, Generation, Step
    from dparallel.decoding.generate import generate
    from dparallel.models.checkpoints import load_model, load_tokenizer, save_model
    from dparallel.models.formats import CheckpointError
    from dparallel.problems.prompts import ChatTemplateError
else:  # these need torch and transformers, and are imported when they are used
    from dparallel.members import member as __getattr__  # noqa: F401
    from dparallel.members import members as __dir__  # noqa: F401

__all__ = [
    "RULES",
    "ChatTemplateError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DecodingConfig",
    "DecodingError",
    "Generation",
    "Step",
    "UserError",
    "__version__",
    "complete",
    "generate",
    "load_model",
    "load_tokenizer",
    "save_model",
]

"""Settings of a student that is trained already: a published adapter."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from dparallel.config.base import ADAPTER, RECIPE, Config
from dparallel.config.paths import PathOrHubId
from dparallel.config.recipe import RecipeConfig


class AdapterConfig(Config):
    """A student that is not trained here: a LoRA adapter of the teacher, which is merged and measured.

    Args:
        adapter: folder or Hugging Face Hub id, in PEFT's layout. Its modules may have the names of the
            teacher's publisher.
        attention: attention pattern that the adapter was trained with: `full`, or `block_causal` as D2F's.
    """

    adapter: PathOrHubId
    attention: Literal["full", "block_causal"] = "full"


def _kind(value: Any) -> str:
    named = isinstance(value, Mapping) and "adapter" in value
    return ADAPTER if named or isinstance(value, AdapterConfig) else RECIPE


Student = Annotated[
    Annotated[RecipeConfig, Tag(RECIPE)] | Annotated[AdapterConfig, Tag(ADAPTER)], Discriminator(_kind)
]

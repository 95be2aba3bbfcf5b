"""The file generation_config.json of a checkpoint: token ids of its publisher, and decode defaults of ours.

Decode defaults are an object under the key `dparallel`, which transformers keeps and does not read. They say
how a model is decoded and do not change the model: digests of a model's files leave them out, so that results
made with the model stay valid when other defaults are chosen.
"""

import json
from collections.abc import Mapping
from typing import Any

GENERATION, KEY = "generation_config.json", "dparallel"
EMPTY = b"{}\n"  # the content without decode defaults, where there was no file before


def with_defaults(content: bytes, defaults: Mapping[str, Any] | None) -> bytes:
    """The content of the file with other decode defaults, in the layout that `without_defaults` returns.

    Args:
        content: a JSON object; `EMPTY` if there is no file.
        defaults: JSON values; None to have none.
    """
    fields = {name: value for name, value in json.loads(content).items() if name != KEY}
    if defaults is not None:
        fields[KEY] = dict(defaults)
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode() if fields else EMPTY


def without_defaults(content: bytes) -> bytes:
    """The content of the file without decode defaults; as it is if it has none or is damaged."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return with_defaults(content, None) if isinstance(fields, dict) and KEY in fields else content

"""Files that a reader finds whole or not at all."""

import os
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

"""Pages in a real browser."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")


def in_a_browser(page: str, folder: Path, *options: str) -> str:
    """The document as text after the page's scripts have run."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder}/user",
        *options,
        "--dump-dom",
        f"file://{file}",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, encoding="utf-8")
    return ran.stdout

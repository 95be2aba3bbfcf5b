"""Pages of help, and what a mistyped command line is told."""

import json
import subprocess
import sys

COMMANDS = (
    "init",
    "generate",
    "chat",
    "plan",
    "eval",
    "compare",
    "runs",
    "clean",
    "merge",
    "export",
    "fit-rule",
)


def test_help_and_version_import_no_large_library() -> None:
    """They answer within half a second; torch and transformers alone take several."""
    code = """
import contextlib, io, json, sys
from dparallel.cli.main import main
pages = {}
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main(arguments)
    pages[" ".join(arguments)] = page.getvalue()
large = {"torch", "transformers", "huggingface_hub", "datasets", "numpy", "scipy", "pyarrow", "matplotlib"}
print(json.dumps([pages, sorted(large & set(sys.modules))]))
"""
    asked = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], capture_output=True, encoding="utf-8", check=True
    )
    pages, large = json.loads(done.stdout)
    assert large == []
    assert pages.pop("--version").startswith("dparallel ")
    for command, page in pages.items():
        assert page.startswith("usage: dparallel"), command
    assert all(f"    {command} " in pages["--help"] for command in COMMANDS)

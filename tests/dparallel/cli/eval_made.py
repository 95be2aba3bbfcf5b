"""Commands of `dparallel eval` for tests."""

from pathlib import Path

SHAPE = ["--gen-length", "8", "--block-length", "8", "--threshold", "10"]


def command(checkpoint: Path, data: Path, *protocols: str) -> list[str]:
    named = [word for protocol in protocols for word in ("--protocol", protocol)]
    return ["eval", "--model", str(checkpoint), *named, "--path", str(data), "--limit", "8", *SHAPE]

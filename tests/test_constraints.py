"""The pinned versions install from any package index, on every Python version that is supported."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_pin_names_a_build_of_one_machine() -> None:
    """PyPI has no versions such as `2.13.0+cpu`."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin), pin

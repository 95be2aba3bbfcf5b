"""The pinned versions install from any package index, on every Python version that is supported."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_pin_names_a_build_of_one_machine() -> None:
    """PyPI has no versions such as `2.13.0+cpu`."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin), pin


def test_extras_are_found_by_every_pip() -> None:
    """Older versions of pip, such as that of Python 3.11.7, know an extra by its normalised name alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", extra) for extra in extras)
    named = set()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("dparallel/**/*.py"),
        ROOT / ".ci/run",
    ):
        for group in re.findall(r"(?:dparallel|'\.)\[([a-z0-9_,-]+)\]", path.read_text(encoding="utf-8")):
            named |= set(group.split(","))
    assert "lm-eval" in named
    assert named <= extras

"""A digest of the code follows its statements, and only the modules that determine a result."""

import ast
import shutil
from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.stages import code
from dparallel.stages.code import MODULES, PACKAGE, code_digest, statements_digest

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's source."""
    return Path(
        shutil.copytree(PACKAGE, tmp_path / "dparallel", ignore=shutil.ignore_patterns("__pycache__"))
    )


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_changed_loss_changes_the_digest_of_training_alone(package: Path) -> None:
    before = {stage: code_digest(stage, package) for stage in MODULES}
    assert before == {stage: code_digest(stage) for stage in MODULES}
    edit(package / "distillation" / "losses.py", "return ", "return 0.5 * ")
    changed = {stage for stage in MODULES if code_digest(stage, package) != before[stage]}
    assert changed == {"training"}


def test_a_changed_commit_rule_changes_what_is_decoded(package: Path) -> None:
    before = {stage: code_digest(stage, package) for stage in MODULES}
    with (package / "decoding" / "rules.py").open("a", encoding="utf-8") as file:
        file.write("\nMORE = 1\n")
    changed = {stage for stage in MODULES if code_digest(stage, package) != before[stage]}
    assert changed == {"trajectories", "benchmark"}


def test_a_list_of_modules_has_a_digest_too(package: Path) -> None:
    modules = ["distillation/losses.py", "models/*.py"]
    before = code_digest(modules, package)
    assert before == code_digest(modules[::-1], package)
    assert before != code_digest(modules[:1], package)
    with (package / "models" / "another.py").open("w", encoding="utf-8") as file:
        file.write("NEW = 1\n")
    assert code_digest(modules, package) != before
    with pytest.raises(ConfigError, match=r"losess\.py: no such module"):
        code_digest(["distillation/losess.py"], package)


STATEMENTS = '''
"""A module."""

def half(x: int) -> float:
    """Half of x."""
    if x < 0:
        raise ValueError(f"x={x} is negative")  # never
    log.info("halving %d", x)
    return x / 2
'''


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("A module.", "Another docstring.", False),
        ("# never", "# another comment", False),
        ("x / 2", "(x/\n            2)", False),
        ("is negative", "is below 0", False),
        ("halving %d", "dividing %d by two", False),
        ('    """Half of x."""\n', "", False),
        ("x / 2", "x / 3", True),
        ("x / 2", "x // 2", True),
        ("x < 0", "x < 1", True),
        ("raise ValueError", "raise TypeError", True),
        ("x: int", "x: int = 4", True),
        ("return x / 2", 'return "x / 2"', True),
    ],
)
def test_statements_count_and_prose_does_not(tmp_path: Path, old: str, new: str, counts: bool) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(STATEMENTS, encoding="utf-8")
    other.write_text(STATEMENTS, encoding="utf-8")
    edit(other, old, new)
    ast.parse(other.read_text(encoding="utf-8"))
    assert (statements_digest(one) != statements_digest(other)) == counts


@pytest.mark.parametrize("stage", ["trajectories", "training", "merging"])
def test_a_digest_can_be_vouched_for_on_the_command_line(stage: str) -> None:
    digest = code_digest(stage)
    changed = load_config(DistillConfig, CONFIGS / "tiny.yaml", [f"code.{stage}={digest}"])
    assert changed.code == {stage: digest}
    with pytest.raises(ConfigError, match=f"code.{stage}"):
        load_config(DistillConfig, CONFIGS / "tiny.yaml", [f"code.{stage}=no-digest"])


def test_a_stage_whose_folder_is_its_users_has_no_digest() -> None:
    assert code.code_digest("teacher") is None

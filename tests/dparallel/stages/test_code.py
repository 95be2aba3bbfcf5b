"""A code digest changes with statements, and only for modules that determine a result."""

import ast
import runpy
import shutil
from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import DistillConfig, MergingConfig, TrajectoriesConfig
from dparallel.config.files import load_config
from dparallel.config.problems import LM_EVAL, ProblemsConfig
from dparallel.problems import scoring
from dparallel.rules.rules import RULES
from dparallel.stages import code
from dparallel.stages.code import MODULES, PACKAGE, code_digest, rule_digest, stage_digest, statements_digest

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


def digests(package: Path) -> dict[str, str]:
    return {stage: code_digest(modules, package) for stage, modules in MODULES.items()}


def test_a_changed_loss_changes_the_digest_of_training_alone(package: Path) -> None:
    before = digests(package)
    assert before == digests(PACKAGE)
    edit(package / "distillation" / "losses.py", "return ", "return 0.5 * ")
    changed = {stage for stage, digest in digests(package).items() if digest != before[stage]}
    assert changed == {"training"}


def test_a_changed_commit_rule_changes_what_is_decoded(package: Path) -> None:
    before = digests(package)
    with (package / "rules" / "rules.py").open("a", encoding="utf-8") as file:
        file.write("\nMORE = 1\n")
    changed = {stage for stage, digest in digests(package).items() if digest != before[stage]}
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

half = rule(published="a paper", threshold=Parameter(meaning="a share", most=1))(half)

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
        ("a paper", "another paper", False),
        ("a share", "a larger share", False),
        ("most=1", "most=2", True),
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
    digest = code_digest(MODULES[stage])
    changed = load_config(DistillConfig, CONFIGS / "tiny.yaml", [f"code.{stage}={digest}"])
    assert changed.code == {stage: digest}
    with pytest.raises(ConfigError, match=f"code.{stage}"):
        load_config(DistillConfig, CONFIGS / "tiny.yaml", [f"code.{stage}=no-digest"])


def test_a_stage_whose_folder_is_its_users_has_no_digest() -> None:
    assert stage_digest("teacher", MergingConfig()) is None


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("rules/declaration.py", {"trajectories", "benchmark"}),
        ("rules/rules.py", {"trajectories", "benchmark"}),
        ("decoding/predictions.py", {"trajectories", "benchmark"}),
        ("models/end_tokens.py", {"trajectories", "training", "merging", "benchmark"}),
        ("models/formats.py", {"trajectories", "training", "merging", "benchmark"}),
        ("decoding/token_lists.py", {"trajectories", "benchmark"}),
        ("problems/prompts.py", {"trajectories", "benchmark"}),
        ("trajectories/rows.py", {"trajectories"}),
        ("distillation/engine.py", {"training"}),
        ("evaluation/selection.py", {"benchmark"}),
        ("problems/scoring.py", set()),  # the table of scorers
        ("problems/tables.py", set()),  # problems that differ are noticed themselves
        ("problems/answers.py", set()),  # only where a protocol names its scorer
        ("stages/lease.py", set()),
    ],
)
def test_which_stages_a_module_determines(package: Path, module: str, stages: set[str]) -> None:
    before = digests(package)
    with (package / module).open("a", encoding="utf-8") as file:
        file.write("\nMORE = 1\n")
    assert {stage for stage, digest in digests(package).items() if digest != before[stage]} == stages


def test_the_scorers_that_a_protocol_names_count_and_no_others() -> None:
    def digest(scorers: list[str]) -> str | None:
        problems = {
            "benchmark": "dataset",
            "sources": [{"path": "x.jsonl"}],
            "protocol": {"scorers": scorers},
        }
        decoding = {"gen_length": 4, "block_length": 4}
        return stage_digest("trajectories", TrajectoriesConfig(problems=problems, decoding=decoding))

    assert digest(["exact"]) == digest(["flexible_extract"])  # one module
    assert digest(["coins"]) != digest(["exact"]) != digest(["coins", "exact"])
    assert digest(["coins"]) == code_digest(
        [*MODULES["trajectories"], "problems/embedded.py", "problems/coins.py"]
    )
    assert digest(["of_another_package"]) == code_digest(MODULES["trajectories"])


def test_the_modules_of_every_scorer_are_known() -> None:
    assert set(code.SCORERS) == {*scoring.SCORERS, LM_EVAL}
    for modules in code.SCORERS.values():
        code_digest(modules)


SCRIPT = """
from dparallel.rules.declaration import Choice, Parameter
from dparallel.rules.rules import rule

@rule(threshold=Parameter(meaning="anything"))
def of_a_script(prediction, masked, context, *, threshold):
    "Commits {what}."
    return Choice(prediction.probability, {what})
"""


def test_a_rule_of_a_script_counts_with_its_file(tmp_path: Path) -> None:
    def stage(rule: str) -> str | None:
        decoding = DecodingConfig(rule=rule, threshold=0.5)
        return stage_digest(
            "trajectories",
            TrajectoriesConfig(problems=ProblemsConfig(benchmark="coins", count=2), decoding=decoding),
        )

    before, digests = stage("entropy"), list[str | None]()
    try:
        for number, what in enumerate(("masked", "masked & False")):
            script = tmp_path / f"script_{number}.py"
            script.write_text(SCRIPT.format(what=what), encoding="utf-8")
            runpy.run_path(str(script))
            digests += [rule_digest("of_a_script"), stage("of_a_script")]
        assert len({before, *digests}) == 5
        assert (rule_digest("entropy"), stage("entropy")) == (None, before)
        exec(compile(SCRIPT.format(what="~masked"), "<stdin>", "exec"), {})  # as in an interactive session
        assert rule_digest("of_a_script") not in {None, *digests}
    finally:
        del RULES["of_a_script"]

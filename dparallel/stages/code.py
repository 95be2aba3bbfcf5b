"""The code version of a stage: a digest of the modules that determine its result.

Only statements count. Docstrings, comments, formatting, error messages and log messages may change
without invalidating existing results.
"""

import ast
import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType
from typing import Any

from dparallel.config.base import Config, ConfigError
from dparallel.config.experiment import MergingConfig, StudentConfig, TrajectoriesConfig
from dparallel.config.problems import EMBEDDED, ProblemsConfig
from dparallel.rules.rules import RULES

PACKAGE = Path(__file__).parents[1]

# Reading a model's files, the tokens that end a response, and the forward pass.
MODEL = (
    "models/backbone.py",
    "models/attention.py",
    "models/checkpoints.py",
    "models/config_file.py",
    "models/end_tokens.py",
    "models/formats.py",
    "models/names.py",
    "models/weights.py",
)
DECODING = (
    *MODEL,
    "rules/*.py",
    "decoding/predictions.py",
    "decoding/denoise.py",
    "decoding/plan.py",
    "decoding/advance.py",
    "decoding/patterns.py",
    "decoding/transfer.py",
    "decoding/revision.py",
    "decoding/blocks.py",
    "decoding/ends.py",
    "decoding/canvas.py",
    "decoding/loop.py",
    "decoding/sampling.py",
    "decoding/stops.py",
    "decoding/cache.py",
    "decoding/generate.py",
    "decoding/token_lists.py",
    "models/commit_rule.py",
)
STOPS = ("problems/stops.py",)
PROMPTS = ("problems/prompts.py", *STOPS)  # rendering problems, and where a response ends
CODE_TESTS = (
    "problems/code_tests.py",
    "problems/programs.py",
    "problems/pruning.py",
    "problems/effects.py",
    "problems/sandbox/*.py",
    "problems/sandbox/inside/*.py",
)
# Modules by scorer. Adding a scorer in a module of its own leaves existing results valid.
SCORERS: dict[str, tuple[str, ...]] = {
    "exact": ("problems/answers.py",),
    "flexible_extract": ("problems/answers.py",),
    **{task: ("problems/embedded.py", f"problems/{task}.py") for task in EMBEDDED},
    "strict_match": ("problems/answers.py", "problems/gsm8k.py"),
    "strict_match_cot": ("problems/answers.py", "problems/gsm8k.py"),
    "boxed": ("problems/answers.py", "problems/gsm8k.py", "problems/latex.py"),
    "math_verify": ("problems/mathematics.py", "problems/latex.py"),
    "minerva": ("problems/mathematics.py", "problems/latex.py"),
    "humaneval": CODE_TESTS,
    "mbpp": CODE_TESTS,
    "lm_eval": ("problems/lm_eval_data.py", "problems/lm_eval_metrics.py"),
}
# As few modules per stage as possible: changes of other modules keep existing results valid. Modules that
# read problems are not listed, since a stage compares the problems themselves.
MODULES: dict[str, tuple[str, ...]] = {
    "trajectories": (*DECODING, *PROMPTS, "trajectories/schema.py", "trajectories/rows.py"),
    "training": (
        *MODEL,
        "models/lora.py",
        "config/recipe.py",
        "config/recipe_parts.py",
        "distillation/losses.py",
        "distillation/corruption.py",
        "distillation/recipe.py",
        "distillation/batches.py",
        "distillation/data.py",
        "distillation/engine.py",
        "distillation/optimizer.py",
        "distillation/quantization.py",
        "distillation/rollouts.py",
        "distillation/state.py",
        "distillation/trainer.py",
    ),
    "merging": (
        *MODEL,
        "distillation/merging.py",
        "models/adapters.py",
        "models/lora.py",
    ),
    "benchmark": (*DECODING, *PROMPTS, "evaluation/*.py"),
}
FITTING = (  # of a commit rule, in merging
    "distillation/commit_rule.py",
    "models/commit_rule.py",
    "rules/*.py",
    "decoding/predictions.py",
    "decoding/patterns.py",
)
IMPORTING = ("problems/columns.py", "trajectories/importing.py")  # of trajectories that are not recorded


def stage_digest(stage: str, config: Config) -> str | None:
    """Digest of the code of a stage, including the scorers that its settings name.

    Returns:
        The digest; None for stages whose folder the user names, such as the tiny teacher's.
    """
    modules = MODULES.get(stage)
    if modules is None:
        return None
    if getattr(config, "imported", None) is not None:
        modules = (*modules, *IMPORTING)
    if isinstance(config, StudentConfig) and config.recipe.rollouts is not None:
        modules = (*modules, *DECODING)
    if isinstance(config, MergingConfig) and config.commit_rule is not None:
        modules = (*modules, *FITTING)
    if isinstance(config, TrajectoriesConfig) and config.privileged is not None:
        modules = (*modules, "trajectories/privileged.py")
    protocols = [section.protocol for _, section in config if isinstance(section, ProblemsConfig)]
    scorers = {name for protocol in protocols for name in protocol.scorers}
    package = code_digest({*modules, *(module for name in scorers for module in scorer_modules(name))})
    own = sorted(filter(None, map(rule_digest, set(_rules(config.model_dump(mode="json"))))))
    return "c" + hashlib.sha256(repr((package, own)).encode()).hexdigest()[:11] if own else package


def rule_digest(name: str) -> str | None:
    """Digest of a commit rule that a script registered; None for those of the package."""
    return source_digest(RULES[name].choose)


def source_digest(function: Callable[..., Any]) -> str | None:
    """Digest of the file that defines a function, or of its bytecode where there is no file.

    None for functions of this package, whose modules are listed in `MODULES` and `SCORERS`.
    """
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if not isinstance(code, CodeType):  # written in another language
        return hashlib.sha256(repr(type(function)).encode()).hexdigest()
    file = Path(code.co_filename)
    if file.is_relative_to(PACKAGE):
        return None
    try:
        return _own_digest(file)
    except (OSError, SyntaxError, ValueError):
        return hashlib.sha256(repr(_bytecode(code)).encode()).hexdigest()


def _bytecode(code: CodeType) -> Any:
    constants = [_bytecode(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return code.co_code, code.co_names, constants


def _rules(settings: Any) -> Iterator[str]:
    """The commit rules in a configuration."""
    if isinstance(settings, dict):
        if isinstance(rule := settings.get("rule"), str) and rule in RULES:
            yield rule
        settings = list(settings.values())
    if isinstance(settings, list):
        for part in settings:
            yield from _rules(part)


def scorer_modules(name: str) -> tuple[str, ...]:
    """Modules of a scorer by its name; `lm_eval:TASK` is a scorer of `lm_eval`."""
    return SCORERS.get(name.partition(":")[0], ())


def code_digest(of: Iterable[str], package: Path = PACKAGE) -> str:
    """Digest of the statements of modules: `c` followed by eleven hexadecimal digits.

    The letter makes it a text in YAML and on the command line.

    Args:
        of: module paths inside the package; `*` matches any characters.
        package: source folder of the package.

    Raises:
        ConfigError: a path matches no module.
    """
    files = {file.relative_to(package).as_posix(): file for file in _matching(of, package)}
    listed = "\n".join(f"{name} {statements_digest(files[name])}" for name in sorted(files))
    return "c" + hashlib.sha256(listed.encode()).hexdigest()[:11]


def statements_digest(file: Path) -> str:
    """SHA-256 of a module's statements.

    Of this package, as they were at the first call: a process goes on with the modules that it has imported
    when their files are edited.
    """
    return _own_digest(file) if file.is_relative_to(PACKAGE) else _digest(file)


@cache
def _own_digest(file: Path) -> str:
    return _digest(file)


def _digest(file: Path) -> str:
    tree = _parsed(file.read_text(encoding="utf-8"))
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()


def _parsed(text: str) -> ast.Module:
    """The syntax tree of a module; tried again, since Python 3.11 fails at times beside other threads."""
    for _ in range(5):
        with contextlib.suppress(SystemError):
            return ast.parse(text)
    return ast.parse(text)


def _matching(patterns: Iterable[str], package: Path) -> list[Path]:
    found = []
    for pattern in patterns:
        files = sorted(package.glob(pattern))
        if not files:
            raise ConfigError(f"{pattern}: no such module in {package}")
        found += files
    return found


def _plain(node: Any) -> Any:
    """A syntax tree as nested tuples; empty fields are omitted so that all Python versions agree."""
    if isinstance(node, list):
        return tuple(_plain(item) for item in node if not _is_prose(item))
    if not isinstance(node, ast.AST):
        return (type(node).__name__, repr(node))
    if isinstance(node, ast.Raise):
        return ("Raise", _raised(node))
    fields = [(name, getattr(node, name, None)) for name in node._fields if name not in ("ctx", "kind")]
    return (
        type(node).__name__,
        *((name, _plain(value)) for name, value in fields if value not in (None, [])),
    )


def _is_prose(node: Any) -> bool:
    """Whether a node is a docstring or other bare text, a call of the module's `log`, or words of a rule."""
    if isinstance(node, ast.keyword):
        return node.arg in ("meaning", "published") and isinstance(node.value, ast.Constant)
    if not isinstance(node, ast.Expr):
        return False
    called = node.value.func if isinstance(node.value, ast.Call) else node.value
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return called.value.id == "log"
    return isinstance(called, ast.Constant) and isinstance(called.value, str)


def _raised(node: ast.Raise) -> Any:
    """The class of a raised exception, without its message."""
    error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return None if error is None else _plain(error)

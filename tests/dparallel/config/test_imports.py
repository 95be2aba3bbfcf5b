"""Reading settings imports neither the rest of the package, except the rules, nor torch."""

import ast
import sys
from pathlib import Path

import dparallel.config.base

FOLDER = Path(dparallel.config.base.__file__).parent


def test_settings_import_pydantic_and_yaml_alone() -> None:
    allowed = {"dparallel", "pydantic", "pydantic_core", "yaml", "ruamel", *sys.stdlib_module_names}
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in allowed, f"{file.name} imports {module}"
                inside = module.startswith("dparallel")
                below = module.startswith(("dparallel.config", "dparallel.rules"))
                assert not inside or below, f"{file.name} imports {module}"


def test_rules_import_torch_where_it_is_used() -> None:
    """Settings read the declarations of rules: at the top of their files, only type checkers see torch."""
    for file in (FOLDER.parent / "rules").glob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                allowed = {"dparallel", *sys.stdlib_module_names}
                assert module.split(".")[0] in allowed, f"{file.name} imports {module}"

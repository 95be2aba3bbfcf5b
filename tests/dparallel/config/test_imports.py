"""Reading settings imports neither the rest of the package nor torch."""

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
                assert not inside or module.startswith("dparallel.config"), f"{file.name} imports {module}"

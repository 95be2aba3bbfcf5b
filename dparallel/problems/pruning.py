"""The statements of a Python program that some of its names need. Syntax only: nothing is run."""

import ast
import builtins
import symtable
from collections.abc import Collection, Iterator, Sequence

from dparallel.problems.effects import Effects, ends_or_asks, modules_used, root

# Code that looks names up by their text may need any of them.
_DYNAMIC = frozenset({"eval", "exec", "globals", "locals", "vars", "__import__"})
# Calls of the others, such as `print(table)`, do not change what they are given.
_CHANGE_NOTHING = frozenset(dir(builtins)) - {"setattr", "delattr", "next"}
_OWN_SCOPE = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


def defined(statements: Sequence[ast.stmt]) -> set[str]:
    """Names that these statements define, for the module."""
    return {name for statement in statements for name in _bound(statement)}


def pruned(statements: Sequence[ast.stmt], roots: Collection[str]) -> list[ast.stmt]:
    """The statements that `roots` need, in order: imports, helpers, classes, constants, and their changes.

    In doubt a statement changes the variables that it mentions, and is kept if one of them is needed.
    Examples, tests, input, output and the main block are left out: they could fail, or wait for input,
    although the program is right. `from __future__` imports come first.
    """
    variables = _variables(statements)
    changes = _changes(statements, variables)
    bound = [_bound(statement) | _changed(statement, variables, changes, roots) for statement in statements]
    used = [_used(statement) for statement in statements]
    effects = Effects(statements, used, bound, roots)
    touched = [effects.of(*pair) for pair in zip(statements, used, strict=True)]
    used = [names | modules_used(statement) for statement, names in zip(statements, used, strict=True)]
    needed, kept = set(roots), set[int]()
    while True:
        everything = any(used[at] & _DYNAMIC for at in kept)
        added = {
            at
            for at, statement in enumerate(statements)
            if at not in kept
            and not _is_main_block(statement)
            and not _is_end(statement)
            and (
                (bound[at] | touched[at]) & needed
                or _is_always_needed(statement)
                or (everything and bound[at])
            )
        }
        if not added:
            chosen = [statements[at] for at in sorted(kept)]
            return sorted(chosen, key=lambda statement: not _is_future(statement))
        kept |= added
        needed.update(*(used[at] for at in added))


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement defines or changes in the module: `table[0] = 1` and `table.append(1)`, too."""
    names = set()
    for node in _in_this_scope(statement):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
                names |= root(node)
            case ast.Expr(value=ast.Call(func=ast.Attribute() as method)):
                names |= root(method)
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                names.add(name)
    return names


def _variables(statements: Sequence[ast.stmt]) -> set[str]:
    """Names that the program defines itself, other than functions and imports."""
    others = {
        name
        for statement in statements
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom)
        for name in _bound(statement)
    }
    return defined(statements) - others


def _changes(statements: Sequence[ast.stmt], variables: Collection[str]) -> dict[str, set[str]]:
    """By function, the variables of the module that its own body assigns or changes."""
    found: dict[str, set[str]] = {}
    for statement in statements:
        if isinstance(statement, ast.FunctionDef):
            body = [name for inner in statement.body for name in _bound(inner)]
            found[statement.name] = set(body) & set(variables) & _used(statement)
    return found


def _changed(
    statement: ast.stmt, variables: Collection[str], changes: dict[str, set[str]], roots: Collection[str]
) -> set[str]:
    """Names that a statement changes by a call: of a function that changes them, or is given them.

    Calls of the roots, or with them, are examples and tests. `@f.register` and `@f` change, too.
    """
    names = set[str]()
    for node in _in_this_scope(statement):
        match node:
            case ast.Expr(value=ast.Call(func=function, args=given)):
                if isinstance(function, ast.Name) and function.id not in roots:
                    names |= changes.get(function.id, set())
                if isinstance(function, ast.Name) and function.id in _CHANGE_NOTHING:
                    continue
                names |= {name for value in given for name in root(value)} & set(variables) - set(roots)
            case ast.FunctionDef(decorator_list=found) | ast.ClassDef(decorator_list=found):
                for decorator in found:
                    function = decorator.func if isinstance(decorator, ast.Call) else decorator
                    if isinstance(function, ast.Attribute):
                        names |= root(function) & {*variables, *changes}
                    elif isinstance(function, ast.Name):
                        names |= changes.get(function.id, set())
    return names - {statement.name} if isinstance(statement, ast.FunctionDef | ast.ClassDef) else names


def _in_this_scope(node: ast.AST) -> Iterator[ast.AST]:
    """A statement and what it contains, except bodies of functions and classes."""
    yield node
    if not isinstance(node, _OWN_SCOPE):
        for child in ast.iter_child_nodes(node):
            yield from _in_this_scope(child)


def _used(statement: ast.stmt) -> set[str]:
    """Names of the module that a statement uses, in its functions and classes, too."""
    try:
        module = symtable.symtable(ast.unparse(statement), "program", "exec")
    except SyntaxError:  # such as `return` outside of a function
        return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    names = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()}
    scopes = module.get_children()
    while scopes:
        scope = scopes.pop()
        names |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        scopes += scope.get_children()
    return names


def _is_main_block(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )


def _is_end(statement: ast.stmt) -> bool:
    """`sys.exit()` and others."""
    match statement:
        case ast.Expr(value=ast.Call(func=function)):
            return ends_or_asks(function)
    return isinstance(statement, ast.Raise)


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def _is_always_needed(statement: ast.stmt) -> bool:
    """Imports of all names, and limits of `sys`, on which no name depends."""
    if isinstance(statement, ast.ImportFrom):
        return _is_future(statement) or statement.names[0].name == "*"
    return isinstance(statement, ast.Expr) and any(
        isinstance(node, ast.Attribute) and node.attr in ("setrecursionlimit", "set_int_max_str_digits")
        for node in ast.walk(statement)
    )

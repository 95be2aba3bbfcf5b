"""Which names the statements of a Python program may change other than by assigning them. Syntax only.

In doubt a statement changes what it mentions: leaving out a needed one fails a program that is right. Only
examples and tests do not, since they could fail, or wait for input: what calls the functions asked for,
prints, asserts or reads input changes only that of which it calls a method.
"""

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

# Methods of these types change nothing; `get` and others belong to dictionaries and lists.
_READING = {name for kind in (str, bytes, int, float, tuple, frozenset) for name in dir(kind)}
_READING |= {"get", "items", "keys", "values", "copy"}
_SHOWS = {"print", "pprint", "display"}
_ASKS = {"input", "exit", "quit", "SystemExit"}  # waits for input, or ends the process
_ASKING = {"stdin", "exit", "_exit"}  # of `sys` and `os`
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_PLAIN = ast.Constant | ast.UnaryOp | ast.BinOp | ast.Tuple | ast.operator | ast.unaryop | ast.expr_context


class Effects:
    """What each statement may change.

    Args:
        used: names of the module that each statement uses, in its functions, too.
        bound: names that each statement defines or changes.
        roots: the functions asked for, whose calls are examples.
    """

    def __init__(
        self,
        statements: Sequence[ast.stmt],
        used: Sequence[set[str]],
        bound: Sequence[set[str]],
        roots: Collection[str],
    ):
        self._roots = frozenset(roots)
        self._modules = _imported(statements)
        self._subclasses = any(
            isinstance(node, ast.Attribute) and node.attr == "__subclasses__"
            for statement in statements
            for node in ast.walk(statement)
        )
        self._asked = _asked(statements, used, bound)
        callables = {
            statement.name: (statement, names)
            for statement, names in zip(statements, used, strict=True)
            if isinstance(statement, _FUNCTION | ast.ClassDef)
        }
        self._data = set().union(*bound) - set(callables) - set(self._modules) - self._roots
        self._data -= _constants(statements, self._data)
        self._hooked = {name for name, (made, _) in callables.items() if _has_hooks(made)}
        self._calls = self._changes(callables)
        self._aliases = self._other_names(statements)

    def of(self, statement: ast.stmt, used: Collection[str]) -> set[str]:
        """Names that a statement may change; modules as `module NAME`."""
        if self._asked.intersection(used):
            return set()
        names = set[str]()
        for leaf in _leaves(statement):
            names |= self._of_leaf(leaf)
        if isinstance(statement, ast.ClassDef):
            bases = _mentioned([*statement.bases, *statement.keywords])
            names |= bases if self._subclasses else bases & self._hooked
            names.discard(statement.name)
        return names

    def _of_leaf(self, leaf: ast.AST) -> set[str]:
        mentioned = _mentioned([leaf])
        names = {name for name in _changed_by_method(leaf) if name in self._data or name in self._aliases}
        if isinstance(leaf, ast.stmt) and not self._is_example(leaf, mentioned):
            names |= mentioned & (self._data | set(self._aliases))
        if not self._is_example(leaf, mentioned):
            names |= set().union(*(self._calls.get(name, ()) for name in mentioned))
            names |= {f"module {self._modules[name]}" for name in _of_modules(leaf) if name in self._modules}
        return names | set().union(*(self._aliases.get(name, ()) for name in names))

    def _is_example(self, leaf: ast.AST, mentioned: Collection[str]) -> bool:
        return isinstance(leaf, ast.Assert) or not (self._roots | _SHOWS).isdisjoint(mentioned)

    def _changes(self, callables: Mapping[str, tuple[ast.stmt, set[str]]]) -> dict[str, set[str]]:
        """By function or class, what its code and the functions that it calls change.

        Calls within examples and tests do not count.
        """
        classes = {name for name, (made, _) in callables.items() if isinstance(made, ast.ClassDef)}
        found = {
            name: _stored(made) & used & (self._data | classes)
            for name, (made, used) in callables.items()
            if name not in self._roots and name not in self._asked
        }
        quiet = {
            name: used
            for name, (made, used) in callables.items()
            if name in found
            and not any(isinstance(node, ast.Assert) for node in ast.walk(made))
            and (self._roots | _SHOWS).isdisjoint(used)
        }
        for _ in found:  # as many rounds as a chain of calls can be long
            before = sum(map(len, found.values()))
            for name, used in quiet.items():
                found[name] |= set().union(*(found.get(other, ()) for other in used))
            if sum(map(len, found.values())) == before:
                break
        return found

    def _other_names(self, statements: Sequence[ast.stmt]) -> dict[str, set[str]]:
        """By variable, others that it may be a part of, or another name for."""
        found: dict[str, set[str]] = {}
        for statement in statements:
            for leaf in _leaves(statement):
                for targets, value in _assigned(leaf):
                    mentioned = _mentioned([value])
                    if not self._is_example(value, mentioned):
                        for name in _stored_names(targets):
                            found.setdefault(name, set()).update(mentioned & (self._data | set(found)))
                            for made in mentioned:
                                found[name] |= self._calls.get(made, set())
        for _ in found:
            before = sum(map(len, found.values()))
            for others in found.values():
                others |= set().union(*(found.get(other, ()) for other in list(others)))
            if sum(map(len, found.values())) == before:
                break
        return found


def ends_or_asks(node: ast.AST) -> bool:
    """Whether code waits for input or ends the process."""
    return any(
        (isinstance(inner, ast.Name) and inner.id in _ASKS)
        or (isinstance(inner, ast.Attribute) and inner.attr in _ASKING)
        for inner in ast.walk(node)
    )


def modules_used(statement: ast.stmt) -> set[str]:
    """Modules that a statement imports, in its functions, too, as `module NAME`."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            found |= {f"module {alias.name.partition('.')[0]}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(f"module {node.module.partition('.')[0]}")
    return found


def _imported(statements: Sequence[ast.stmt]) -> dict[str, str]:
    """The modules that names are imported from."""
    found = {}
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    package = alias.name.partition(".")[0]
                    found[alias.asname or package] = package
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {alias.asname or alias.name: node.module.partition(".")[0] for alias in node.names}
    return found


def _asked(
    statements: Sequence[ast.stmt], used: Sequence[set[str]], bound: Sequence[set[str]]
) -> frozenset[str]:
    """Names that depend on input."""
    found = set[str](_ASKS)
    waiting = list(zip(statements, used, bound, strict=True))
    while True:
        more = [each for each in waiting if ends_or_asks(each[0]) or each[1] & found]
        if not more:
            return frozenset(found)
        waiting = [each for each in waiting if each not in more]
        found.update(*(names for _, _, names in more))


def _constants(statements: Sequence[ast.stmt], names: Collection[str]) -> set[str]:
    """Those of `names` that are numbers, texts, or tuples of them, wherever they are assigned."""
    others = set[str]()
    for statement in statements:
        values = (
            [statement.value] if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) else []
        )
        if not values or not all(
            isinstance(node, _PLAIN) for value in values if value for node in ast.walk(value)
        ):
            others |= _stored_names([statement])
    return set(names) - others


def _has_hooks(made: ast.stmt) -> bool:
    """Whether a class is told of its subclasses."""
    return isinstance(made, ast.ClassDef) and (
        any(isinstance(inner, _FUNCTION) and inner.name == "__init_subclass__" for inner in made.body)
        or any(
            isinstance(base, ast.Name) and base.id in ("type", "ABCMeta", "EnumMeta") for base in made.bases
        )
    )


def _leaves(statement: ast.AST) -> Iterator[ast.AST]:
    """What a statement runs at once: its parts without statements in them, and heads of the others."""
    if isinstance(statement, _FUNCTION):
        yield from (
            *statement.decorator_list,
            *statement.args.defaults,
            *filter(None, statement.args.kw_defaults),
        )
    elif isinstance(statement, ast.stmt) and not any(
        isinstance(node, ast.stmt) for node in ast.walk(statement) if node is not statement
    ):
        yield statement
    else:
        if isinstance(statement, ast.For | ast.AsyncFor | ast.withitem):
            yield ast.copy_location(_head(statement), statement)
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case | ast.withitem):
                yield from _leaves(child)
            elif isinstance(child, ast.expr) and not isinstance(
                statement, ast.For | ast.AsyncFor | ast.withitem
            ):
                yield child


def _head(statement: ast.For | ast.AsyncFor | ast.withitem) -> ast.expr:
    """Its target and value, as a named expression."""
    if isinstance(statement, ast.withitem):
        target, value = statement.optional_vars or ast.Tuple([], ast.Store()), statement.context_expr
    else:
        target, value = statement.target, statement.iter
    return ast.NamedExpr(target, value)  # type: ignore[arg-type]  # of any target


def _assigned(leaf: ast.AST) -> Iterator[tuple[list[ast.expr], ast.expr]]:
    """Targets and values of assignments in a leaf."""
    for node in ast.walk(leaf):
        match node:
            case ast.Assign(targets=targets, value=value):
                yield targets, value
            case (
                ast.AnnAssign(target=target, value=ast.expr() as value)
                | ast.NamedExpr(target=target, value=value)
            ):
                yield [target], value
            case ast.comprehension(target=target, iter=value):
                yield [target], value


def _mentioned(nodes: Iterable[ast.AST]) -> set[str]:
    """Names whose values are used."""
    found = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                found.add(inner.id)
            elif isinstance(inner, ast.AugAssign):
                found |= _stored_names([inner.target])
    return found


def _stored_names(nodes: Iterable[ast.AST]) -> set[str]:
    return {
        inner.id
        for node in nodes
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store | ast.Del)
    }


def _stored(made: ast.AST) -> set[str]:
    """Names that code assigns, of which it assigns parts, or of which it calls a method that changes."""
    names = _stored_names([made]) | _changed_by_method(made)
    for node in ast.walk(made):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            names |= root(node)
    return names


def _changed_by_method(node: ast.AST) -> set[str]:
    """Variables of which a method is called or passed, unless the method only reads."""
    return {
        name
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load) and inner.attr not in _READING
        for name in root(inner)
    }


def _of_modules(leaf: ast.AST) -> set[str]:
    """Names from modules whose state a statement changes: called without a result, or assigned to."""
    match leaf:
        case ast.Expr(value=ast.Call(func=function)):
            return root(function)
        case ast.Assign(targets=[ast.Name(id="_")], value=ast.Call(func=function)):
            return root(function)
        case ast.Assign(targets=targets):
            return _mentioned(targets)
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
            return _mentioned([target])
    return set()


def root(node: ast.AST) -> set[str]:
    """The variable behind attributes and subscripts; none for those of other expressions."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()

"""The program in a response: between code fences, or its plain text. Syntax only: nothing is run."""

import ast
import itertools
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence

from dparallel.problems.pruning import defined, pruned

LONGEST = 20_000  # characters of a response
ATTEMPTS = 20  # at most so many lines of a text are tried as the first line of the program
_FENCE = "```"
_LANGUAGE = re.compile(r"[ \t]*(?:[\w+#.-]*[ \t]*(?:\r?\n|\Z)|py(?:thon)?3?[ \t]+)", re.IGNORECASE)
_INDENTED = re.compile(r"\s*^[ \t]+\S", re.MULTILINE)
_BEGINS_CODE = re.compile(r"^([ \t]*)(?:def |class |import |from |async |@)", re.MULTILINE)


def program(
    response: str, entry_points: Collection[str], needed: Collection[str] = (), header: str = ""
) -> str:
    """The program in a response, with all that its entry points need and nothing else.

    The first piece of code with an implementation of the entry points counts. Pieces are the texts between
    code fences, of which the first or the last may be missing; definitions in earlier pieces are kept as far
    as they are needed. A piece may have prose around it, be indented, or continue the header. It may be
    truncated: what does not parse is cut off.

    Args:
        response: what the model wrote, after the prefilled start.
        entry_points: names that the program must define.
        needed: other names that its tests may use.
        header: source that the response may continue, and whose imports and helpers it may use, such as the
            prompt of a HumanEval problem.

    Returns:
        A program in Python. If there is none, the text of the first piece, which fails its tests.
    """
    header = header and header.rstrip() + "\n"
    pieces = _pieces(_readable(response[:LONGEST]))
    try:
        found = _found(pieces, entry_points, header)
        if found is not None:
            return _source(pruned(found, {*entry_points, *needed}))
    except RecursionError:  # an expression that is nested a thousand times
        pass
    return header + next(filter(str.strip, pieces), "")


def statements(text: str) -> list[ast.stmt]:
    """The statements of the longest part of a text, from its first line, that is a program."""
    lines = text.splitlines(keepends=True)
    count = len(lines)
    while count:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escape sequences, for example
                return ast.parse("".join(lines[:count])).body
        except SyntaxError as error:
            count = max(min(count, error.lineno or count) - 1, 0)
        except (ValueError, MemoryError):  # half a character; nested too deeply
            return []
    return []


def _found(pieces: Sequence[str], entry_points: Collection[str], header: str) -> list[ast.stmt] | None:
    """Statements of the first attempt that implements all entry points, otherwise of the first with any."""
    context = statements(header)
    partial = None
    for place, text, continues in _attempts(pieces, header):
        found = statements(text)
        if _implemented(found).isdisjoint(entry_points):
            continue
        before = [] if place == len(pieces) - 1 else pieces[:place]  # the last piece is all
        earlier = [statement for piece in before for statement in statements(piece)]
        everything = found if continues else [*context, *earlier, *found]
        if _implemented(everything).issuperset(entry_points):
            return everything
        partial = partial or everything
    return partial


def _readable(text: str) -> str:
    """A text without characters that no program contains: marks of the byte order, and all from NUL on."""
    return text.replace("\ufeff", "").lstrip("\0").partition("\0")[0].encode(errors="replace").decode()


def _pieces(response: str) -> list[str]:
    """Texts between code fences in order, without the language behind an opening fence; the last is all."""
    first, *others = response.split(_FENCE)
    return [first, *(_LANGUAGE.sub("", other, count=1) for other in others), response]


def _attempts(pieces: Sequence[str], header: str) -> Iterator[tuple[int, str, bool]]:
    """Texts that may be the program, likely ones first.

    Yields:
        Place of the piece, text, whether the text begins with the header.
    """
    for place, piece in enumerate(pieces):
        yield place, textwrap.dedent(piece), False
        if header and (place < 2 or piece is pieces[-1]) and _INDENTED.match(piece):
            yield place, header + piece, True
    for indented in (False, True):
        for place, piece in enumerate(pieces):
            begins = [found for found in _BEGINS_CODE.finditer(piece) if bool(found[1]) is indented]
            for found in begins[:ATTEMPTS]:
                yield place, _outdented(piece[found.start() :], found[1]), False
    if header:
        for place, piece in enumerate(pieces):
            yield place, header + _indented(piece.lstrip()), True


def _outdented(text: str, indent: str) -> str:
    """The lines of an indented block of code, without its indentation; prose may follow."""
    if not indent:
        return text
    lines = text.splitlines(keepends=True)
    inside = itertools.takewhile(lambda line: line.startswith(indent) or not line.strip(), lines)
    return "".join(line.removeprefix(indent) for line in inside)


def _indented(body: str) -> str:
    """The body of a function of which the first line, or all lines, lost their indentation."""
    first, *others = [line for line in body.splitlines() if line.strip()][:2] or [""]
    under = 8 if first.rstrip().endswith(":") else 4  # what the second line has if only the first lost it
    if others and len(others[0]) - len(others[0].lstrip()) >= under:
        return "    " + body
    return textwrap.indent(body, "    ")


def _implemented(found: Sequence[ast.stmt]) -> set[str]:
    """Names that are defined, except functions with nothing in them but a docstring, `pass` or `...`."""
    return defined([statement for statement in found if not _is_stub(statement)])


def _is_stub(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and all(
        map(_says_nothing, statement.body)
    )


def _says_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _source(found: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(found, type_ignores=[])) + "\n"

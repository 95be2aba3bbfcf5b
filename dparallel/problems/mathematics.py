"""Answers of MATH: by the library math-verify, and by Minerva's own rules.

Both have sympy parse and simplify what a model wrote, which may take forever or exhaust the memory: call them
in worker processes with a time limit. Importing this module imports neither library.
"""

import logging
import re
from importlib.metadata import PackageNotFoundError, version

from dparallel.config.base import UserError
from dparallel.problems.latex import last_box

MATH_VERIFY = "0.9.0"
ANTLR = "4.11.0"  # sympy.parsing.latex takes only 4.11; math-verify takes this one, too

_FINAL_ANSWER = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
_HOPE = "I hope it is correct."

# Appendix D of Lewkowycz et al. (2022), "Solving Quantitative Reasoning Problems with Language Models".
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_REMOVED = (
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    r"\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    r"\text{s}",
    r"\text{.}",
    "\\text{\ns}",
    r"\text{}^2",
    r"\text{}^3",
    "\\text{\n}",
    r"\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    r"\dots",
)
_UNITS = tuple(text for text in _REMOVED if text.isalpha())
# The content of formulas and boxes, and braces that LaTeX allows to be left out.
_UNWRAPPED = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),
        (r"sqrt(\[[^\]]*\])(\w)", r"sqrt\1{\2}"),
        (r"sqrt(?!\[)([^{])", r"sqrt{\1}"),
    )
)


class MathematicsError(UserError):
    """A library that judges mathematics is missing or has another version; the message names the remedy."""


def prepare_math_verify() -> None:
    """Import what `math_verify` needs; called once in a process that judges.

    Raises:
        MathematicsError: a library is missing or has another version.
    """
    _require("math-verify", MATH_VERIFY)
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its time limits are off


def prepare_minerva() -> None:
    """Import what `minerva` needs; called once in a process that judges.

    Raises:
        MathematicsError: a library is missing or has another version.
    """
    _require("antlr4-python3-runtime", ANTLR)
    import sympy.parsing.latex  # noqa: F401


def environment() -> str:
    """Versions of the libraries that decide verdicts."""
    named = ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
    found = []
    for library in named:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:  # named when the scorer is prepared
            continue
    return ", ".join(found)


def _require(library: str, wanted: str) -> None:
    try:
        found = version(library)
    except PackageNotFoundError:
        found = "none"
    if found != wanted:
        raise MathematicsError(
            f"answers of MATH are judged with {library} {wanted}, but {found} is installed: "
            f"pip install {library}=={wanted}"
        )


def answer_of(reference: str) -> str:
    """The final answer of a solution: the content of its last box, or the whole text if it has none."""
    box = last_box(reference)
    return reference.strip() if box is None else box


def no_answer(reference: str) -> str | None:
    """Why a reference states no final answer; None if it does."""
    answer = answer_of(reference)
    if answer and "\n" not in answer and "\\boxed" not in answer:
        return None
    return (
        rf"compares answers, but the reference states none ({answer[-40:]!r}): put it into \boxed{{}}, or "
        "name the column that holds only the answer"
    )


def math_verify(reference: str, response: str) -> bool:
    """Whether the answer found in a response equals the reference's, by math-verify.

    The library decides what the answer is: what `The final answer is ... . I hope it is correct` says, or
    else the last box, else the last formula or number. Boxes joined by a comma or `and` are one set.
    """
    from math_verify import parse, verify

    answer = " ".join(answer_of(reference).split())
    # Its time limits are signals, which only the main thread can set.
    gold = parse(f"${answer}$", parsing_timeout=None)
    return bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def minerva(reference: str, response: str) -> bool:
    """Whether `Final Answer: The final answer is ... . I hope it is correct.` states the reference's answer.

    The first occurrence counts; the last sentence may be missing. The verdict is that of `exact_match` in
    lm-eval's tasks `minerva_math`. As there, what follows an expression is ignored: `3, 5, 7` equals 3.
    """
    stated = _FINAL_ANSWER.search(response + _HOPE)
    if stated is None:
        return False
    return equivalent(normalized(stated[1].strip()), normalized(answer_of(reference)))


def normalized(answer: str) -> str:
    """An answer without units, formatting and optional notation.

    As in lm-eval, differing from the appendix in three points: names of units are removed as whole words
    first and never inside LaTeX commands, roots keep their index, and only commas between groups of three
    digits are removed.
    """
    answer = answer.split("=")[-1]
    for unit in _UNITS:
        answer = re.sub(rf"(?<!\\)\b{unit}\b", "", answer)
    for text, plain in _REPLACED:
        answer = answer.replace(text, plain)
    for text in _REMOVED:
        if text in _UNITS:
            answer = re.sub(rf"(\\[a-zA-Z]+)|{text}", lambda found: found[1] or "", answer)
        else:
            answer = answer.replace(text, "")
    for pattern, plain in _UNWRAPPED:
        answer = pattern.sub(plain, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def equivalent(first: str, second: str) -> bool:
    """Whether two normalized answers are the same text, or expressions whose difference simplifies to 0."""
    from sympy import simplify
    from sympy.parsing.latex import parse_latex

    if first and first == second:
        return True
    try:
        return bool(simplify(parse_latex(first) - parse_latex(second)) == 0)
    except Exception:  # the parser and sympy raise errors of any class on texts that are no expressions
        return False

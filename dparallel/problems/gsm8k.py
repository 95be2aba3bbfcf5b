"""Answers of GSM8K: lm-eval's strict extractions, and the last box compared as a number."""

import re
from fractions import Fraction

from dparallel.problems.answers import NO_NUMBER, plain_number
from dparallel.problems.latex import last_box

AFTER_HASHES = re.compile(r"#### (-?[0-9.,]+)")
THE_ANSWER_IS = re.compile(r"The answer is (-?[0-9.,]+).")
LONGEST = 200  # characters of a box that holds a number

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?<![\w.,])(?P<sign>[-+]?) ?(?:(?P<whole>[0-9]+) (?=[0-9]+/))?(?P<over>{_DECIMAL})"
    rf"(?: ?/ ?(?P<under>{_DECIMAL}))?(?![,.]?[0-9])(?![eE][-+]?[0-9])"
)
_FRACTION = re.compile(r"\\[dtc]?frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))")
# What says nothing about the number, in the order in which it is replaced.
_PLAINER = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\{,\}", ","),
        (r"\\[,!;:]", ""),  # `1\,000`, `1,\!000`
        (r"\\ |\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\(?:text|math)[a-z]*(?=\{)|\\(?:mbox|boldsymbol|bm)(?=\{)", ""),
        (r"\u2212|\u2013(?=[0-9])", "-"),
        (r"(?:US ?)?\\?\$|\\(?:pounds|euro|yen)(?![A-Za-z])|[\u20ac\u00a3\u00a5\u20b9]", ""),
        (r"\\?%|\^ ?(?:\\circ|\{\\circ\})|\\(?:circ|degree)(?![A-Za-z])|\u00b0", ""),
        (r"(?<=[A-Za-z}]) ?\^ ?(?:[0-9]|\{[0-9]\})", ""),  # cm^2
    )
]


def strict_match(reference: str, response: str) -> bool:
    """Whether the number after the first `#### ` is the answer: lm-eval's `strict-match` of its task `gsm8k`.

    Numbers are compared as texts, as by `flexible_extract`.
    """
    return _first(AFTER_HASHES, response) == plain_number(reference)


def strict_match_cot(reference: str, response: str) -> bool:
    """Whether the number after the first `The answer is ` is the answer.

    lm-eval's `strict-match` of its tasks `gsm8k_cot` and `gsm8k_cot_zeroshot`. As there, another character
    must follow the number: `The answer is 18` at the end of a line reads as 1.
    """
    return _first(THE_ANSWER_IS, response) == plain_number(reference)


def _first(pattern: re.Pattern[str], response: str) -> str:
    found = pattern.search(response)
    return plain_number(found[1] if found else NO_NUMBER)


def boxed(reference: str, response: str) -> bool:
    r"""Whether the last `\boxed{...}` holds the reference's final answer, compared as a number.

    Notation makes no difference: thousands separators, currency, units, trailing dots and zeros, fractions,
    mixed numbers. A box with several numbers, or an expression to be computed, is wrong.
    """
    answer, box = number(plain_number(reference)), last_box(response)
    return answer is not None and box is not None and number(box) == answer


def number(text: str) -> Fraction | None:
    """The value of a text with exactly one number; None for any other text."""
    if len(text) > LONGEST:
        return None
    text = re.split(r"=|\\approx(?![A-Za-z])|\u2248", text)[-1]
    for pattern, plain in _PLAINER:
        text = pattern.sub(plain, text)
    text = _FRACTION.sub(
        lambda found: f" {found[1] or found[2]}/{found[3] or found[4]}", text.replace("- \\", "-\\")
    )
    text = re.sub(r"- +(?=[0-9.])", "-", re.sub(r"[{}()\[\]]", "", text)).strip()
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1:
        return None
    [found] = numbers
    around = text[: found.start()] + " " + text[found.end() :]
    if re.search(r"[0-9\\+*^<>\u00d7\u00f7]|(?<![A-Za-z])[-/](?![A-Za-z])", around):
        return None
    over, under = (Fraction(re.sub("[, ]", "", found[name] or "1")) for name in ("over", "under"))
    if not under:
        return None
    value = int(found["whole"] or 0) + over / under
    return -value if found["sign"] == "-" else value

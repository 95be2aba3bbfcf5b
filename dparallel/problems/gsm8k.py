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
_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mbox) ?\{([^{}]*)\}")
_LONE_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!=\u2260])=(?!=)|\\approx(?![A-Za-z])|\u2248")
_WORD = re.compile(r"[A-Za-z]{2,}(?:['/-][A-Za-z]+)*[.,:;?]?")
_UNITS = "cm|mm|km|kg|mg|lbs?|oz|ml|mL|ft|in|min|mins|hrs?|sec|secs|mph|kph|USD"
# What may follow a number without a space.
_ADJACENT = re.compile(rf"(?:{_UNITS})(?![A-Za-z])|/ ?(?=[A-Za-z]{{2}})|[.,;:?]*")
# Words with which a text means another number, or no single one.
OTHER_NUMBERS = (
    "negative minus plus times over divided multiplied mod squared cubed root factorial half halves third "
    "fourth fifth quarter twice double triple hundred hundreds thousand thousands million millions billion "
    "billions trillion trillions dozen dozens than least most not no between sin cos tan log ln exp "
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
# What says nothing about the number, in the order in which it is replaced.
_PLAINER = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\{,\}", ","),
        (r"\\[,!;:]", ""),  # `1\,000`, `1,\!000`
        (r"\\ |\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\math[a-z]*(?=\{)|\\(?:boldsymbol|bm)(?=\{)", ""),
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
    mixed numbers. A box with several numbers, also in words as in `twenty 18`, a variable, or an expression
    to be computed, is wrong. lm-eval and the papers have no such metric.
    """
    answer, box = number(plain_number(reference)), last_box(response)
    return answer is not None and box is not None and number(box) == answer


def number(text: str) -> Fraction | None:
    r"""The value of a text with exactly one number and otherwise words; None for any other text.

    Letters alone, or behind a number without a space, are variables unless they are units or in `\text{}`.
    """
    if len(text) > LONGEST:
        return None
    text = _TEXT.sub(lambda found: f" {_LONE_LETTER.sub('unit', found[1])} ", _EQUALS.split(text)[-1])
    for pattern, plain in _PLAINER:
        text = pattern.sub(plain, text)
    text = _FRACTION.sub(_quotient, text.replace("- \\", "-\\"))
    text = re.sub(r"- +(?=[0-9.])", "-", re.sub(r"[{}()\[\]]", "", text)).strip()
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1:
        return None
    [found] = numbers
    before, after = text[: found.start()], text[found.end() :]
    adjacent = _ADJACENT.match(after)
    assert adjacent is not None  # it may be empty
    rest = after[adjacent.end() :]
    if (rest and not rest.startswith(" ") and "/" not in adjacent[0]) or not _are_words(before + " " + rest):
        return None
    if found["sign"] and before.strip() and not before.rstrip().endswith(":"):  # `x - 18`
        return None
    over, under = (Fraction(re.sub("[, ]", "", found[name] or "1")) for name in ("over", "under"))
    if not under:
        return None
    value = int(found["whole"] or 0) + over / under
    return -value if found["sign"] == "-" else value


def _quotient(fraction: re.Match[str]) -> str:
    """`1/2` for a fraction of two numbers; anything else stays LaTeX, which is no number."""
    over, under = (fraction[1] or fraction[2] or "").strip(), (fraction[3] or fraction[4] or "").strip()
    if re.fullmatch(_DECIMAL, over) and re.fullmatch(_DECIMAL, under):
        return f" {over}/{under}"
    return fraction[0]


def _are_words(text: str) -> bool:
    """Whether a text is nothing but words that say nothing about a number."""
    words = text.split()
    parts = {part for word in words for part in re.split("['/-]", word.rstrip(".,:;?").lower())}
    return all(map(_WORD.fullmatch, words)) and parts.isdisjoint(OTHER_NUMBERS.split())

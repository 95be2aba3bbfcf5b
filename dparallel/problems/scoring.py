"""Is a response right? Pure functions over texts."""

import re
from dataclasses import dataclass

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True)
class Score:
    """`solution` judges the whole response, `answer` its final answer alone; None where unknown."""

    solution: bool | None
    answer: bool | None = None


def exact(reference: str, response: str) -> bool:
    """The same text, but for blanks around it."""
    return response.strip() == reference.strip()


def flexible_extract(reference: str, response: str) -> bool:
    """The last number of the response is the reference's final answer: lm-eval's score of GSM8K.

    As there, numbers are compared as texts (18.0 is not 18) and trailing dots of an ellipsis count
    as the last number.
    """
    found = [first or second for first, second in NUMBER.findall(response)]
    return bool(found) and _plain(found[-1]) == final_answer(reference)


def final_answer(reference: str) -> str:
    """What follows the last `####`, else the whole text, without `,` `$` and a final dot."""
    return _plain(reference.rpartition("####")[2].strip())


def _plain(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)


SCORINGS = {"exact": exact, "flexible_extract": flexible_extract}

"""Compare a response with the reference answer. Pure functions of two texts."""

import re

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"


def exact(reference: str, response: str) -> bool:
    """Whether the texts are equal, ignoring leading and trailing white space."""
    return response.strip() == reference.strip()


def flexible_extract(reference: str, response: str) -> bool:
    """Whether the last number of the response is the reference's final answer: lm-eval's score of GSM8K.

    Equivalent to the filter `flexible-extract` followed by `exact_match` in lm-eval's task `gsm8k`. As there,
    numbers are compared as texts (18.0 is not 18), and the dots of an ellipsis count as a number.
    """
    found = NUMBER.findall(response)
    number = next(filter(None, found[-1])) if found else NO_NUMBER
    return plain_number(number) == plain_number(reference)


def plain_number(text: str) -> str:
    """Normalize an answer: remove `,`, `$`, all up to the last `#### ` and a final dot; lower case."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()

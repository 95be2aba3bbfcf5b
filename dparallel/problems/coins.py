"""The coins task of the embedded demo: short word problems with verifiable worked solutions.

    prompt    Tom 7 coins buys 2 loses 1 finds 1 . . ?
    response  first Tom has 7 coins then Tom buys 2 making 9 then 8 once he gives 1 ... answer #### 9

Sentences come in 3 styles x 2 directions x 3 connectors. The words of a sentence must belong to one style.
Any two of the three styles share a word at some position, so that predicting positions independently, each
with its most likely word, yields sentences of no style. The frequencies of phrasings depend on the name and
the item, so a model can predict them from the prompt.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dparallel.config.base import UserError

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea", "Ben", "Ida")
ITEMS = ("coins", "pens", "cups", "hats", "nuts", "keys")
GAINS = ("buys", "finds", "wins")
LOSSES = ("loses", "sells", "drops")
CONNECTORS = ("then", "next", "later")
DIGITS = tuple(str(digit) for digit in range(10))
FILLER = "."
PAD, MASK, EOS, UNKNOWN = "<pad>", "<mask>", "<eos>", "<unk>"
WORDS = (
    PAD,
    MASK,
    EOS,
    UNKNOWN,
    *DIGITS,
    *NAMES,
    *ITEMS,
    *GAINS,
    *LOSSES,
    *CONNECTORS,
    "he",
    "gets",
    "gives",
    "making",
    "reaching",
    "once",
    "when",
    "first",
    "has",
    "answer",
    "####",
    "?",
    FILLER,
)

MAX_OPERATIONS = 4
RESPONSE_LENGTH = 36
# Any two of the three styles together outweigh the third at one position, so the most likely words (0.76,
# 0.70 and 0.54) belong to different styles; committing them one by one avoids the contradiction.
STYLE_ODDS = (0.46, 0.30, 0.24)
STYLE_ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2))
DIRECTION_ODDS = (0.85, 0.15)
CONNECTOR_ODDS = (0.88, 0.07, 0.05)
INTRO_ODDS = (0.85, 0.15)
SPLITS = {  # `train` is for the teacher, `distillation` for students
    "test": range(0, 10),
    "validation": range(10, 20),
    "distillation": range(20, 40),
    "train": range(40, 100),
}


class NoCoinsProblem(UserError):
    """The text is not a problem of this task."""


@dataclass(frozen=True)
class CoinsProblem:
    """A problem; `operations` holds (verb, operand) pairs, and all intermediate totals are within 0..9."""

    name: str
    item: str
    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def totals(self) -> list[int]:
        """The running total before the first operation and after each one."""
        totals = [self.start]
        for verb, operand in self.operations:
            totals.append(totals[-1] + (operand if verb in GAINS else -operand))
        return totals

    @property
    def prompt(self) -> str:
        """The problem as text."""
        words = [self.name, str(self.start), self.item]
        for verb, operand in self.operations:
            words += [verb, str(operand)]
        words += [FILLER] * (2 * (MAX_OPERATIONS - len(self.operations)))
        return " ".join([*words, "?"])

    @property
    def answer(self) -> str:
        """The final total as text."""
        return str(self.totals[-1])


def split_of(problem: CoinsProblem) -> str:
    """The split of a problem, a function of its text; splits are therefore disjoint."""
    bucket = int.from_bytes(hashlib.blake2b(problem.prompt.encode(), digest_size=8).digest()) % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def draw_problem(rng: random.Random) -> CoinsProblem:
    """Draw a problem of any split."""
    totals = [rng.randrange(10)]
    operations = []
    for _ in range(rng.choice((3, MAX_OPERATIONS))):
        operand = rng.randint(1, 3)
        gains = [gain for gain in (True, False) if 0 <= totals[-1] + (operand if gain else -operand) <= 9]
        gain = rng.choice(gains)
        operations.append((rng.choice(GAINS if gain else LOSSES), operand))
        totals.append(totals[-1] + (operand if gain else -operand))
    return CoinsProblem(rng.choice(NAMES), rng.choice(ITEMS), totals[0], tuple(operations))


def problems(split: str, seed: int) -> Iterator[CoinsProblem]:
    """An endless sequence of distinct problems of a split, determined by `seed`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    seen = set()
    while True:
        problem = draw_problem(rng)
        if problem not in seen and split_of(problem) == split:
            seen.add(problem)
            yield problem


def parse_prompt(prompt: str) -> CoinsProblem:
    """Parse a prompt; raises NoCoinsProblem if it is not a problem of this task."""
    words = prompt.split()
    try:
        name, start, item, *rest, end = words
        rest = [word for word in rest if word != FILLER]
        operations = tuple(zip(rest[::2], map(int, rest[1::2]), strict=True))
        problem = CoinsProblem(name, item, int(start), operations)
    except ValueError as error:
        raise NoCoinsProblem(
            f"{prompt!r} is not a coins problem such as 'Tom 7 coins buys 2 ... ?'"
        ) from error
    if problem.prompt != " ".join(words) or end != "?":
        raise NoCoinsProblem(f"{prompt!r} is not a coins problem; it would read {problem.prompt!r}")
    return problem


def intros(problem: CoinsProblem) -> list[list[str]]:
    """The two possible introductions of a solution, as words."""
    has = [problem.name, "has", str(problem.start), problem.item]
    return [["first", *has], [*has, "first"]]


def sentence(problem: CoinsProblem, step: int, style: int, direction: int, connector: str) -> list[str]:
    """Sentence number `step` (from 0) of a solution, as six words."""
    verb, operand = problem.operations[step]
    plain = "gets" if verb in GAINS else "gives"
    subject = (problem.name, problem.name, "he")[style]
    action = (verb, plain, plain)[style]
    total = str(problem.totals[step + 1])
    if direction == 0:
        return [connector, subject, action, str(operand), ("making", "reaching", "making")[style], total]
    return [connector, total, ("once", "when", "once")[style], subject, action, str(operand)]


def draw_solution(problem: CoinsProblem, rng: random.Random) -> str:
    """Draw a worked solution with the phrasing frequencies of the name and the item."""
    style_order = STYLE_ORDERS[NAMES.index(problem.name) % len(STYLE_ORDERS)]
    item = ITEMS.index(problem.item)
    likely_connector = item // 2
    words = list(rng.choices(intros(problem), _ordered(INTRO_ODDS, item % 2))[0])
    for step in range(len(problem.operations)):
        style = style_order[rng.choices(range(3), STYLE_ODDS)[0]]
        direction = rng.choices(range(2), _ordered(DIRECTION_ODDS, item % 2))[0]
        offset = rng.choices(range(3), CONNECTOR_ODDS)[0]
        words += sentence(problem, step, style, direction, CONNECTORS[(likely_connector + offset) % 3])
    return " ".join([*words, "answer", "####", problem.answer])


def _ordered(odds: tuple[float, float], swap: int) -> tuple[float, float]:
    return (odds[1], odds[0]) if swap else odds


def solution_is_valid(problem: CoinsProblem, response: str) -> bool:
    """Whether the whole worked solution is valid: each sentence in one style, all numbers correct."""
    return mistake(problem, response) is None


def mistake(problem: CoinsProblem, response: str) -> str | None:
    """The first part of a worked solution that breaks a rule, and what it may be; None if all is valid."""
    words = response.split()
    if words[:5] not in intros(problem):
        return _instead("the introduction", words[:5], intros(problem))
    words = words[5:]
    for step in range(len(problem.operations)):
        connector = words[0] if words and words[0] in CONNECTORS else CONNECTORS[0]
        direction = int(words[1:2] != [] and words[1].isdigit())
        phrasings = [sentence(problem, step, style, direction, connector) for style in range(3)]
        if words[:6] not in phrasings:
            return _instead(f"sentence {step + 1}", words[:6], phrasings)
        words = words[6:]
    end = ["answer", "####", problem.answer]
    return None if words == end else _instead("the end", words[:6], [end])


def _instead(part: str, words: list[str], valid: list[list[str]]) -> str:
    *others, last = [repr(" ".join(phrasing)) for phrasing in valid]
    wanted = f"{', '.join(others)} or {last}" if others else last
    return f"{part} is {' '.join(words)!r}, not {wanted}"


def answer_is_right(problem: CoinsProblem, response: str) -> bool:
    """Whether the word after the first `####` is the correct final total."""
    words = response.split()
    return "####" in words and words[words.index("####") + 1 :][:1] == [problem.answer]

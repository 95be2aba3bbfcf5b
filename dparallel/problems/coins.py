"""The coins task of the embedded demo: short word problems with verifiable worked solutions.

    prompt    Tom 7 coins buys 2 loses 1 finds 1 . . ?
    response  first Tom has 7 coins then Tom buys 2 making 9 then 8 once he gives 1 ... answer #### 9

Sentences come in 3 styles x 2 directions x 3 connectors. The words of a sentence must belong to one style.
The frequencies of phrasings depend on the name and the item.
"""

import random
from dataclasses import dataclass
from functools import partial

from dparallel.problems.embedded import (
    CONNECTORS,
    DIGITS,
    END,
    FILLER,
    NAMES,
    EmbeddedTask,
    Phrasings,
    draw_connector,
    draw_style,
    first_mistake,
)

ITEMS = ("coins", "pens", "cups", "hats", "nuts", "keys")
GAINS = ("buys", "finds", "wins")
LOSSES = ("loses", "sells", "drops")
WORDS = (
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
    *END,
    "?",
    FILLER,
)

MAX_OPERATIONS = 4
DIRECTION_ODDS = (0.85, 0.15)
INTRO_ODDS = (0.85, 0.15)


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


def read(words: list[str]) -> CoinsProblem:
    """The problem of a prompt's words; raises a ValueError if they state none."""
    name, start, item, *rest, _ = words
    rest = [word for word in rest if word != FILLER]
    operations = tuple(zip(rest[::2], map(int, rest[1::2]), strict=True))
    return CoinsProblem(name, item, int(start), operations)


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
    item = ITEMS.index(problem.item)
    words = list(rng.choices(intros(problem), _ordered(INTRO_ODDS, item % 2))[0])
    for step in range(len(problem.operations)):
        style = draw_style(rng, problem.name)
        direction = rng.choices(range(2), _ordered(DIRECTION_ODDS, item % 2))[0]
        words += sentence(problem, step, style, direction, draw_connector(rng, item // 2))
    return " ".join([*words, *END, problem.answer])


def _ordered(odds: tuple[float, float], swap: int) -> tuple[float, float]:
    return (odds[1], odds[0]) if swap else odds


def mistake(problem: CoinsProblem, response: str) -> str | None:
    """The first part of a worked solution that breaks a rule, and what it may be; None if all is valid."""
    steps = range(len(problem.operations))
    sentences = [(f"sentence {step + 1}", partial(_phrasings, problem, step)) for step in steps]
    return first_mistake(
        response, [("the introduction", lambda _: intros(problem)), *sentences], problem.answer
    )


def _phrasings(problem: CoinsProblem, step: int, words: list[str]) -> Phrasings:
    """A sentence in every style, with the connector and the direction of `words`."""
    connector = words[0] if words and words[0] in CONNECTORS else CONNECTORS[0]
    direction = int(words[1:2] != [] and words[1].isdigit())
    return [sentence(problem, step, style, direction, connector) for style in range(3)]


TASK = EmbeddedTask(
    "coins",
    words=WORDS,
    example="Tom 7 coins buys 2",
    response_length=36,
    block_length=12,
    draw_problem=draw_problem,
    read=read,
    draw_solution=draw_solution,
    mistake=mistake,
)

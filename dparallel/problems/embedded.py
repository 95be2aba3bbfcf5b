"""What the embedded tasks share: generated problems in disjoint splits, and whole solutions that are checked.

A task is one module, `dparallel/problems/NAME.py`, that defines `TASK`, and its NAME in `Embedded` of
`dparallel/config/problems.py`. Problem sets, tokenizer, training data of teachers, scorer and command line
are derived from them.

A model that predicts the words of a sentence independently of each other, each with its most likely word,
writes sentences of no style: any two of the three styles share a word at some position, and together
outweigh the third there (0.76, 0.70 and 0.54). Committing the words one by one avoids the contradiction. The
frequencies of phrasings depend on names in the prompt, so a model can predict them.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

from dparallel.config.base import UserError

SPECIAL = PAD, MASK, EOS, UNKNOWN = ("<pad>", "<mask>", "<eos>", "<unk>")
NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea", "Ben", "Ida")
DIGITS = tuple(str(digit) for digit in range(10))
FILLER = "."  # of prompts, which all have one length
END = ("answer", "####")

STYLE_ODDS = (0.46, 0.30, 0.24)
STYLE_ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2))
CONNECTORS = ("then", "next", "later")
CONNECTOR_ODDS = (0.88, 0.07, 0.05)
SPLITS = {  # `train` is for the teacher, `distillation` for students
    "test": range(0, 10),
    "validation": range(10, 20),
    "distillation": range(20, 40),
    "train": range(40, 100),
}

Phrasings = list[list[str]]  # of a part of a solution, as words


class ForeignPrompt(UserError):
    """The text is not a problem of the task."""


class Stated(Protocol):
    """A problem of an embedded task."""

    @property
    def prompt(self) -> str:
        """The problem as text, in words of the task; all prompts of a task have as many words."""

    @property
    def answer(self) -> str:
        """The end of every valid solution, after `answer ####`."""


P = TypeVar("P", bound=Stated)


@dataclass(frozen=True)
class EmbeddedTask(Generic[P]):
    """A task with generated problems and worked solutions.

    Attributes:
        words: all words of prompts and solutions, in the order of their token ids.
        example: the beginning of a prompt, for messages.
        response_length: tokens of a response; more than the longest solution, which leaves room for EOS.
        block_length: a divisor of it, used where neither a caller nor the checkpoint gives one.
        draw_problem: draws a problem of any split.
        read: the problem of a prompt's words; raises a ValueError for others.
        draw_solution: draws a worked solution, with the phrasing frequencies of the problem.
        mistake: the first part of a response that breaks a rule, and what it may be; None if all is valid.
    """

    name: str
    words: tuple[str, ...]
    example: str
    response_length: int
    block_length: int
    draw_problem: Callable[[random.Random], P]
    read: Callable[[list[str]], P]
    draw_solution: Callable[[P, random.Random], str]
    mistake: Callable[[P, str], str | None]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The special tokens and the words, in the order of their token ids."""
        return (*SPECIAL, *self.words)

    def parse_prompt(self, prompt: str) -> P:
        """The problem that a prompt states; raises ForeignPrompt if it is none of this task."""
        words = prompt.split()
        try:
            problem = self.read(words)
        except ValueError as error:
            raise ForeignPrompt(
                f"{prompt!r} is not a {self.name} problem such as '{self.example} ... ?'"
            ) from error
        if problem.prompt != " ".join(words):
            raise ForeignPrompt(f"{prompt!r} is not a {self.name} problem; it would read {problem.prompt!r}")
        return problem

    def problems(self, split: str, seed: int) -> Iterator[P]:
        """An endless sequence of distinct problems of a split, determined by `seed`."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        rng = random.Random(f"{split}/{seed}")
        seen = set()
        while True:
            problem = self.draw_problem(rng)
            if problem not in seen and split_of(problem) == split:
                seen.add(problem)
                yield problem

    def solution_is_valid(self, problem: P, response: str) -> bool:
        """Whether the whole worked solution is valid: each sentence in one style, all numbers correct."""
        return self.mistake(problem, response) is None


def answer_is_right(problem: Stated, response: str) -> bool:
    """Whether the first `####` is followed by the correct answer."""
    words, answer = response.split(), problem.answer.split()
    return "####" in words and words[words.index("####") + 1 :][: len(answer)] == answer


def split_of(problem: Stated) -> str:
    """The split of a problem, a function of its text; splits are therefore disjoint."""
    bucket = int.from_bytes(hashlib.blake2b(problem.prompt.encode(), digest_size=8).digest()) % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def draw_connector(rng: random.Random, likely: int) -> str:
    """Draw a connector; number `likely` of them is the most frequent one."""
    offset = rng.choices(range(3), CONNECTOR_ODDS)[0]
    return CONNECTORS[(likely + offset) % 3]


def draw_style(rng: random.Random, name: str) -> int:
    """Draw a style with the frequencies of a name."""
    return STYLE_ORDERS[NAMES.index(name) % len(STYLE_ORDERS)][rng.choices(range(3), STYLE_ODDS)[0]]


def first_mistake(
    response: str, parts: Sequence[tuple[str, Callable[[list[str]], Phrasings]]], answer: str
) -> str | None:
    """The first part of a solution that is in none of its phrasings, with these phrasings.

    Args:
        parts: names of the parts before the end, and the phrasings of each, all of one length. They are given
            the words from this part on, of which they may take over what is valid.

    Returns:
        None for a valid solution.
    """
    words = response.split()
    for part, phrasings_of in parts:
        phrasings = phrasings_of(words)
        length = len(phrasings[0])
        if words[:length] not in phrasings:
            return _instead(part, words[:length], phrasings)
        words = words[length:]
    end = [*END, *answer.split()]
    return None if words == end else _instead("the end", words[:6], [end])


def _instead(part: str, words: list[str], valid: Phrasings) -> str:
    *others, last = [repr(" ".join(phrasing)) for phrasing in valid]
    wanted = f"{', '.join(others)} or {last}" if others else last
    return f"{part} is {' '.join(words)!r}, not {wanted}"


@cache
def embedded_task(name: str) -> EmbeddedTask[Any]:
    """The task of the module of its name."""
    task: EmbeddedTask[Any] = import_module(f"dparallel.problems.{name}").TASK
    return task

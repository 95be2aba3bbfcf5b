"""The ledger task: chains of operations that do not commute, with verifiable worked solutions.

    prompt    Ann 9 a triples b adds c flips ... . . ?
    response  a then Ann trebles reaching 7 b then Ann adds making 8 c next he mirrors making 1 ...

Every operation is an affine map modulo the base, so a result depends on all operations before it and on
their order: certainty has to travel along the chain. A label before each operation and before its sentence
binds the two. The words around the numbers can be foreseen from the prompt: sentences come in 3 styles, with
frequencies that depend on the account's name.
"""

import random
import string
from dataclasses import dataclass
from functools import cached_property, partial

from dparallel.config.base import UserError
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

# By the verb of the prompt: its other wording, factor and summand of the map (modulo the base).
MAPS = {
    "adds": ("gains", 1, 1),
    "drops": ("loses", 1, -1),
    "triples": ("trebles", 3, 0),
    "flips": ("mirrors", -1, -1),
}
TRANSFER = ("pays", "sends")  # adds the account's value to the next account, after the last to the first
PRONOUN = "he"
MAKING, REACHING = "making", "reaching"
SENTENCE = 6  # words


class LedgerError(UserError):
    """A form that the task cannot have; the message names the value and the limit."""


@dataclass(frozen=True)
class Form:
    """The size of problems.

    Responses have 6 tokens more than the longest chain's sentences, so that blocks of 12, 30 and 60 fit
    chains of up to 9 operations, and blocks of 12 to 60 those of up to 19.

    Args:
        shortest, longest: number of operations.
        accounts: number of values that the chain changes; with several, some operations are transfers.
        base: values are 0 to base - 1; not a multiple of 3, so that tripling can be undone.
    """

    shortest: int = 7
    longest: int = 9
    accounts: int = 1
    base: int = 10

    def __post_init__(self) -> None:
        limits = {
            "shortest": (1, self.longest),
            "longest": (1, len(string.ascii_lowercase)),
            "accounts": (1, 3),
            "base": (4, len(DIGITS)),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise LedgerError(f"{name}={getattr(self, name)}: must be from {low} to {high}")
        if self.base % 3 == 0:
            raise LedgerError(
                f"base={self.base}: a multiple of 3, so tripling is no permutation; give another"
            )

    @property
    def labels(self) -> str:
        """The labels of operations, in their order."""
        return string.ascii_lowercase[: self.longest]

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs of prompts."""
        return (*MAPS, *TRANSFER[:1]) if self.accounts > 1 else tuple(MAPS)

    @property
    def words(self) -> tuple[str, ...]:
        """All words of prompts and solutions."""
        others = [other for other, _, _ in MAPS.values()] + [*TRANSFER[1:]] * (self.accounts > 1)
        marks = (PRONOUN, MAKING, REACHING, *CONNECTORS, *END, "?", FILLER)
        return (*DIGITS[: self.base], *NAMES, *self.labels, *self.verbs, *others, *marks)


@dataclass(frozen=True)
class LedgerProblem:
    """A problem.

    Attributes:
        names, starts: of the accounts.
        operations: pairs of an account's number and a verb.
    """

    form: Form
    names: tuple[str, ...]
    starts: tuple[int, ...]
    operations: tuple[tuple[int, str], ...]

    @cached_property
    def values(self) -> list[tuple[int, ...]]:
        """The values of all accounts before the first operation and after each one."""
        values = [self.starts]
        for account, verb in self.operations:
            values.append(applied(values[-1], account, verb, self.form.base))
        return values

    def result(self, step: int) -> int:
        """The value that operation number `step` (from 0) changes, after it."""
        account, verb = self.operations[step]
        return self.values[step + 1][changed(account, verb, self.form.accounts)]

    @property
    def prompt(self) -> str:
        """The problem as text."""
        words = [word for stated in zip(self.names, map(str, self.starts), strict=True) for word in stated]
        for label, (account, verb) in zip(self.form.labels, self.operations, strict=False):
            words += [label, *self._subject(account), verb]
        filler = (self.form.longest - len(self.operations)) * (2 + (self.form.accounts > 1))
        return " ".join([*words, *[FILLER] * filler, "?"])

    @property
    def answer(self) -> str:
        """The final values as text."""
        return " ".join(map(str, self.values[-1]))

    def _subject(self, account: int) -> list[str]:
        return [self.names[account]] if self.form.accounts > 1 else []


def changed(account: int, verb: str, accounts: int) -> int:
    """The account that an operation of `account` changes."""
    return (account + 1) % accounts if verb == TRANSFER[0] else account


def applied(values: tuple[int, ...], account: int, verb: str, base: int) -> tuple[int, ...]:
    """The values of all accounts after an operation."""
    at = changed(account, verb, len(values))
    if verb == TRANSFER[0]:
        new = values[at] + values[account]
    else:
        _, factor, summand = MAPS[verb]
        new = factor * values[at] + summand
    return (*values[:at], new % base, *values[at + 1 :])


def draw_problem(form: Form, rng: random.Random) -> LedgerProblem:
    """Draw a problem of any split."""
    names = tuple(rng.sample(NAMES, form.accounts))
    starts = tuple(rng.randrange(form.base) for _ in names)
    steps = range(rng.randint(form.shortest, form.longest))
    operations = tuple((rng.randrange(form.accounts), rng.choice(form.verbs)) for _ in steps)
    return LedgerProblem(form, names, starts, operations)


def read(form: Form, words: list[str]) -> LedgerProblem:
    """The problem of a prompt's words; raises a ValueError if they state none."""
    opening, rest = words[: 2 * form.accounts], words[2 * form.accounts : -1]
    names, starts = tuple(opening[::2]), tuple(map(DIGITS[: form.base].index, opening[1::2]))
    if len(set(names) & set(NAMES)) != form.accounts or len(starts) != form.accounts:
        raise ValueError("accounts that the task does not have")
    rest = [word for word in rest if word != FILLER]
    width = 2 + (form.accounts > 1)
    subjects = (
        [names.index(name) for name in rest[1::width]] if form.accounts > 1 else [0] * len(rest[::width])
    )
    operations = tuple(zip(subjects, rest[width - 1 :: width], strict=True))
    if not operations or any(verb not in form.verbs for _, verb in operations):
        raise ValueError("operations that the task does not have")
    if len(operations) > form.longest:
        raise ValueError("more operations than labels")
    return LedgerProblem(form, names, starts, operations)


def sentence(problem: LedgerProblem, step: int, style: int, connector: str) -> list[str]:
    """Sentence number `step` (from 0) of a solution, as six words."""
    account, verb = problem.operations[step]
    other = TRANSFER[1] if verb == TRANSFER[0] else MAPS[verb][0]
    subject = (problem.names[account], problem.names[account], PRONOUN)[style]
    action, becoming = (verb, other, other)[style], (MAKING, REACHING, MAKING)[style]
    return [problem.form.labels[step], connector, subject, action, becoming, str(problem.result(step))]


def draw_solution(problem: LedgerProblem, rng: random.Random) -> str:
    """Draw a worked solution with the phrasing frequencies of the accounts' names."""
    words: list[str] = []
    for step, (account, _) in enumerate(problem.operations):
        name = problem.names[account]
        style, connector = draw_style(rng, name), draw_connector(rng, NAMES.index(name) // 3)
        words += sentence(problem, step, style, connector)
    return " ".join([*words, *END, problem.answer])


def mistake(problem: LedgerProblem, response: str) -> str | None:
    """The first part of a worked solution that breaks a rule, and what it may be; None if all is valid."""
    steps = range(len(problem.operations))
    sentences = [
        (f"sentence {problem.form.labels[step]}", partial(_phrasings, problem, step)) for step in steps
    ]
    return first_mistake(response, sentences, problem.answer)


def _phrasings(problem: LedgerProblem, step: int, words: list[str]) -> Phrasings:
    """A sentence in every style, with the connector of `words`."""
    connector = words[1] if words[1:2] and words[1] in CONNECTORS else CONNECTORS[0]
    return [sentence(problem, step, style, connector) for style in range(3)]


def ledger_task(name: str, form: Form, block_length: int) -> EmbeddedTask[LedgerProblem]:
    """A task of problems of one form."""
    return EmbeddedTask(
        name,
        words=form.words,
        example="Ann 9 a triples b adds" if form.accounts == 1 else "Ann 3 Ben 1 a Ann triples b Ben pays",
        response_length=SENTENCE * (form.longest + 1),
        block_length=block_length,
        draw_problem=partial(draw_problem, form),
        read=partial(read, form),
        draw_solution=draw_solution,
        mistake=mistake,
    )


TASK = ledger_task("ledger", Form(), block_length=30)

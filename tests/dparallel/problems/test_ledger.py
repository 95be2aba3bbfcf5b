import random
from functools import reduce
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.problems import ledger
from dparallel.problems.embedded import CONNECTORS, STYLE_ODDS, answer_is_right
from dparallel.problems.ledger import TASK, Form, LedgerError, LedgerProblem, ledger_task

CHAIN = ("triples", "adds", "flips", "flips", "drops", "triples", "adds")
PROBLEM = LedgerProblem(Form(), ("Ann",), (9,), tuple((0, verb) for verb in CHAIN))
SOLUTION = (
    "a then Ann trebles reaching 7 b then Ann adds making 8 c next he mirrors making 1 "
    "d later Ann flips making 8 e then Ann loses reaching 7 f then he trebles making 1 "
    "g then Ann gains reaching 2 answer #### 2"
)
TWO = LedgerProblem(
    Form(1, 4, 2, 5), ("Tom", "Eva"), (3, 4), ((0, "pays"), (1, "triples"), (1, "pays"), (0, "flips"))
)
FORMS = (Form(), Form(1, 4, 2, 5), Form(2, 3, 3, 4), Form(13, 19))
PLAIN = {  # the operations in other words, modulo 10
    "adds": lambda value: [1, 2, 3, 4, 5, 6, 7, 8, 9, 0][value],
    "drops": lambda value: [9, 0, 1, 2, 3, 4, 5, 6, 7, 8][value],
    "triples": lambda value: [0, 3, 6, 9, 2, 5, 8, 1, 4, 7][value],
    "flips": lambda value: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0][value],
}
seeds = st.integers(0, 10**9)


def is_a_solution(problem: LedgerProblem, words: list[str]) -> bool:
    """Computes the chain from tables, and looks every sentence up among all its phrasings."""
    value, valid = problem.starts[0], True
    for step, (_, verb) in enumerate(problem.operations):
        value, other, name = PLAIN[verb](value), ledger.MAPS[verb][0], problem.names[0]
        label, connector, *rest = words[6 * step : 6 * step + 6]
        valid &= label == "abcdefghi"[step]
        valid &= connector in CONNECTORS
        valid &= rest in (
            [name, verb, "making", str(value)],
            [name, other, "reaching", str(value)],
            ["he", other, "making", str(value)],
        )
    valid &= words[6 * len(problem.operations) :] == ["answer", "####", str(value)]
    return valid


def test_prompt_and_solution_read_as_documented() -> None:
    assert PROBLEM.prompt == "Ann 9 a triples b adds c flips d flips e drops f triples g adds . . . . ?"
    assert PROBLEM.values == [(9,), (7,), (8,), (1,), (8,), (7,), (1,), (2,)]
    assert TASK.mistake(PROBLEM, SOLUTION) is None
    assert answer_is_right(PROBLEM, SOLUTION)
    assert TASK.response_length == 60  # of 12, 30 and 60


def test_transfers_add_to_the_next_account() -> None:
    """Tom 3 and Eva 4 modulo 5: Tom pays Eva (7 = 2), she triples (6 = 1), pays Tom (4), who flips (0)."""
    task = ledger_task("two", TWO.form, 15)
    assert TWO.prompt == "Tom 3 Eva 4 a Tom pays b Eva triples c Eva pays d Tom flips ?"
    assert TWO.values == [(3, 4), (3, 2), (3, 1), (4, 1), (0, 1)]
    solution = (
        "a then Tom sends reaching 2 b then Eva triples making 1 c next he sends making 4 d then Tom mirrors "
        "reaching 0 answer #### 0 1"
    )
    assert task.mistake(TWO, solution) is None
    assert task.parse_prompt(TWO.prompt) == TWO
    assert answer_is_right(TWO, solution)
    assert not answer_is_right(TWO, solution.replace("#### 0 1", "#### 0 2"))


@pytest.mark.parametrize(
    ("right", "wrong", "mistake"),
    [
        (
            "b then Ann adds making 8",
            "b then Ann gains making 8",  # the most likely words, one by one
            "sentence b is 'b then Ann gains making 8', not 'b then Ann adds making 8', 'b then Ann gains "
            "reaching 8' or 'b then he gains making 8'",
        ),
        (
            "c next he mirrors making 1",
            "c next he mirrors making 2",
            "sentence c is 'c next he mirrors making 2'",
        ),
        (
            "a then",
            "b then",
            "sentence a is 'b then Ann trebles reaching 7', not 'a then Ann triples making 7'",
        ),
        ("d later Ann", "d Ann later", "sentence d is 'd Ann later flips making 8', not 'd then Ann flips"),
        ("Ann loses", "Tom loses", "sentence e is"),
        ("e then Ann loses reaching 7 ", "", "sentence e is 'f then he trebles making 1'"),
        ("answer #### 2", "answer #### 3", "the end is 'answer #### 3', not 'answer #### 2'"),
        (" answer #### 2", "", "the end is '', not 'answer #### 2'"),
    ],
)
def test_a_mistake_is_named_with_what_is_right(right: str, wrong: str, mistake: str) -> None:
    assert right in SOLUTION
    found = TASK.mistake(PROBLEM, SOLUTION.replace(right, wrong))
    assert found is not None
    assert found.startswith(mistake)


@given(seeds)
def test_a_changed_word_is_another_phrasing_or_a_mistake(seed: int) -> None:
    """Every word in place of one of a solution is judged as by an oracle."""
    rng = random.Random(seed)
    problem = TASK.draw_problem(rng)
    words = TASK.draw_solution(problem, rng).split()
    at = rng.randrange(len(words))
    for word in TASK.words:
        changed = [*words[:at], word, *words[at + 1 :]]
        assert (TASK.mistake(problem, " ".join(changed)) is None) is is_a_solution(problem, changed)


def test_the_order_of_operations_matters_in_most_problems() -> None:
    """Of 300 problems, and of all neighbours of different verbs in them, changing places changes the end."""
    rng, changed, neighbours = random.Random(0), 0, []
    for _ in range(300):
        problem = TASK.draw_problem(rng)
        verbs = [verb for _, verb in problem.operations]
        for at, (one, other) in enumerate(pairwise(verbs)):
            if one != other:
                swapped = [*verbs[:at], other, one, *verbs[at + 2 :]]
                end = reduce(lambda value, verb: PLAIN[verb](value), swapped, problem.starts[0])
                neighbours.append(str(end) != problem.answer)
        changed += any(neighbours[-len(verbs) :])
    assert changed > 290
    assert sum(neighbours) / len(neighbours) > 0.7


def test_likeliest_words_contradict_each_other() -> None:
    """The property that breaks few-step decoding: the most likely words form no valid style."""
    words = [ledger.sentence(PROBLEM, 0, style, "then") for style in range(3)]
    for odds in (STYLE_ODDS, STYLE_ODDS[::-1], (STYLE_ODDS[1], STYLE_ODDS[0], STYLE_ODDS[2])):
        weighted = list(zip(words, odds, strict=True))
        likeliest = [
            max({word[i] for word in words}, key=lambda each: sum(p for w, p in weighted if w[i] == each))
            for i in range(6)
        ]
        assert likeliest not in words


@given(st.sampled_from(FORMS), seeds)
def test_problems_of_every_form_can_be_read_and_solved(form: Form, seed: int) -> None:
    rng, task = random.Random(seed), ledger_task("any", form, 6)
    problem = task.draw_problem(rng)
    solution = task.draw_solution(problem, rng)
    assert task.parse_prompt(problem.prompt) == problem
    assert task.mistake(problem, solution) is None
    assert len(solution.split()) < task.response_length
    assert {*problem.prompt.split(), *solution.split()} <= set(task.words)
    assert all(0 <= value < form.base for values in problem.values for value in values)


@pytest.mark.parametrize(
    "prompt",
    [
        "Ann 9 a triples b lends ?",
        "Ann 9 a triples b ?",
        "Ann 9 a triples c adds . . . . . . . . . . . . . . ?",
        "Bob 9 a triples b adds . . . . . . . . . . . . . . ?",
        "Ann 10 a triples b adds . . . . . . . . . . . . . . ?",
        "Ann 9 . . . . . . . . . . . . . . . . . . ?",
    ],
)
def test_foreign_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a ledger problem"):
        TASK.parse_prompt(prompt)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"shortest": 10}, "shortest=10: must be from 1 to 9"),
        ({"longest": 27}, "longest=27: must be from 1 to 26"),
        ({"accounts": 4}, "accounts=4: must be from 1 to 3"),
        ({"base": 9}, "base=9: a multiple of 3"),
    ],
)
def test_a_form_that_cannot_be_is_refused(form: dict[str, int], message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        Form(**form)

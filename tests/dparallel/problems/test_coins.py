import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.problems import coins
from dparallel.problems.embedded import CONNECTORS, STYLE_ODDS, answer_is_right

PROBLEM = coins.CoinsProblem("Tom", "coins", 7, (("buys", 2), ("loses", 1), ("finds", 1)))
SOLUTION = (
    "first Tom has 7 coins then Tom buys 2 making 9 next 8 once he gives 1 later Tom gets 1 reaching 9 "
    "answer #### 9"
)
random_problems = st.integers(0, 10**9).map(lambda seed: coins.draw_problem(random.Random(seed)))


def test_prompt_reads_as_documented():
    assert PROBLEM.prompt == "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
    assert PROBLEM.totals == [7, 9, 8, 9]
    assert coins.TASK.solution_is_valid(PROBLEM, SOLUTION)
    assert answer_is_right(PROBLEM, SOLUTION)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("making 9", "making 8"),  # a wrong number
        ("Tom buys 2 making", "Tom buys 2 reaching"),  # words of two styles
        ("Tom buys 2 making", "Tom gets 2 making"),  # the most likely words, one by one
        ("once he gives", "once Tom gives"),
        ("he gives 1", "he gets 1"),  # a loss described as a gain
        ("first Tom has 7 coins", "first Tom has 7 pens"),
        ("answer #### 9", "answer #### 8"),
        ("answer #### 9", "answer #### 9 9"),  # an extra word
        ("then Tom buys 2 making 9 ", ""),  # a sentence missing
    ],
)
def test_one_wrong_word_spoils_the_solution(right, wrong):
    assert right in SOLUTION
    assert not coins.TASK.solution_is_valid(PROBLEM, SOLUTION.replace(right, wrong))


@pytest.mark.parametrize(
    ("right", "wrong", "mistake"),
    [
        (
            "Tom buys 2 making",
            "Tom gets 2 making",
            "sentence 1 is 'then Tom gets 2 making 9', not 'then Tom buys 2 making 9', 'then Tom gets 2 "
            "reaching 9' or 'then he gets 2 making 9'",
        ),
        (
            "next 8 once he gives 1",
            "next 8 when he gives 1",
            "sentence 2 is 'next 8 when he gives 1', not 'next 8 once Tom loses 1', 'next 8 when Tom gives "
            "1' or 'next 8 once he gives 1'",
        ),
        (
            "first Tom has 7 coins",
            "Tom has 7 first coins",
            "the introduction is 'Tom has 7 first coins', not 'first Tom has 7 coins' or 'Tom has 7 coins "
            "first'",
        ),
        ("#### 9", "#### 8", "the end is 'answer #### 8', not 'answer #### 9'"),
        (" answer #### 9", "", "the end is '', not 'answer #### 9'"),
    ],
)
def test_a_mistake_is_named_with_what_is_right(right: str, wrong: str, mistake: str) -> None:
    assert coins.mistake(PROBLEM, SOLUTION) is None
    assert coins.mistake(PROBLEM, SOLUTION.replace(right, wrong)) == mistake


@given(random_problems, st.lists(st.sampled_from(coins.WORDS), max_size=40))
def test_a_solution_is_one_of_all_phrasings(problem: coins.CoinsProblem, words: list[str]) -> None:
    """The oracle tries all of them, in every direction and with every connector."""
    valid = coins.draw_solution(problem, random.Random(len(words))).split()
    for text in (words, [*valid[:-1], *words[:1]], [*valid[:6], *words[:2], *valid[8:]]):
        sentences = [
            coins.sentence(problem, step, style, direction, connector)
            for step in range(len(problem.operations))
            for style in range(3)
            for direction in range(2)
            for connector in CONNECTORS
        ]
        body, found = text[5:], text[:5] in coins.intros(problem)
        for step in range(len(problem.operations)):
            found &= body[6 * step : 6 * step + 6] in sentences[18 * step : 18 * step + 18]
        found &= body[6 * len(problem.operations) :] == ["answer", "####", problem.answer]
        assert (coins.mistake(problem, " ".join(text)) is None) is found


def test_the_answer_alone_survives_a_broken_solution():
    broken = SOLUTION.replace("making 9", "making 3")
    assert answer_is_right(PROBLEM, broken)
    assert not answer_is_right(PROBLEM, SOLUTION.replace("#### 9", "#### 8"))
    assert not answer_is_right(PROBLEM, "answer ####")


@given(random_problems)
def test_totals_have_one_digit(problem):
    assert all(0 <= total <= 9 for total in problem.totals)


def test_likeliest_words_contradict_each_other():
    """The property that breaks few-step decoding: the most likely words form no valid style."""
    words = [coins.sentence(PROBLEM, 0, style, 0, "then") for style in range(3)]
    odds = dict(zip(map(tuple, words), STYLE_ODDS, strict=True))
    majority = [
        max({word[i] for word in words}, key=lambda each: sum(p for w, p in odds.items() if w[i] == each))
        for i in range(6)
    ]
    assert majority not in words


@pytest.mark.parametrize("prompt", ["", "hello", "Tom 7 coins buys 2 loses ?", "Tom x coins buys 2 . . ?"])
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a coins problem"):
        coins.TASK.parse_prompt(prompt)

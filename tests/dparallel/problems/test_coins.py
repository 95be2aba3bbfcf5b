import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.problems import coins
from dparallel.tiny.tokenizer import build_tokenizer

PROBLEM = coins.CoinsProblem("Tom", "coins", 7, (("buys", 2), ("loses", 1), ("finds", 1)))
SOLUTION = (
    "first Tom has 7 coins then Tom buys 2 making 9 next 8 once he gives 1 later Tom gets 1 reaching 9 "
    "answer #### 9"
)
random_problems = st.integers(0, 10**9).map(lambda seed: coins.draw_problem(random.Random(seed)))


def test_prompt_reads_as_documented():
    assert PROBLEM.prompt == "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
    assert PROBLEM.totals == [7, 9, 8, 9]
    assert coins.solution_is_valid(PROBLEM, SOLUTION)
    assert coins.answer_is_right(PROBLEM, SOLUTION)


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
    assert not coins.solution_is_valid(PROBLEM, SOLUTION.replace(right, wrong))


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
            for connector in coins.CONNECTORS
        ]
        body, found = text[5:], text[:5] in coins.intros(problem)
        for step in range(len(problem.operations)):
            found &= body[6 * step : 6 * step + 6] in sentences[18 * step : 18 * step + 18]
        found &= body[6 * len(problem.operations) :] == ["answer", "####", problem.answer]
        assert (coins.mistake(problem, " ".join(text)) is None) is found


def test_the_answer_alone_survives_a_broken_solution():
    broken = SOLUTION.replace("making 9", "making 3")
    assert coins.answer_is_right(PROBLEM, broken)
    assert not coins.answer_is_right(PROBLEM, SOLUTION.replace("#### 9", "#### 8"))
    assert not coins.answer_is_right(PROBLEM, "answer ####")


@given(random_problems, st.integers(0, 10**9))
def test_drawn_solutions_hold(problem, seed):
    solution = coins.draw_solution(problem, random.Random(seed))
    assert coins.solution_is_valid(problem, solution)
    assert coins.answer_is_right(problem, solution)
    assert coins.parse_prompt(problem.prompt) == problem
    assert all(0 <= total <= 9 for total in problem.totals)
    assert len(solution.split()) < coins.RESPONSE_LENGTH  # leaves room for EOS


def test_splits_are_disjoint_by_construction_and_large():
    drawn = {split: set(islice(coins.problems(split, seed=3), 2000)) for split in coins.SPLITS}
    assert all(len(problems) == 2000 for problems in drawn.values())
    assert len(set.union(*drawn.values())) == 4 * 2000
    buckets = [bucket for buckets in coins.SPLITS.values() for bucket in buckets]
    assert sorted(buckets) == list(range(100))
    for split, problems in drawn.items():
        assert all(coins.split_of(problem) == split for problem in problems)
    rng = random.Random(0)
    assert len({coins.draw_problem(rng) for _ in range(5000)}) > 4900, "the problem space is too small"


def test_problems_are_fixed_by_their_seed():
    assert list(islice(coins.problems("test", 0), 5)) == list(islice(coins.problems("test", 0), 5))
    assert list(islice(coins.problems("test", 0), 5)) != list(islice(coins.problems("test", 1), 5))
    with pytest.raises(ValueError, match="unknown split 'dev'; known: test, validation, distillation, train"):
        next(coins.problems("dev", 0))


def test_likeliest_words_contradict_each_other():
    """The property that breaks few-step decoding: the most likely words form no valid style."""
    words = [coins.sentence(PROBLEM, 0, style, 0, "then") for style in range(3)]
    odds = dict(zip(map(tuple, words), coins.STYLE_ODDS, strict=True))
    majority = [
        max({word[i] for word in words}, key=lambda each: sum(p for w, p in odds.items() if w[i] == each))
        for i in range(6)
    ]
    assert majority not in words


@pytest.mark.parametrize("prompt", ["", "hello", "Tom 7 coins buys 2 loses ?", "Tom x coins buys 2 . . ?"])
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a coins problem"):
        coins.parse_prompt(prompt)


@given(random_problems, st.integers(0, 10**9))
def test_tokenizer_round_trip(problem, seed):
    tokenizer = build_tokenizer()
    text = coins.draw_solution(problem, random.Random(seed))
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(problem.prompt).input_ids) == 12
    assert tokenizer.unk_token_id not in tokenizer(f"{problem.prompt} {text}").input_ids
    assert tokenizer("Tom coughs").input_ids[1] == tokenizer.unk_token_id

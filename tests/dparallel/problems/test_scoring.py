import random
import re
from pathlib import Path

import pytest

from dparallel.config.problems import EMBEDDED, ProblemsConfig, ProtocolConfig
from dparallel.problems.answers import exact, flexible_extract, plain_number
from dparallel.problems.embedded import embedded_task
from dparallel.problems.judging import score
from dparallel.problems.registry import load_problems
from dparallel.problems.scorer import Verdict
from dparallel.problems.scoring import SCORERS, accuracy_metric, check_scorable, scorers_of
from dparallel.problems.sources import Problem, ProblemsError


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("16 - 3 = <<16-3=13>>13\n#### 18", "So she makes $18 every day.", True),
        ("#### 18", "18", True),
        ("#### 8", "8", True),  # one digit takes the second half of the pattern
        ("#### 70000", r"The profit is \boxed{70,000}.", True),
        ("#### 1,000", "about 1000.", True),
        ("#### -4", "it fell to -4 degrees", True),
        ("#### 18", "She had 18, then 2 more: 20", False),  # the last one counts
        ("#### 18", "18.0", False),  # compared as texts, as lm-eval does
        ("#### 18", "18 ...", False),  # an ellipsis is the last match there, too
        ("#### 18", "eighteen", False),
        ("#### 18", "", False),
        ("18", "the answer: 18", True),
        # `,` and `$` go before the final dot is looked for
        ("18", "The answer is $18.$", True),
        ("18", "It is 18.,", True),
        ("1234", "It costs $1,234.$", True),
        ("#### 8.$", "8", True),
        ("18", "18..", False),  # one dot goes
        ("18.", "18.", True),
        # what is in front of the last `#### ` goes, where a blank follows it
        ("#### 17 #### 18", "18", True),
        ("####18", "18", False),
        ("#$### 18", "18", True),  # `$` goes first
        ("first\nsecond #### 18", "18", True),
        # blanks stay in the reference
        ("#### 18 ", "18", False),
        (" 18", "18", False),
        # no number in the response reads as this text
        ("[invalid]", "none", True),
        ("[INVALID]", "none", True),
        ("5 apples", "5", False),
        ("-", "$-", False),
        ("--5", "--5", False),
        ("", "...", False),
        ("", "$,", True),
        ("٣", "3", False),  # digits are 0 to 9
    ],
)
def test_the_last_number_is_the_answer(reference: str, response: str, right: bool) -> None:
    assert flexible_extract(reference, response) is right
    assert lm_eval_score(reference, response) is right


def lm_eval_score(reference: str, response: str) -> bool:
    """lm-eval 0.4's filter `flexible-extract` and metric `exact_match` of gsm8k, from their description."""
    matches = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", response)
    prediction = "[invalid]"
    if matches:
        groups = [group for group in matches[-1] if group]
        prediction = (groups[0] if groups else "[invalid]").strip()
    for ignored in (",", "\\$", "(?s).*#### ", "\\.$"):
        prediction, reference = re.sub(ignored, "", prediction), re.sub(ignored, "", reference)
    return prediction.lower() == reference.lower()


PIECES = [
    "#### ",
    "####",
    "#",
    " ",
    "\n",
    "$",
    ",",
    ".",
    "-",
    "[invalid]",
    "[INVALID]",
    "a",
    "B",
    *"0123456789",
]


def drawn(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(9)))


def test_flexible_extract_is_the_score_of_lm_eval() -> None:
    rng, right = random.Random(0), 0
    for _ in range(100_000):
        reference, response = drawn(rng), drawn(rng)
        if rng.random() < 0.5:  # the same numbers in other notations
            response += "".join(
                character + rng.choice(["", "", ",", "$", ".$"]) for character in reference.split("#### ")[-1]
            )
        expected = lm_eval_score(reference, response)
        assert flexible_extract(reference, response) is expected, (reference, response)
        right += expected
    assert right > 4_000


def test_a_long_reference_is_compared_in_linear_time() -> None:
    assert not flexible_extract("#" * 500_000, "18")


def test_the_reference_states_its_answer_last() -> None:
    assert plain_number("5 * 4 = 20\n#### 1 and so\n#### $70,000.") == "70000"


def test_exact_forgives_blanks_around_and_nothing_else() -> None:
    assert exact(" b ", "b\n")
    assert not exact("b", "B")


def protocol(*scorers: str) -> ProtocolConfig:
    return ProtocolConfig(scorers=scorers)


COINS = "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
SOLUTION = "first Tom has 7 coins then Tom buys 2 making 9 then 8 once he gives 1 then Tom finds 1 making 9 "


def test_all_scorers_of_a_protocol_judge_each_response_and_the_first_metric_is_the_accuracy() -> None:
    problems = [Problem("1", "s", COINS, reference="#### 9"), Problem("2", "s", COINS)]
    both = protocol("flexible_extract", "coins")
    expected = [
        Verdict({"flexible_extract": True, "solution": True, "answer": True}),
        Verdict(
            {"flexible_extract": None, "solution": False, "answer": True},
            "the introduction is '#### 9', not 'first Tom has 7 coins' or 'Tom has 7 coins first'",
        ),
    ]
    assert score(problems, [SOLUTION + "answer #### 9", "#### 9"], both) == expected
    assert accuracy_metric(both) == "flexible_extract"
    assert accuracy_metric(protocol("coins")) == "solution"
    assert score([], [], both) == []


def test_every_scorer_gives_its_metrics_and_no_two_of_a_benchmark_share_one() -> None:
    for name, scorer in SCORERS.items():
        assert scorer.name == name
        prompt = next(embedded_task(name).problems("test", 0)).prompt if name in EMBEDDED else COINS
        problem = Problem("1", "s", prompt, reference="9")
        if scorer.in_process:
            judged = scorer.score([problem] * 2, ["", "9"])
            assert [tuple(verdict.metrics) for verdict in judged] == [scorer.metrics] * 2
    others = [name for name in SCORERS if name not in ("mbpp", *EMBEDDED[1:])]
    assert len(scorers_of(protocol(*others))) == len(others)
    with pytest.raises(ProblemsError, match="more than one of them gives 'pass_at_1'"):
        scorers_of(protocol("humaneval", "mbpp"))


def test_scorers_that_do_not_exist_are_named_with_those_that_do() -> None:
    with pytest.raises(
        ProblemsError,
        match=r"unknown scorer 'exakt'; did you mean 'exact'\? known: exact, flexible_extract, strict_match",
    ):
        scorers_of(protocol("exakt"))


def test_a_problem_of_a_local_copy_is_named_by_its_file_and_row(tmp_path: Path) -> None:
    """Its id and its source are those of the published data set, whatever the copy is called."""
    file = tmp_path / "copy.jsonl"
    file.write_text('{"q": "1 + 1?", "a": "#### 2"}\n{"q": "2 + 2?", "a": "four"}\n', encoding="utf-8")
    asked = {"prompt": "{q}", "scorers": ["boxed"], "data": [{"path": "openai/sums", "reference": "a"}]}
    config = ProblemsConfig.model_validate({"benchmark": "dataset", "path": str(file), "protocol": asked})
    with pytest.raises(ProblemsError, match=rf"^problem sums-00002 \({file}, row 2\): scorer boxed compares"):
        load_problems(config)


@pytest.mark.parametrize(
    ("scorer", "problem", "message"),
    [
        (
            "exact",
            Problem("p", "s", "1 + 1?"),
            r"^problem p \(s\) has no reference, so exact .*add a reference",
        ),
        (
            "flexible_extract",
            Problem("p", "s", "a", reference="#### 18 "),
            r"^problem p \(s\): .*compares numbers, .* ends in '18 ': end it in one",
        ),
        ("flexible_extract", Problem("p", "s", "a", reference="none"), "ends in 'none'"),
        ("strict_match", Problem("p", "s", "a", reference="none"), "ends in 'none'"),
        ("strict_match_cot", Problem("p", "s", "a", reference="none"), "ends in 'none'"),
        ("boxed", Problem("p", "s", "a", reference="none"), "ends in 'none'"),
        ("boxed", Problem("p", "s", "a", reference="--5"), "ends in '--5'"),
        ("math_verify", Problem("p", "s", "a", reference=r"\boxed{}"), "put it into .*boxed"),
        ("coins", Problem("p", "s", "Tom 7"), "judges coins problems alone: 'Tom 7' is not a coins problem"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_named_before_any_work(
    scorer: str, problem: Problem, message: str
) -> None:
    right = Problem("q", "s", COINS, reference="9")
    check_scorable([right], protocol(scorer))
    with pytest.raises(ProblemsError, match=message):
        check_scorable([right, problem], protocol(scorer))


def test_a_reference_may_be_missing_where_unknown_is_an_answer() -> None:
    unknown = Problem("p", "s", "1 + 1?")
    check_scorable([unknown], protocol("exact", "flexible_extract"), need_references=False)
    assert score([unknown], ["2"], protocol("exact")) == [Verdict({"exact": None})]


def test_the_prefill_is_judged_together_with_the_response() -> None:
    for scorer, prefill, response in (
        ("boxed", "The final answer is \\boxed{", "18}."),
        ("strict_match", "#### ", "18"),
        ("flexible_extract", "It is 1", "8."),
        ("exact", "#### ", "18"),
    ):
        problem = Problem("p", "s", "9 + 9?", prefill, reference="#### 18")
        protocol = ProtocolConfig(scorers=(scorer,), prefill="x")
        assert score([problem], [response], protocol) == [Verdict({scorer: True})], scorer

import random
import re
from fractions import Fraction

import pytest

from dparallel.problems.answers import flexible_extract, plain_number
from dparallel.problems.gsm8k import boxed, number, strict_match, strict_match_cot
from tests.dparallel.problems.rows import rows


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("#### 18", "so 16 - 3 = 13\n#### 18", True),
        ("#### 70000", "#### 70,000", True),
        ("#### 18", "#### 18.", True),
        ("#### -4", "#### -4 degrees", True),
        ("#### 18", "#### 18\n#### 20", True),  # the first one counts
        ("#### 18", "#### $18", False),
        ("#### 18", "####18", False),
        ("#### 18", "####  18", False),
        ("#### 18", "18", False),
        ("#### 18", "#### 18.0", False),  # compared as texts
        ("#### 18", "#### 1 8", False),
        ("#### 18", "", False),
    ],
)
def test_strict_match_takes_the_number_after_the_hashes(reference: str, response: str, right: bool) -> None:
    assert strict_match(reference, response) is right
    assert lm_eval_score(r"#### (\-?[0-9\.\,]+)", reference, response) is right


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("#### 18", "The answer is 18.", True),
        ("#### 18", "The answer is 18. The answer is 20.", True),
        ("#### 1000", "The answer is 1,000.", True),
        ("#### 18", "The answer is 18 dollars", True),
        ("#### 18", "The answer is 18", False),  # reads as 1, since another character must follow
        ("#### 1", "The answer is 18", True),
        ("#### 18", "The answer is 18\n", False),
        ("#### 18", "The answer is 18..", True),
        ("#### 18", "the answer is 18.", False),
        ("#### 18", "The answer is $18.", False),
        ("#### 18", "#### 18", False),
    ],
)
def test_strict_match_of_chains_of_thought_takes_the_sentence(
    reference: str, response: str, right: bool
) -> None:
    assert strict_match_cot(reference, response) is right
    assert lm_eval_score(r"The answer is (\-?[0-9\.\,]+).", reference, response) is right


def lm_eval_score(pattern: str, reference: str, response: str) -> bool:
    """lm-eval 0.4's filter `regex` (its first match) and `exact_match` of gsm8k, from their description."""
    matches = re.findall(pattern, response)
    prediction = matches[0].strip() if matches else "[invalid]"
    for ignored in (",", "\\$", "(?s).*#### ", "\\.$"):
        prediction, reference = re.sub(ignored, "", prediction), re.sub(ignored, "", reference)
    return prediction.lower() == reference.lower()


PIECES = ["#### ", "####", " ", "\n", "$", ",", ".", "-", "[invalid]", "The answer is ", "a", *"0123456789"]


def test_strict_matches_are_the_scores_of_lm_eval() -> None:
    rng, right = random.Random(0), [0, 0]
    scores = [(strict_match, r"#### (\-?[0-9\.\,]+)"), (strict_match_cot, r"The answer is (\-?[0-9\.\,]+).")]
    for _ in range(10_000):
        reference = "".join(rng.choices(PIECES, k=rng.randrange(6)))
        response = "".join(rng.choices(PIECES, k=rng.randrange(6)))
        if rng.random() < 0.7:
            response += (
                rng.choice(["#### ", "The answer is "]) + reference.split("#### ")[-1] + rng.choice(".,\na")
            )
        for at, (score, pattern) in enumerate(scores):
            expected = lm_eval_score(pattern, reference, response)
            assert score(reference, response) is expected, (reference, response)
            right[at] += expected
    assert min(right) > 300


def test_verdicts_that_lm_eval_gave() -> None:
    recorded = rows("lm_eval_gsm8k")
    assert len(recorded) == 320
    for reference, response, *verdicts in recorded:
        ours = [score(reference, response) for score in (flexible_extract, strict_match, strict_match_cot)]
        assert ours == verdicts, (reference, response)


@pytest.mark.parametrize("row", rows("gsm8k"), ids=lambda row: plain_number(row["answer"]))
def test_reference_solutions_are_right_and_another_number_is_wrong(row: dict[str, str]) -> None:
    solution, answer = row["answer"].split("#### ")
    other = str(int(answer.replace(",", "")) + 1)
    for score, form in (
        (flexible_extract, "#### {}"),
        (strict_match, "#### {}"),
        (strict_match_cot, "The answer is {}."),
        (boxed, r"\boxed{{{}}}"),
    ):
        assert score(row["answer"], solution + form.format(answer))
        assert not score(row["answer"], solution + form.format(other))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-5", -5),
        ("- 5", -5),
        ("\u22125", -5),
        ("007", 7),
        # dots and zeros
        ("18.", 18),
        ("18..", 18),
        ("18.00", 18),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("1.000", 1),
        # thousands
        ("1,000", 1000),
        ("12,345,678.50", Fraction(24691357, 2)),
        ("1{,}000", 1000),
        (r"1\,000", 1000),
        (r"1,\!000", 1000),
        ("1 000", 1000),
        # currency
        (r"\$18", 18),
        ("$18.00$", 18),
        (r"-\$5", -5),
        (r"\$-5", -5),
        (r"US\$5", 5),
        ("\u00a35", 5),
        # units
        (r"18\text{ eggs}", 18),
        (r"18 \text{ dollars/hour}", 18),
        (r"\text{18 eggs}", 18),
        (r"\textbf{18}", 18),
        (r"18\,\text{cm}^2", 18),
        ("18 cm^2", 18),
        ("18 year-olds", 18),
        (r"50\%", 50),
        (r"30^\circ", 30),
        (r"30^{\circ}", 30),
        # fractions
        ("1/2", Fraction(1, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\frac12", Fraction(-1, 2)),
        (r"\dfrac{1{,}000}{2}", 500),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("-3 1/2", Fraction(-7, 2)),
        # other writing
        ("x = 18", 18),
        ("3 + 15 = 18", 18),
        (r"\left(18\right)", 18),
        ("Janet makes $18", 18),
        ("x=18", 18),
        ("Answer: 18", 18),
        ("Loss: -18", -18),
        ("18cm", 18),
        ("18/hour", 18),
        (r"\$18/\text{hour}", 18),
        (r"18\text{ m}", 18),
        (r"18\,\mathrm{L}", 18),
        (r"18\text{ eggs/day}", 18),
        (r"x \approx 18", 18),
        (r"\mathbf{18}", 18),
        ("[18]", 18),
        ("18 eggs.", 18),
        (r"\frac{36}{2}\text{ eggs}", 18),
        (r"\frac{18}{1}", 18),
    ],
)
def test_a_number_in_any_notation(text: str, value: int | Fraction) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eggs",
        "eighteen",
        "1,23",
        "1,0000",
        "1.2.3",
        "10,18",
        "10, 18",
        "18 or 20",
        "18-20",
        "18:30",
        "3 hours 30 minutes",
        "3 + 4",
        "5 - 3",
        r"18 \times 2",
        r"2 \cdot 3",
        r"\sqrt{4}",
        "2^3",
        "1e3",
        "1/0",
        "3 14",
        "\u0661\u0668",
        "9" * 10_000,
        # expressions, variables and relations
        "18!",
        "|18|",
        "18x",
        "18 x",
        "x 18",
        "18xy",
        "18(x)",
        "18(a + b)",
        "a(18)",
        r"\frac{18}{}",
        r"\frac{}{18}",
        r"\frac{18}{x}",
        r"\frac{x}{18}",
        r"\frac{18}{ab}",
        r"\frac{18",
        "18/",
        "/18",
        "18/x",
        "18^x",
        "18^{n}",
        "18_x",
        "18_{10}",
        "18'",
        "18\u00b2",
        "18\u00bd",
        "\u221a18",
        "\u00b118",
        r"\pm 18",
        "x != 18",
        "x >= 18",
        "x <= 18",
        "x > 18",
        "x \u2260 18",
        r"x \neq 18",
        r"x \ge 18",
        "x - 18",
        "x +18",
        "--18",
        "18-",
        "18+",
        "18 = x",
        "18k",
        "18K",
        "18M",
        "18th",
        "18i",
        "18e",
        "0x18",
        r"\sqrt{18}",
        r"\lfloor 18 \rfloor",
        r"18\\20",
        r"\{18\}",
        r"\log 18",
        "log 18",
        # words that make it another number
        "minus 18",
        "negative 18",
        "18 dozen",
        "twenty 18",
        "18 for two",
        "Thirty-two or 18",
        "18 thousand",
        "18 million dollars",
        "half of 18",
        "18 and a half",
        "twice 18",
        "18 squared",
        "at least 18",
        "more than 18",
        "not 18",
        "18 or x",
    ],
)
def test_what_is_no_single_number(text: str) -> None:
    assert number(text) is None


def test_the_last_box_counts() -> None:
    assert boxed("#### 18", r"\boxed{17}, no: \boxed{18}")
    assert not boxed("#### 18", r"\boxed{18}, no: \boxed{17}")
    assert boxed("#### 18", r"\boxed{18} apples, of which 5 are green")
    assert not boxed("#### 18", "18")
    assert not boxed("#### 18", "")
    assert not boxed("none", r"\boxed{none}")
    assert boxed("#### 18", r"\boxed{+18}")
    assert not boxed("#### 18", r"\boxed{3 +18}")
    assert boxed("5 * 14,000 = 70000\n#### 70,000", r"\boxed{\$70{,}000.00}")

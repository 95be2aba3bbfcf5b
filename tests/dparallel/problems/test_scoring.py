import pytest

from dparallel.problems.scoring import exact, flexible_extract, plain_number


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
    ],
)
def test_the_last_number_is_the_answer(reference: str, response: str, right: bool) -> None:
    assert flexible_extract(reference, response) is right


def test_the_reference_states_its_answer_last() -> None:
    assert plain_number("5 * 4 = 20\n#### 1 and so\n#### $70,000.") == "70000"


def test_exact_forgives_blanks_around_and_nothing_else() -> None:
    assert exact(" b ", "b\n")
    assert not exact("b", "B")

from collections.abc import Callable
from importlib.metadata import version
from threading import Thread

import pytest

from dparallel.problems import mathematics
from dparallel.problems.mathematics import (
    MathematicsError,
    answer_of,
    math_verify,
    minerva,
    no_answer,
    normalized,
    prepare_math_verify,
    prepare_minerva,
)
from tests.dparallel.problems.rows import rows

needs_parser = pytest.mark.skipif(
    version("antlr4-python3-runtime") != mathematics.ANTLR,
    reason=f"antlr4-python3-runtime {mathematics.ANTLR} is not installed",
)
MATH = rows("math500")


def final(answer: str) -> str:
    return f"So.\nFinal Answer: The final answer is ${answer}$. I hope it is correct."


@needs_parser
def test_verdicts_that_lm_eval_gave() -> None:
    prepare_minerva()
    prepare_math_verify()
    recorded = rows("lm_eval_minerva")
    assert len(recorded) == 60
    for reference, response, by_minerva, by_math_verify in recorded:
        assert minerva(reference, response) is by_minerva, (reference, response)
        assert math_verify(reference, response) is by_math_verify, (reference, response)


@pytest.mark.parametrize("at", range(len(MATH)), ids=[row["answer"] for row in MATH])
def test_math_verify_takes_reference_solutions_and_no_other_answer(at: int) -> None:
    row, other = MATH[at], MATH[at - 1]["answer"]
    for reference in (row["solution"], row["answer"]):
        assert math_verify(reference, row["solution"])
        assert not math_verify(reference, rf"So it is $\boxed{{{other}}}$.")
        assert not math_verify(reference, "")


@needs_parser
@pytest.mark.parametrize("at", range(len(MATH)), ids=[row["answer"] for row in MATH])
def test_minerva_takes_reference_answers_and_no_other_answer(at: int) -> None:
    row, other = MATH[at], MATH[at - 1]["answer"]
    for reference in (row["solution"], row["answer"]):
        assert minerva(reference, final(row["answer"]))
        assert not minerva(reference, final(other))
        assert not minerva(reference, row["solution"])  # without the sentence


@needs_parser
def test_minerva_reads_the_beginning_of_an_answer() -> None:
    """As lm-eval does."""
    assert minerva("3", final("3, 5, 7"))
    assert not minerva("5", final("3, 5, 7"))


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        (r"x = 5", "5"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        (r"\sqrt[3]8", r"\sqrt[3]{8}"),
        (r"\left[0,\frac{1}{2}\right)", r"\left[0,\frac{1}{2}\right)"),  # its `ft` is no unit
        (r"10\text{ square feet}", "10"),
        (r"2\pi cm", r"2\pi"),
        (r"\$32,\!348", "32348"),
        ("1,234,567", "1234567"),
        ("0,1", "0,1"),
        (r"\text{east}", "east"),
        (r"75^\circ", "75"),
        (r"the value is $\boxed{7}$ here", "7"),
        ("", ""),
    ],
)
def test_minervas_normalization(answer: str, plain: str) -> None:
    assert normalized(answer) == plain


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"So $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"First $\boxed{1}$, then $\boxed{2}$.", "2"),
        (r" \frac{1}{2} ", r"\frac{1}{2}"),
    ],
)
def test_the_answer_of_a_reference(reference: str, answer: str) -> None:
    assert answer_of(reference) == answer
    assert no_answer(reference) is None


@pytest.mark.parametrize("reference", ["", " ", r"\boxed{}", r"So $\boxed{1$", "2 + 2 = 4\n#### 4"])
def test_references_without_an_answer(reference: str) -> None:
    reason = no_answer(reference)
    assert reason is not None
    assert "put it into" in reason


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"The final answer is $1$. I hope it is correct. $\boxed{2}$", "1"),
        (r"$\boxed{2}$ The final answer is $1$. I hope it is correct.", "1"),
        (r"$\boxed{1}$. No. $\boxed{2}$.", "2"),
        (r"\boxed{2} so 1", "2"),
        (r"$\boxed{2}$ so $x = 1$.", "2"),
        (r"$\boxed{2}$ so the answer is $1$.", "2"),
        ("$1$ then $2$", "2"),
        ("1 then 2", "2"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1,2"),
        (r"\boxed{1}, \boxed{2}", "1,2"),
    ],
)
def test_the_answer_that_math_verify_takes(response: str, answer: str) -> None:
    prepare_math_verify()
    assert [stated for stated in ("1", "2", "1,2") if math_verify(stated, response)] == [answer]


def test_math_verify_works_in_any_thread() -> None:
    verdicts: list[bool] = []
    thread = Thread(target=lambda: verdicts.append(math_verify("2", "The answer is $2$.")))
    thread.start()
    thread.join()
    assert verdicts == [True]


@pytest.mark.parametrize("prepare", [prepare_math_verify, prepare_minerva])
def test_another_version_of_a_library_is_refused(
    prepare: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mathematics, "version", lambda library: "4.13.2")
    with pytest.raises(
        MathematicsError, match=r"but 4\.13\.2 is installed: pip install [a-z0-9-]+==[0-9.]+$"
    ):
        prepare()

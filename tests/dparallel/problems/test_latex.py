import time

import pytest

from dparallel.problems.latex import last_box


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 18 }", "18"),
        (r"\boxed {18}", "18"),
        (r"\fbox{18}", "18"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{18}}", "18"),  # the last one is the inner one
        (r"\boxed{\text{from \fbox{3}} \$18}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces open and close nothing
        (r"\boxed{1\}2}", r"1\}2"),
        (r"\boxed{1} then \boxed{2", "1"),  # cut off
        (r"\boxed{1 then \boxed{2}", "2"),
        (r"$\boxed 2$ apples", "2"),
        (r"it is \boxed 2.5. Then", "2.5"),
        (r"\boxed" + "\n18", "18"),
        (r"} \boxed{18} }", "18"),
        (r"\boxedx{18}", None),
        (r"\\boxed{18}", None),  # a line break, then text
        ("boxed{18}", None),
        ("18", None),
        ("", None),
    ],
)
def test_the_content_of_the_last_complete_box(text: str, content: str | None) -> None:
    assert last_box(text) == content


def test_hostile_texts_take_linear_time() -> None:
    began = time.perf_counter()
    for text in (
        r"\boxed{" * 20_000,
        r"\boxed" * 20_000,
        "{" * 100_000,
        r"\boxed{}" * 10_000 + "}" * 20_000,
    ):
        last_box(text)
    assert time.perf_counter() - began < 10

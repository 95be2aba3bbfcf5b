import pytest

from dparallel.evaluation.texts import accuracy_text, measured_text


def test_an_accuracy_has_its_standard_error_and_its_interval() -> None:
    assert accuracy_text(0.757, 0.0118, (0.7331, 0.7794)) == "75.7 ± 1.2 [73.3, 77.9]"
    assert accuracy_text(0.757, 0.0118, (0.7331, 0.7794), "bubblewrap") == "75.7 ± 1.2 [73.3, 77.9]"
    assert accuracy_text(0.757, 0.0118, (0.7331, 0.7794), "unshare") == "75.7 ± 1.2 [73.3, 77.9] §"
    assert accuracy_text(0.0, 0.0, (0.0, 0.324408)) == "0.0 ± 0.0 [0.0, 32.4]"


@pytest.mark.parametrize(
    ("days", "reused", "text"),
    [
        (["2026-11-25"], 0, "2026-11-25"),
        (["2026-11-25"], 8, "2026-11-25 (reused)"),
        (["2026-11-25", "2026-11-26"], 2, "2026-11-25 to 2026-11-26 (2 of 8 reused)"),
        ([], 8, "unknown (reused)"),
    ],
)
def test_when_it_was_measured_and_what_was_reused(days: list[str], reused: int, text: str) -> None:
    assert measured_text(days, reused, 8) == text

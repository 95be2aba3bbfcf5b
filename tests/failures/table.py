"""The table of all cases in docs/operations.md, written when a session has run all of them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
BEGIN = "<!-- written by make test-failures: begin -->"
END = "<!-- written by make test-failures: end -->"
NOTHING = "nothing"
SAME = "same result"


@dataclass(frozen=True)
class Row:
    """What a case showed.

    Attributes:
        fault: what was done.
        stage: the stage in which it was done.
        outcome: how the run ended, and what it said.
        lost: what has to be computed again.
        rerun: what the same command does afterwards.
    """

    fault: str
    stage: str
    outcome: str
    lost: str = NOTHING
    rerun: str = SAME


class Table:
    """Rows by test. With a file, sessions that run some of the tests add to it."""

    def __init__(self, file: Path | None = None):
        self._file = file
        self._rows: dict[str, Row] = {}
        if file is not None and file.exists():
            self._rows = {name: Row(**row) for name, row in json.loads(file.read_bytes()).items()}

    def add(self, test: str, row: Row) -> None:
        """Note the row of a test that has passed up to here."""
        self._rows[test] = row

    def drop(self, test: str) -> None:
        """Forget the row of a test that failed."""
        self._rows.pop(test, None)

    def missing(self, tests: list[str]) -> list[str]:
        """The tests without a row."""
        return [test for test in tests if test not in self._rows]

    def keep(self) -> None:
        """Write the rows for later sessions."""
        if self._file is not None:
            rows = {test: asdict(row) for test, row in self._rows.items()}
            self._file.write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def write(self, tests: list[str], page: Path = PAGE) -> None:
        """Replace the table between the markers of a page; the rows are in the order of `tests`."""
        titles = ("fault", "stage", "what happens", "lost", "same command again")
        rows = [tuple(asdict(self._rows[test]).values()) for test in tests]
        lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        table = "\n".join(lines)
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, ended, after = rest.partition(END)
        assert ended, f"{page} has no place for the table"
        page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")

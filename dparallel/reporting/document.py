"""A report as a document: the same content as JSON, Markdown and one self-contained HTML page."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dparallel.evaluation import plots
from dparallel.evaluation.cases import STUDENT
from dparallel.pages.html import part, policy, template
from dparallel.pages.replay import drawing
from dparallel.reporting import tables
from dparallel.reporting.pictures import inline_svg, tradeoff
from dparallel.reporting.read import Benchmark
from dparallel.reporting.samples import CHARACTERS, RESPONSES, Exhibition, Exhibitor
from dparallel.reporting.summary import Json, Measured, by_name, summary
from dparallel.stages.files import replacing, write_atomically

MAX_BYTES = 12_000_000  # of a page; fewer samples are shown if it would be larger
PER_OUTCOME = (25, 10, 4, 1)  # samples of each outcome that are tried, in this order


@dataclass(frozen=True)
class Document:
    """What is reported about one experiment, or about several that are compared.

    Attributes:
        kind, title, lead: what it is, its heading, and a sentence below.
        benchmarks: those of the same name are runs of the same benchmark; the first run is compared with.
        warnings: what to know before numbers are compared.
        settings: the settings that differ between runs, as rows of `tables.settings`.
    """

    kind: str
    title: str
    lead: str
    benchmarks: Sequence[Benchmark]
    warnings: Sequence[str] = ()
    settings: Sequence[Json] = ()

    def write(self, folder: Path, stem: str) -> list[str]:
        """Write `<stem>.json`, `<stem>.md`, `<stem>.html` and the pictures; returns the file names."""
        names = [f"{stem}.json", f"{stem}.md", f"{stem}.html"]
        texts = [json.dumps(self.json, indent=1) + "\n", self.markdown(), self.html()]
        for name, text in zip(names, texts, strict=True):
            write_atomically(folder / name, text)
        for name, figure in zip(self._pictures, self._figures.values(), strict=True):
            with replacing(folder / name) as file:
                figure.savefig(file, dpi=plots.DPI, format="png")
        return [*names, *self._pictures]

    @cached_property
    def json(self) -> Json:
        """The content as JSON values; all times lie under keys `times`."""
        return {
            "kind": self.kind,
            "title": self.title,
            "dparallel": version("dparallel"),
            "warnings": list(self.warnings),
            "settings": list(self.settings),
            "benchmarks": self._sections,
        }

    def markdown(self, pictures: bool = True) -> str:
        """The tables and what they mean."""
        parts = [f"# {self.title}", self.lead]
        parts += [_listed(f"**Before you compare**: {text}" for text in self.warnings)]
        if self._differing:
            parts += [self._differing.caption, self._differing.markdown()]
        if self._overview:
            parts += [self._overview.caption, self._overview.markdown()]
        for section, picture in zip(self._sections, self._pictures, strict=True):
            parts += [f"## {section['benchmark']}", *self._outcomes(section)]
            measured, compared = tables.measurements(section), tables.differences(section)
            parts += [measured.caption, measured.markdown(), _listed(tables.notes(section))]
            parts += [compared.caption, compared.markdown(), _listed(tables.paired_notes(section))]
            parts += [f"![Trade-off]({picture})"] if pictures else []
        return "\n\n".join(filter(None, parts)) + "\n"

    def html(self) -> str:
        """The page as text; it loads no other resources."""
        for per_outcome in PER_OUTCOME:
            page = self._page(per_outcome)
            if len(page.encode()) <= MAX_BYTES:
                break
        return page

    def _page(self, per_outcome: int) -> str:
        exhibitor = Exhibitor(per_outcome)
        shown = {
            name: [exhibitor.show(*pair) for pair in exhibited(runs)]
            for name, runs in by_name(self.benchmarks).items()
        }
        sections = [self._section(section, shown[section["benchmark"]]) for section in self._sections]
        replays = exhibitor.replays.html("Decoding") if exhibitor.replays.rows else None
        scripts = (
            [drawing.script(), part(__package__, "page.js")] if replays else [part(__package__, "page.js")]
        )
        limits = (
            f"at most {per_outcome} samples of each outcome, with {RESPONSES} responses; {per_outcome} "
            f"regressions of each comparison; {CHARACTERS:,} characters of a text."
        )
        return template(__package__, "page.html").render(
            kind=self.kind,
            title=self.title,
            lead=self.lead,
            warnings=self.warnings,
            differing=self._differing,
            overview=self._overview,
            sections=sections,
            replay=replays,
            per_outcome=per_outcome,
            limits=limits,
            policy=policy(scripts),
            style=Markup(drawing.style() + part(__package__, "page.css")),
            scripts=[Markup(script) for script in scripts],
        )

    def _section(self, section: Json, exhibitions: Sequence[Exhibition]) -> dict[str, Any]:
        """What the page shows of a benchmark."""
        name = section["benchmark"]
        described = f"Accuracy over tokens per forward pass, {name}; the numbers are in the table"
        return {
            "name": name,
            "id": _identifier(name),
            "outcomes": self._outcomes(section),
            "measurements": tables.measurements(section),
            "differences": tables.differences(section),
            "notes": tables.notes(section),
            "paired_notes": tables.paired_notes(section),
            "picture": inline_svg(self._figures[name], _identifier(name), described),
            "exhibitions": exhibitions,
            "runs": section["runs"],
        }

    def _outcomes(self, section: Json) -> list[str]:
        return [": ".join(filter(None, (run["run"], run["outcome"]))) for run in section["runs"]]

    @cached_property
    def _sections(self) -> list[Json]:
        return summary(self.benchmarks)

    @cached_property
    def _overview(self) -> tables.Table | None:
        return tables.overview(self._sections) if len(self._sections) > 1 else None

    @cached_property
    def _differing(self) -> tables.Table | None:
        return tables.settings(self.settings) if self.settings else None

    @cached_property
    def _figures(self) -> dict[str, Any]:
        return {name: tradeoff(runs) for name, runs in by_name(self.benchmarks).items()}

    @property
    def _pictures(self) -> list[str]:
        return [f"tradeoff-{name}.png" for name in self._figures]


def exhibited(runs: Sequence[Benchmark]) -> list[tuple[Measured, Measured, bool]]:
    """The comparisons whose regressions are shown as (before, after, whether samples are shown, too).

    Of one run: the reference with the operating points of all students, first the best one; of several: the
    best student of the first run with that of each other run.
    """
    first, *later = runs
    if later:
        return [((first, first.best), (run, run.best), True) for run in later]
    students = [row for row in first.reported if row.model.startswith(STUDENT)]
    students.sort(key=lambda row: row != first.best)
    return [((first, first.reference), (first, row), row == first.best) for row in students]


def _listed(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _identifier(name: str) -> str:
    """A benchmark's name as part of ids in a page."""
    return "benchmark-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)

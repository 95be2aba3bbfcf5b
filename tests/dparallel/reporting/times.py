"""Reports without what may differ between repetitions of an experiment: its times."""

import json
import re
from typing import Any

TIMED_COLUMNS = ("latency s", "latency ratio", "TPS", "measured")


def without_times(report: dict[str, str]) -> dict[str, Any]:
    """The report without what may differ between repetitions."""
    content = json.loads(report[".json"])
    for benchmark in content["benchmarks"]:
        for row in benchmark["rows"]:
            timed = {"latency", "latency_speed_up", "tps", "measured_on", "reused"}
            assert set(row.pop("times")) == timed
    lines = report[".md"].splitlines()
    for table in [at for at, line in enumerate(lines) if "latency s" in line]:
        titles = [cell.strip() for cell in lines[table].split("|")]
        for at in range(table, len(lines)):
            if not lines[at].startswith("|"):
                break
            cells = [cell.strip() for cell in lines[at].split("|")]
            lines[at] = "|".join(
                cell for title, cell in zip(titles, cells, strict=True) if title not in TIMED_COLUMNS
            )
    page = re.sub(r'(<td class="(?:number|text) time">)[^<]*', r"\1", report[".html"])
    return {".json": content, ".md": "\n".join(lines), ".html": page}

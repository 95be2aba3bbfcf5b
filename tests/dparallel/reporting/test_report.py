"""The report of an experiment: its numbers by hand, its page, and that repetitions differ in times only."""

import json
import re
from pathlib import Path

import pytest

from dparallel.reporting import document
from dparallel.reporting.read import benchmark_name, read_benchmark
from dparallel.reporting.report import report_folder, write_report
from dparallel.reporting.samples import CHARACTERS
from dparallel.stages.manifest import StageError
from tests.dparallel.browser import in_a_browser, needs_browser
from tests.dparallel.reporting.made import finished_benchmark, unfinished
from tests.dparallel.reporting.times import TIMED_COLUMNS, without_times


def written(stage: Path, teacher: Path, out: Path, title: str = "sums") -> dict[str, str]:
    """Texts of the report's files by suffix."""
    models = {"teacher": str(teacher), "student/fast": str(teacher)}
    store = stage.parents[1] / "measurements"
    files = write_report(title, [(benchmark_name(stage), stage)], store, models, out)
    return {path.suffix: path.read_text(encoding="utf-8") for path in files if path.suffix != ".png"}


@pytest.fixture(scope="module")
def report(stage: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return written(stage, tiny_checkpoint, tmp_path_factory.mktemp("report"))


def test_the_numbers_by_hand(report: dict[str, str]) -> None:
    """11110, 11010 and 11001 of 5 problems; 12, 6 and 3 forward passes for 10 tokens."""
    [section] = json.loads(report[".json"])["benchmarks"]
    assert section["benchmark"] == "sums"
    reference, teacher, student = section["rows"]
    assert [row["accuracy"] for row in section["rows"]] == [0.8, 0.6, 0.6]
    assert [row["accuracy_stderr"] for row in section["rows"]] == pytest.approx(
        [0.1788854, 0.2190890, 0.2190890]
    )
    assert [row["nfe_speed_up"] for row in section["rows"]] == [1, 2, 4]
    assert [row["times"]["latency_speed_up"] for row in section["rows"]] == [1, 2, 4]
    assert [row["times"]["tps"] for row in section["rows"]] == [20, 40, 80]
    assert student["tpf"] == pytest.approx(10 / 3)
    assert student["aup_2_from"] == {
        "model": "teacher",
        "method": "one_token_per_step",
        "tpf": pytest.approx(10 / 12),
        "accuracy": 0.8,
    }
    assert reference["aup"] is None
    assert section["aup"] is None, "a sweep of one threshold is no curve"
    assert section["aup_2"]["y_max"] == 80
    assert section["aup_2"]["meaning"].startswith(
        "AUP (accuracy under parallelism) is the area under accuracy"
    )
    # Wilson: (3.8 + z²/2 ± z sqrt(...)) by its formula; 4 of 5 and 3 of 5
    assert reference["accuracy_interval"] == pytest.approx([0.375535, 0.963776], abs=1e-6)
    assert student["intervals"] == {"exact": pytest.approx([0.230724, 0.882379], abs=1e-6)}
    assert (student["problems"], student["judged"]) == (5, {"exact": 5})
    assert student["times"]["measured_on"] == ["2026-11-25"]
    assert student["times"]["reused"] == 0
    assert teacher["device"] == "a machine"
    _, pair = section["paired"]
    assert pair["before"]["method"] == "one_token_per_step"
    assert pair["after"]["model"] == "student/fast"
    assert [pair[name] for name in ("both", "lost", "gained", "neither")] == [2, 2, 1, 0]
    assert pair["difference"] == pytest.approx(-0.2)
    assert pair["p_value"] == 1


def test_the_markdown_has_the_papers_columns(report: dict[str, str]) -> None:
    head = next(line for line in report[".md"].splitlines() if line.startswith("| model"))
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    assert titles[:6] == ["model", "method", "threshold", "accuracy %", "n", "NFE"]
    assert {"NFE ratio", *TIMED_COLUMNS, "TPF", "AUP_2", "AUP", "device"} <= set(titles)
    assert "y_max = 80.0 %" in report[".md"]
    assert "60.0 ± 21.9 [23.1, 88.2]" in report[".md"]
    assert "66.7‡ |" in report[".md"]
    assert "begins at the teacher's point (TPF 0.83, 80.0 %)" in report[".md"]
    for text in (report[".md"], report[".html"]):
        assert "AUP (accuracy under parallelism) is the area under accuracy" in text


def test_every_row_says_when_and_where_it_was_measured_and_what_was_reused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stage = finished_benchmark(tmp_path / "runs", tiny_checkpoint, reused=5)
    texts = written(stage, tiny_checkpoint, tmp_path / "out")
    lines = texts[".md"].splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith("| model"))
    for line in lines[head + 2 : head + 5]:
        assert line.endswith("| 2026-11-25 (reused) | a machine |")
    page = re.sub(r"\s+", " ", texts[".html"])
    assert page.count('<td class="text time">2026-11-25 (reused)</td> <td class="text">a machine</td>') == 3
    table = (stage / "table.md").read_text(encoding="utf-8")
    assert table.count("| 2026-11-25 (reused) | a machine |") == 3
    rows = json.loads((stage / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {(*row["measured_on"], row["reused"], row["hardware"]) for row in rows} == {
        ("2026-11-25", 5, "a machine")
    }


def test_the_page_escapes_what_models_write_and_loads_nothing(report: dict[str, str]) -> None:
    page = report[".html"]
    assert "&lt;script&gt;document.title = &#39;taken over&#39;" in page
    assert "not a &lt;number&gt;" in page
    assert page.count("<script") == 3, "the data of the replays, their script and the page's"
    assert "default-src 'none'" in page
    assert "unsafe-inline'; script-src 'sha256-" in page
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page)


def test_long_texts_are_cut_and_say_so(report: dict[str, str]) -> None:
    assert f"{'x' * CHARACTERS} […] ({5_000 - CHARACTERS:,} more characters)" in report[".html"]
    assert "x" * (CHARACTERS + 1) not in report[".html"]


def test_the_surest_regression_comes_first_with_both_replays(report: dict[str, str]) -> None:
    """Problems 2 and 3 are lost; confidence rises with the place."""
    page = report[".html"]
    regressions = page[page.index("Regressions:") : page.index("Samples:")]
    assert re.findall(r"<h5>(\S+)", regressions) == ["sums-3", "sums-2"]
    assert "2 of 2." in regressions
    assert re.findall(r"#replay-(\d)", regressions) == ["0", "1", "2", "3"]
    data = re.search(r'id="trace">(.*?)</script>', page)
    assert data is not None
    trace = json.loads(data[1])
    assert len(trace["rows"]) == 4
    student = trace["rows"][1]
    assert student["subject"] == "sums, sums-3: fast, entropy 0.5, wrong"
    assert [forward["offsets"] for forward in student["forwards"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert student["commit_step"][10:] == [2, 2], "filled in without a prediction"


def test_samples_are_counted_by_outcome(report: dict[str, str]) -> None:
    assert "lost (2 of 2)" in report[".html"]
    assert "gained (1 of 1)" in report[".html"]
    assert "solved by both (2 of 2)" in report[".html"]
    assert "<p>All 5 problems.</p>" in report[".html"]
    assert "the first 25" not in report[".html"]


def test_a_page_that_would_be_too_large_shows_fewer_samples(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = finished_benchmark(
        tmp_path / "runs", tiny_checkpoint, reference="1" * 30, swept="1" * 30, student="0" * 30
    )
    size = len(written(stage, tiny_checkpoint, tmp_path / "large")[".html"])
    monkeypatch.setattr(document, "MAX_BYTES", size - 1)
    page = written(stage, tiny_checkpoint, tmp_path / "small")[".html"]
    assert "10 of 30 problems: the first 10 of each outcome; 20 are left out." in page


def test_several_benchmarks_have_one_table_above(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A method that one of them lacks leaves a cell empty."""
    stages = [
        ("sums", finished_benchmark(tmp_path / "runs", tiny_checkpoint)),
        (
            "proofs",
            finished_benchmark(tmp_path / "runs", tiny_checkpoint, key="proofs-0123456789", student="1" * 5),
        ),
    ]
    files = write_report("both", stages, tmp_path / "runs" / "measurements", {}, tmp_path / "out")
    markdown, page = (
        next(path for path in files if path.suffix == suffix).read_text(encoding="utf-8")
        for suffix in (".md", ".html")
    )
    table = [line for line in markdown.split("## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["model", "method", "sums, n = 5", "proofs, n = 5"]
    assert cells[-1] == [
        "fast",
        "entropy",
        "60.0 ± 21.9 [23.1, 88.2] · 3.0 · 4.00x",
        "100.0 ± 0.0 [56.6, 100.0] · 3.0 · 4.00x",
    ]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {path.name for path in files} >= {"tradeoff-sums.png", "tradeoff-proofs.png"}


def test_only_times_differ_between_repetitions(tiny_checkpoint: Path, tmp_path: Path) -> None:
    again = finished_benchmark(tmp_path / "runs", tiny_checkpoint, seconds=0.7, day=26, reused=3)
    other = written(again, tiny_checkpoint, tmp_path / "out")
    first = finished_benchmark(tmp_path / "first", tiny_checkpoint)
    mine = written(first, tiny_checkpoint, tmp_path / "mine")
    assert mine != other
    assert without_times(mine) == without_times(other)


@pytest.mark.parametrize("sandbox", ["bubblewrap", "unshare"])
def test_accuracies_judged_in_the_weaker_sandbox_are_marked(
    sandbox: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    stage = finished_benchmark(tmp_path / "runs", tiny_checkpoint, sandbox=sandbox)
    texts = written(stage, tiny_checkpoint, tmp_path / "out")
    [section] = json.loads(texts[".json"])["benchmarks"]
    assert [row["sandbox"] for row in section["rows"]] == [sandbox] * 3
    texts["table"] = (stage / "table.md").read_text(encoding="utf-8")
    weaker = sandbox == "unshare"
    for kind in (".md", ".html", "table"):
        assert (len(re.findall(r"\](<[^>]*>|\s)*§", texts[kind])) >= 3) is weaker, kind
        assert ("weaker sandbox than bubblewrap" in texts[kind]) is weaker, kind


def test_another_result_has_a_folder_of_its_own(tmp_path: Path) -> None:
    one = report_folder(tmp_path, [("sums", "benchmark-0123456789")])
    assert one == report_folder(tmp_path, [("sums", tmp_path / "benchmark-0123456789")])
    assert one != report_folder(tmp_path, [("sums", "benchmark-9876543210")])


def test_what_is_missing_or_damaged_is_named_with_the_remedy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stage = finished_benchmark(tmp_path / "runs", tiny_checkpoint)
    benchmark = read_benchmark("sums", stage, tmp_path / "elsewhere")
    with pytest.raises(StageError, match="elsewhere lacks the verdicts .* run the stage again"):
        benchmark.answers(benchmark.reference)
    (stage / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StageError, match=r"results.json is damaged, or .* another version .*: delete .*0123"):
        read_benchmark("sums", stage)
    (stage / "results.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(StageError, match=r"results.json is damaged"):
        read_benchmark("sums", stage)
    with pytest.raises(StageError, match="no manifest.json, so no finished stage"):
        read_benchmark("sums", unfinished(stage))


PLAYS = """<script>
const seen = [];
addEventListener("error", (event) => seen.push(event.message));
const press = (key) =>
  $("replay").dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true, bubbles: true }));
const shown = (pager) => [...pager.querySelectorAll(".sample")].filter((sample) => !sample.hidden);
const [regressions, samples] = document.querySelectorAll(".pager");
const report = { visible: shown(regressions).length, place: regressions.querySelector("output").textContent };
regressions.querySelector(".next").click();
report.second = shown(regressions)[0].querySelector("h5").textContent;
report.last = regressions.querySelector(".next").disabled;
const filter = samples.querySelector("select");
filter.value = "gained"; filter.dispatchEvent(new Event("change"));
report.gained = [shown(samples)[0].dataset.outcome, samples.querySelector("output").textContent];
const links = shown(regressions)[0].querySelectorAll("a.replay");
links[1].click();
setTimeout(() => {
  report.subject = $("subject").textContent;
  report.focused = document.activeElement.id;
  press("Home");
  report.masked = document.querySelectorAll(".masked").length;
  press("ArrowRight");
  report.status = $("status").textContent;
  $("back").click();
  report.back = document.activeElement === links[1];
  report.wide = document.documentElement.scrollWidth > innerWidth;
  report.errors = seen;
  document.title = JSON.stringify(report);
}, 200);
</script></body>"""


MEASURES = """<script>
document.title = JSON.stringify([...document.querySelectorAll(".scroll")].map((part) =>
  [part.scrollWidth - part.clientWidth, part.getBoundingClientRect().right <= innerWidth]));
</script></body>"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 1200, 600])
def test_tables_fit_the_page_or_scroll(width: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    stage = finished_benchmark(
        tmp_path / "runs",
        tiny_checkpoint,
        hardware="AMD EPYC 9B45 128-Core Processor, threads: 128",
        reused=2,
    )
    page = written(stage, tiny_checkpoint, tmp_path / "out")[".html"]
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", MEASURES)
    dom = in_a_browser(page, tmp_path, f"--window-size={width},900")
    [title] = re.findall(r"<title>(.*?)</title>", dom)
    for hidden, inside in json.loads(title):
        assert inside
        assert hidden <= 0 or width < 1200, "the whole table is seen, with its last column"


@needs_browser
@pytest.mark.slow
def test_the_page_works_in_a_browser(report: dict[str, str], tmp_path: Path) -> None:
    dom = in_a_browser(report[".html"], tmp_path)
    assert "<title>sums</title>" in dom, "no script in a response ran"
    assert ">1 of 2</output>" in dom, "its policy lets its own scripts run"
    page = re.sub(r"<meta http-equiv[^>]*>", "", report[".html"])  # which forbids further scripts
    dom = in_a_browser(page.replace("</body>", PLAYS), tmp_path, "--virtual-time-budget=2000")
    [title] = re.findall(r"<title>(.*?)</title>", dom)
    seen = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == []
    assert (seen["visible"], seen["place"]) == (1, "1 of 2")
    assert seen["second"].split()[0] == "sums-2"
    assert seen["last"]
    assert seen["gained"] == ["gained", "1 of 1"]
    assert seen["subject"] == "sums, sums-2: fast, entropy 0.5, wrong"
    assert seen["focused"] == "replay"
    assert seen["masked"] == 12
    assert seen["status"] == "Committed 4 tokens; 8 still masked."
    assert seen["back"]
    assert not seen["wide"], "only tables scroll sideways"

"""`dparallel generate --infill`: the text, the terminal, the page, and what is refused."""

import re

import pytest

from dparallel import DecodingConfig, complete, load_model, load_tokenizer
from dparallel.cli.infill import in_text
from dparallel.cli.main import main
from dparallel.decoding.canvas import Generation, Step
from tests.dparallel.browser import needs_browser
from tests.dparallel.cli.commands import PROMPT, SHAPE, refused
from tests.dparallel.cli.test_main import ESCAPE, run_on_terminal, terminal  # noqa: F401
from tests.dparallel.cli.test_trace import data_of, reported

DECODING = DecodingConfig(gen_length=24, block_length=8, threshold=1.5)
TEXT, PARTS = "Tom has <gap 5> coins . <gap 3> ?", ["Tom has ", 5, " coins . ", 3, " ?"]


@pytest.fixture
def arguments(tiny_checkpoint) -> list[str]:
    return ["generate", "--model", str(tiny_checkpoint), *SHAPE, "--infill", TEXT]


def test_the_filled_text_is_printed(tiny_checkpoint, arguments, capsys) -> None:
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    [alone] = complete(model, tokenizer, infill=[PARTS], decoding=DECODING)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == alone.text + "\n"
    assert f"NFE {alone.nfe} | " in err
    [behind] = complete(model, tokenizer, [PROMPT], DECODING, infill=[PARTS])
    assert main([*arguments, "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == behind.text + "\n"


def test_a_terminal_sees_the_gaps_fill_and_the_text_around_them(arguments, terminal) -> None:  # noqa: F811
    code, text = run_on_terminal(arguments, terminal)
    assert code == 0
    assert "·" in text
    words = ESCAPE.sub("", text).split()
    assert words[:2] == ["Tom", "has"]
    assert words[-1] == "?", "also behind an end token"


def test_the_page_has_the_text_and_what_was_filled(arguments, tmp_path) -> None:
    assert main([*arguments, "--trace", "page.html", "--prompt", PROMPT]) == 0
    trace = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    [row], [decoding] = trace["rows"], trace["decodings"]
    assert row["prompt"] == PROMPT
    assert decoding["gen_length"] == 8
    words = [trace["words"][word] for word in row["words"]]
    assert words[:2] == ["Tom", "has"]
    assert [step < 0 for step in row["commit_step"]] == [
        *[True] * 2, *[False] * 5, *[True] * 2, *[False] * 3, True
    ]  # fmt: skip
    committed = {
        offset: word
        for forward in row["forwards"]
        for offset, word, commit in zip(forward["offsets"], forward["words"], forward["commit"], strict=True)
        if commit
    }
    assert sorted(committed) == [2, 3, 4, 5, 6, 9, 10, 11]
    assert all(row["words"][offset] == word for offset, word in committed.items())


def test_gaps_among_given_tokens_by_hand() -> None:
    filled = Generation([7, 8, 9], [0, 1, 0], [0.5, 0.6, 0.7], 2, 3)
    step = Step(0, 1, True, [1], [8], [0.6], [0.1], [True])
    whole, [moved] = in_text([1, 5, 6, 1, 1], 1, filled, [step])
    assert whole == Generation([7, 5, 6, 8, 9], [0, -1, -1, 1, 0], [0.5, 0.0, 0.0, 0.6, 0.7], 2, 3)
    assert moved.offsets == [3]


DRAWN = """<script>
const seen = [];
addEventListener("error", (event) => seen.push(event.message));
const faces = () => chips.map(({ face }) => face.textContent);
show(0);
const first = faces(), tips = chips.map((_, offset) => describe(offset));
const masked = chips.flatMap(({ chip }, offset) => (chip.classList.contains("masked") ? [offset] : []));
const status = $("status").textContent, fresh = document.querySelectorAll(".new").length;
show(nfe(trace.rows[0]));
document.title = JSON.stringify({
  errors: seen, first, masked, tips, status, fresh, last: faces(), cell: describeReading(0, 0),
  note: chips[0].note.textContent, ends: $("status").textContent,
});
</script></body>"""


@needs_browser
@pytest.mark.slow
def test_given_text_is_drawn_from_the_start(arguments, tmp_path) -> None:
    assert main([*arguments, "--trace", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    report = reported(page, DRAWN, tmp_path)
    assert report["errors"] == []
    assert report["masked"] == [2, 3, 4, 5, 6, 9, 10, 11]
    assert [report["first"][place] for place in (0, 1, 8, 12)] == ["Tom", "has", ".", "?"]
    assert report["tips"][0] == report["cell"] == "“Tom”\nposition 1, given"
    assert report["note"] == ""
    assert report["fresh"] == 0
    assert report["status"] == "All 8 positions are masked."
    assert report["last"][0] == "Tom"
    assert report["ends"].endswith("; 0 still masked.")
    assert "filled" not in report["ends"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop", "a"], "--stop with --infill, which fills the gaps of one text: drop --stop"),
        (["--prompts", "x.jsonl"], "--prompts with --infill"),
        (["--out", "x"], "--out with --infill"),
        (["--prompt", " "], "--prompt: the prompt is empty"),
        (["--prompt", "<mask>"], "--prompt holds token id 1"),
        (
            ["--infill", "Tom <gap none>"],
            r"--infill: <gap none> is no gap: give .*, or write \\<gap none> for",
        ),
        (["--infill", "Tom"], "--infill has no gap: mark the place"),
        (
            ["--infill", "Tom <mask> <gap 3>"],
            "--infill has the mask token '<mask>' in the text 'Tom <mask> '",
        ),
        (["--infill", "Tom \udc80 <gap 3>"], "--infill has 'Tom .*not a text in UTF-8"),
        (["--infill", "<gap 3>"], "infill 0 has no text"),
        (["--infill", "Tom <gap 99>"], "--infill has gaps of 99 tokens, and this model takes 64"),
        (["--cache", "dual"], "cache='dual' with infill: .* use cache='none'"),
        (["--mode", "pipelined"], "mode='pipelined' with infill"),
        (["--trace", "."], "--trace . is a folder"),
    ],
)
def test_what_does_not_suit_is_one_line(arguments, capsys, flags, message) -> None:
    assert re.search(message, refused([*arguments, *flags], capsys))

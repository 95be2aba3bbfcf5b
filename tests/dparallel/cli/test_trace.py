"""The trace page: its data against the generations, and its script in a real browser."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from dparallel import DecodingConfig, generate
from dparallel.cli.trace.page import trace_page
from dparallel.models.token_texts import token_texts
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.browser import in_a_browser, needs_browser
from tests.dparallel.decoding.test_ends import OPEN, PROMPT, TABLE, Scripted

TOKENIZER = build_tokenizer()
DECODING = DecodingConfig(gen_length=24, block_length=8, threshold=1.5)
REVISING = DecodingConfig(
    **{"mode": "revising", "revision_passes": 3, "gen_length": 24, "block_length": 8},
    threshold=0.05,
    stop_at_eos=False,
)
PROMPTS = ["Tom 7 coins buys 2 ?", "</script><script>alert(1)</script><!-- & \u2028 Ann"]


def page_of(tokenizer=TOKENIZER, prompts=PROMPTS, model=None, decoding=DECODING):
    model = model or random_model(1)
    steps = []
    encoded = [[4 + len(prompt) % 40, 7] for prompt in prompts]
    generations = generate(model, encoded, decoding, observe=steps.extend)
    page = trace_page("some/<model>", decoding, tokenizer, model.config, prompts, generations, steps)
    return page, generations


def data_of(page: str) -> dict:
    [data] = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert not set("<>&") & set(data)
    return json.loads(data)


def test_the_data_rebuilds_every_generation():
    page, generations = page_of()
    trace = data_of(page)
    assert page.count("some/&lt;model&gt;") == 2, "in the title and the heading"
    [decoding] = trace["decodings"]
    assert decoding["threshold"] == 1.5
    assert "steps" not in decoding, "settings that are not in use are left out"
    assert [row["prompt"] for row in trace["rows"]] == PROMPTS
    for row, generation in zip(trace["rows"], generations, strict=True):
        assert row["commit_step"] == generation.commit_step
        assert row["num_tokens"] == generation.num_tokens
        assert len(row["forwards"]) == generation.nfe
        assert [trace["words"][word] for word in row["words"]] == [
            TOKENIZER.decode([token]) for token in generation.tokens
        ]
        assert "".join(row["pieces"]) == TOKENIZER.decode(generation.tokens)
        committed = {}
        for number, forward in enumerate(row["forwards"]):
            assert all(generation.commit_step[offset] >= number for offset in forward["offsets"])
            for offset, word, p, commit in zip(
                *(forward[name] for name in ("offsets", "words", "probability", "commit")), strict=True
            ):
                if commit:
                    committed[offset] = (number, word, p)
        for offset, word in enumerate(row["words"]):
            if offset in committed:
                expected = (generation.commit_step[offset], word, round(generation.confidence[offset], 4))
                assert committed[offset] == expected
            else:
                assert [word] == trace["ends"], "only end-of-text is filled in without a prediction"


def changes_of(row: dict) -> list[list[int]]:
    """The positions whose committed token each forward pass replaced by another one."""
    held, changes = {}, []
    for forward in row["forwards"]:
        new = dict(zip(forward["offsets"], forward["words"], strict=True))
        new = {
            offset: word
            for (offset, word), commit in zip(new.items(), forward["commit"], strict=True)
            if commit
        }
        assert not any(held.get(offset) == word for offset, word in new.items()), "a commit is a change"
        changes.append([offset for offset in new if offset in held])
        held |= new
    assert all(row["words"][offset] == word for offset, word in held.items())
    return changes


def test_the_data_has_the_tokens_that_were_replaced():
    page, generations = page_of(decoding=REVISING)
    for row, generation in zip(data_of(page)["rows"], generations, strict=True):
        changes = changes_of(row)
        assert sum(map(len, changes)) > 2
        last = {offset: step for step, offsets in enumerate(changes) for offset in offsets}
        assert all(generation.commit_step[offset] == step for offset, step in last.items())


def test_the_page_loads_nothing():
    page, _ = page_of()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that most characters beyond ASCII are several tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<mask>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


BYTES = byte_level_tokenizer()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_token_texts_join_to_the_text(text):
    tokens = BYTES.encode(text)
    assert "".join(token_texts(BYTES, tokens)) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=20))
def test_token_texts_join_to_whatever_the_tokens_say(tokens):
    assert "".join(token_texts(BYTES, tokens)) == BYTES.decode(tokens)


def test_token_texts_of_a_character_in_several_tokens():
    assert token_texts(BYTES, BYTES.encode("a🙂b")) == ["a", "", "", "", "🙂", "b"]
    assert token_texts(TOKENIZER, TOKENIZER.encode("Tom has 3")) == ["Tom", " has", " 3"]


PLAYS = """<script>
const seen = [];
addEventListener("error", (event) => seen.push(event.message));
const key = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
const faces = () => [...document.querySelectorAll(".face")].map((face) => face.textContent);
const masks = () => document.querySelectorAll(".masked").length;
const report = { last: faces(), clock: $("clock").textContent };
key("Home"); report.first = masks();
key("ArrowRight"); report.second = masks();
key("ArrowLeft"); report.back = masks();
document.getElementsByName("view")[1].click();
key("End"); report.confidence = document.querySelector(".note").textContent;
const box = $("map").getBoundingClientRect();
$("map").dispatchEvent(new MouseEvent("click",
  { clientX: box.left + map.left + 1, clientY: box.top + map.top + 1.5 * map.cellHeight }));
report.clicked = state.done;
key(" "); report.playing = state.timer !== null; key(" "); report.paused = state.timer === null;
$("row").value = "1"; $("row").dispatchEvent(new Event("change")); report.prompt = $("prompt").textContent;
report.errors = seen;
document.title = JSON.stringify(report);
</script></body>"""


def reported(page: str, script: str, folder) -> dict:
    """What a script in the page writes into its title; without the policy, which forbids further scripts."""
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)
    dom = in_a_browser(page.replace("</body>", script), folder)
    [title] = re.findall(r"<title>(.*?)</title>", dom)
    return json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


REPLAYS = """<script>
const seen = [], forwards = [];
addEventListener("error", (event) => seen.push(event.message));
const places = (name) => chips.flatMap(({ chip }, offset) => (chip.classList.contains(name) ? [offset] : []));
const row = trace.rows[0];
for (let done = 1; done <= nfe(row); done += 1) {
  show(done);
  forwards.push({
    faces: chips.map(({ face }) => face.textContent), masked: places("masked").length,
    changed: places("changed"),
    notes: chips.map(({ note }) => note.textContent), status: $("status").textContent,
    said: places("changed").map((offset) => describe(offset)),
    cells: row.words.map((_, offset) => describeReading(offset, done - 1)),
  });
}
document.title = JSON.stringify({
  forwards, errors: seen, summary: $("summary").textContent,
  legend: $("legend").textContent + $("map-legend").textContent,
});
</script></body>"""


@needs_browser
@pytest.mark.slow
def test_tokens_that_changed_are_drawn_and_said(tmp_path):
    page, _ = page_of(decoding=REVISING)
    row, words = data_of(page)["rows"][0], data_of(page)["words"]
    report = reported(page, REPLAYS, tmp_path)
    assert report["errors"] == []
    assert "changed by this forward" in report["legend"]
    assert "another token was committed there before" in report["legend"]
    changes, held, marked = changes_of(row), {}, set()
    assert f"changes of committed tokens{sum(map(len, changes))}" in report["summary"]
    for step, (seen, forward) in enumerate(zip(report["forwards"], row["forwards"], strict=True)):
        before = dict(held)
        for offset, word, commit in zip(forward["offsets"], forward["words"], forward["commit"], strict=True):
            if commit:
                held[offset] = word, step
            said = seen["cells"][offset]
            assert ("\nunchanged" in said) == (not commit and offset in before)
            assert ("\nchanged\nbefore: " in said) == (commit and offset in before)
            assert ("\ncommitted" in said) == (commit and offset not in before)
        marked |= set(changes[step])
        assert seen["changed"] == sorted(marked), "drawn from the change on"
        assert [offset for offset, note in enumerate(seen["notes"]) if "↻" in note] == sorted(marked)
        assert seen["masked"] == (24 - len(held) if step + 1 < len(row["forwards"]) else 0)
        for offset, (word, since) in held.items():
            if words[word] != TOKENIZER.eos_token:
                assert seen["faces"][offset] == words[word]
            assert seen["notes"][offset].rstrip("↻") == str(since + 1)
        for offset, said in zip(seen["changed"], seen["said"], strict=True):
            if offset in changes[step] and words[before[offset][0]] != TOKENIZER.eos_token:
                word, since = before[offset]
                assert (
                    f"changed by forward {step + 1}\nbefore: “{words[word]}”, by forward {since + 1}" in said
                )
        new = sum(forward["commit"]) - len(changes[step])
        count = len(changes[step])
        assert f"committed {new} token{'s' * (new != 1)}, changed {count} committed token" in seen["status"]
        assert seen["status"].startswith("Read 8 positions, mean entropy ")


@needs_browser
@pytest.mark.slow
def test_positions_filled_behind_an_end_are_drawn_when_they_are_filled(tmp_path):
    """The third forward of the table commits an end token, and the token of position 6 is replaced."""
    model = Scripted(TABLE).model
    decoding = DecodingConfig(gen_length=8, block_length=4, **OPEN, eos_fill="immediate")
    steps = []
    [generation] = generate(model, [PROMPT], decoding, observe=steps.extend)
    page = trace_page("m", decoding, TOKENIZER, model.config, ["?"], [generation], steps)
    report = reported(page, REPLAYS, tmp_path)
    assert report["errors"] == []
    second, third, last = report["forwards"][1:]
    assert [seen["masked"] for seen in report["forwards"]] == [7, 5, 1, 0]
    assert second["faces"][5] == TOKENIZER.decode([8])
    assert third["faces"][3:] == last["faces"][3:] == ["∎"] * 5
    assert third["notes"] == ["50%", "2", "1", "3", "", "", "", ""], "without a prediction, no number"
    assert "filled 4 with end-of-text; 1 still masked" in third["status"]
    assert "filled" not in last["status"]


@needs_browser
@pytest.mark.slow
def test_the_page_replays_in_a_browser(tmp_path):
    page, generations = page_of()
    one = generations[0]
    dom = in_a_browser(page, tmp_path)
    assert f"forward {one.nfe} of {one.nfe}</output>" in dom, "its policy lets its script run"
    report = reported(page, PLAYS, tmp_path)
    eos = TOKENIZER.eos_token
    assert report["errors"] == []
    assert report["clock"] == f"forward {one.nfe} of {one.nfe}"
    words = [TOKENIZER.decode([token]) for token in one.tokens]
    assert report["last"] == ["∎" if word == eos else word for word in words]
    assert report["first"] == report["back"] == 24
    assert report["second"] == sum(step > 0 for step in one.commit_step)
    assert report["confidence"] == str(round(100 * round(one.confidence[0], 4)))
    assert report["clicked"] == 2
    assert report["playing"]
    assert report["paused"]
    assert report["prompt"] == PROMPTS[1]

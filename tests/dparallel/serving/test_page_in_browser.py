"""The page at `/` in a real browser: what it sends, what it shows, and what it does not let happen."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dparallel.config.decoding import DecodingConfig, combined
from dparallel.decoding.generate import Generation, generate
from dparallel.problems.prompts import encode_chat
from dparallel.serving.engine import Served
from tests.conftest import random_model
from tests.dparallel.browser import Page, driven, needs_driver
from tests.dparallel.serving.conftest import SLOW, TEMPLATE, Running, serving

pytestmark = [pytest.mark.slow, needs_driver]
PUZZLE = "Tom 7 coins buys 2 loses 1 finds 1 . . ?"
ENTER, ESCAPE = "\ue007", "\ue00c"
READY = "!document.getElementById('main').hidden"
ENDED = "page.turns.length === arguments[0] && page.stop === null"
ENDED += " && page.panes.every((pane) => pane.due === undefined)"  # and all of it is drawn
# The bodies that the page sends, as texts.
SPY = "window.sent = []; const before = fetch; window.fetch = (path, options) => {"
SPY += " if (options.body) sent.push(options.body); return before(path, options); };"
# Of a pane: the ids of the tokens on its canvas, undefined where it is masked, and the texts drawn.
CANVAS = """
const panes = [...document.querySelectorAll(".pane")], pane = panes[arguments[0]];
const chips = [...pane.querySelectorAll(".token")];
const counters = [...pane.querySelectorAll(".counters div")];
return {
  tokens: chips.map((chip) => (chip.dataset.token === "" ? null : Number(chip.dataset.token))),
  faces: chips.map((chip) => chip.querySelector(".face").textContent),
  steps: chips.map((chip) => chip.querySelector(".note").textContent),
  counters: Object.fromEntries(counters.map((each) => [...each.children].map((part) => part.textContent))),
  problem: pane.querySelector(".problem").textContent,
  state: pane.querySelector(".state").textContent,
};"""
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with driven(tmp_path_factory.mktemp("browser")) as page:
        page.show(1400, 900)
        yield page


@pytest.fixture(scope="module")
def fast(teacher: Served) -> Served:
    """The teacher once more, with a looser threshold."""
    decoding = DecodingConfig(gen_length=36, block_length=12, threshold=0.9)
    return Served("fast", teacher.model, teacher.tokenizer, decoding)


@pytest.fixture(scope="module")
def two(teacher: Served, fast: Served) -> Iterator[Running]:
    with serving(teacher, fast) as server:
        yield server


def opened(page: Page, server: Running) -> Page:
    page.visit(server.url)
    page.until(READY)
    page.run(SPY)
    return page


def say(page: Page, prompt: str, turns: int = 1) -> None:
    page.type("#prompt", prompt + ENTER)
    page.until(ENDED, turns)


def sent(page: Page) -> list[dict[str, Any]]:
    return [json.loads(body) for body in page.run("return sent.splice(0)")]


def expected(served: Served, prompt: list[int], **settings: Any) -> Generation:
    decoding = DecodingConfig(**combined(settings, served.decoding.stated()))
    [alone] = generate(served.model, [prompt], decoding)
    return alone


def agrees(page: Page, pane: int, alone: Generation) -> None:
    """Whether a canvas and its counters are those of the library's response."""
    shown = page.run(CANVAS, pane)
    tokens = alone.tokens[: alone.num_tokens]
    assert shown["tokens"][: len(tokens)] == tokens
    steps = [str(step + 1) for step in alone.commit_step[: len(tokens)]]
    assert shown["steps"][: len(tokens)] == steps
    assert shown["counters"]["forwards"] == str(alone.nfe)
    assert shown["counters"]["tokens"] == str(alone.num_tokens)
    assert shown["counters"]["per forward"] == f"{alone.num_tokens / alone.nfe:.2f}"
    assert float(shown["counters"]["tokens/s"]) > 0
    assert shown["state"] == "finished"


def test_two_models_answer_as_the_library_does(
    browser: Page, two: Running, teacher: Served, fast: Served
) -> None:
    page = opened(browser, two)
    say(page, PUZZLE)
    prompt = encode_chat(teacher.tokenizer, [{"role": "user", "content": PUZZLE}], TEMPLATE)
    alone = [expected(served, prompt) for served in (teacher, fast)]
    assert alone[0].nfe > alone[1].nfe > 1
    for pane, one in enumerate(alone):
        agrees(page, pane, one)
    texts = page.run("return [...document.querySelectorAll('.answer .text')].map((text) => text.textContent)")
    assert texts == [
        teacher.tokenizer.decode(one.tokens[: one.num_tokens - 1], skip_special_tokens=True) for one in alone
    ]
    words = page.run(CANVAS, 0)["faces"]
    assert words[:3] == [teacher.tokenizer.decode([token]) for token in alone[0].tokens[:3]]
    assert words[alone[0].num_tokens - 1] == "∎"
    assert f"fast took {alone[1].nfe} forward passes where tiny took {alone[0].nfe}" in page.text(
        "#comparison"
    )
    messages = [{"role": "user", "content": PUZZLE}]
    stream = {"stream": True, "stream_mode": "canvas", "stream_options": {"include_usage": True}}
    assert sent(page) == [{"model": name, "messages": messages, **stream} for name in ("tiny", "fast")]
    assert page.messages() == []


def test_each_model_continues_its_own_answers(browser: Page, two: Running) -> None:
    page = opened(browser, two)
    page.click("#system-part summary")
    page.type("#system", "Ann")
    say(page, "Tom 3 pens ?")
    first = page.run("return [0, 1].map((pane) => page.turns[0].answers[pane].text)")
    say(page, "Bob ?", 2)
    requests = sent(page)[2:]
    for request, text in zip(requests, first, strict=True):
        assert [turn["role"] for turn in request["messages"]] == ["system", "user", "assistant", "user"]
        assert [turn["content"] for turn in request["messages"]] == ["Ann", "Tom 3 pens ?", text, "Bob ?"]
    page.click(".turn .look")  # the first answer's canvas
    page.until("page.panes[0].answer === page.turns[0].answers[0]")
    page.click("#clear")
    assert page.run("return document.querySelectorAll('.turn, .token').length") == 0
    say(page, "Bob ?")
    assert [len(request["messages"]) for request in sent(page)] == [2, 2]


def test_the_slider_changes_the_threshold(browser: Page, two: Running, teacher: Served) -> None:
    page = opened(browser, two)
    slider = page.run(
        "const slide = document.querySelector('.slide');"
        "return [slide.min, slide.max, slide.value, slide.getAttribute('aria-label')]"
    )
    assert slider == ["0", "2", "0.5", "threshold: largest entropy of a token, in nats"]
    page.type(".slide", "\ue012" * 30)  # the key to the left
    assert page.run("return document.querySelector('.exact').value") == "0.2"
    say(page, PUZZLE)
    one, other = sent(page)
    assert one["threshold"] == 0.2
    assert "threshold" not in other
    prompt = encode_chat(teacher.tokenizer, [{"role": "user", "content": PUZZLE}], TEMPLATE)
    agrees(page, 0, expected(teacher, prompt, threshold=0.2))
    page.click(".decoding summary")
    page.click(".defaults")
    assert page.run("return document.querySelector('.slide').value") == "0.5"
    page.run(
        "const rule = document.querySelector('[name=rule]'); rule.value = 'confidence';"
        "rule.dispatchEvent(new Event('change'));"
    )
    assert page.text(".meaning") == "smallest probability of a token"
    assert page.run("return document.querySelector('.slide').max") == "1"
    say(page, PUZZLE, 2)
    assert {**sent(page)[0], "messages": None}.items() >= {"rule": "confidence", "threshold": 0.9}.items()
    say(page, "", 2)


def test_every_choice_of_mode_and_rule_is_a_request(browser: Page, two: Running, teacher: Served) -> None:
    page = opened(browser, two)
    fields = page.run("""
      const { settings } = page.panes[0], all = [];
      for (const mode of ["", ...settings.model.modes]) {
        settings.given = {};
        if (mode) settings.give("mode", mode);
        for (const rule of ["", ...settings.rules(settings.effective.mode)]) {
          for (const lengths of [{}, { gen_length: 24, block_length: 8 }]) {
            settings.given = mode ? { mode } : {};
            if (rule) settings.give("rule", rule);
            Object.assign(settings.given, lengths);
            settings.draw();
            all.push(settings.fields);
          }
        }
      }
      return all;""")
    assert len(fields) > 80
    for given in fields:
        DecodingConfig(**combined(given, teacher.decoding.stated()))


def test_stop_frees_the_row(browser: Page, endless: Served, until: Wait) -> None:
    with serving(endless) as server:
        page = opened(browser, server)
        assert not page.run("return document.querySelectorAll('.pane')[1].offsetParent"), (
            "one model, one pane"
        )
        for turn, stop in enumerate((lambda: page.click("#stop"), lambda: page.type("body", ESCAPE)), 1):
            page.type("#prompt", "Tom" + ENTER)
            page.until("document.querySelectorAll('.token:not([data-token=\"\"])').length >= 3")
            assert server.engine.running == 1
            assert page.run(CANVAS, 0)["state"] == "decoding"
            stop()
            page.until(ENDED, turn)
            until(lambda: server.engine.running == 0)
            page.until("document.querySelector('.pane .problem').textContent === 'Stopped.'")
        with server.client() as client:
            assert 'failed_responses_total{reason="cancelled"} 2.0' in client.get("/metrics").text
        assert page.messages() == []


def test_a_long_canvas_is_drawn_in_time(browser: Page, endless: Served) -> None:
    short = Served("endless", endless.model, endless.tokenizer, SLOW.model_copy(update={"steps": 64}))
    with serving(short) as server:
        page = opened(browser, server)
        page.run("document.querySelector('.map-part').open = false")
        before = page.run("return document.querySelector('.pane').offsetWidth")
        say(page, "Tom")
        assert page.run("return page.panes[0].chips.length") == 1024
        seconds = page.run(
            "const times = [], pane = page.panes[0];"
            "for (const done of [0, 64, 20, 40]) { const from = performance.now(); pane.done = done;"
            " pane.draw(); document.body.offsetHeight; times.push((performance.now() - from) / 1000); }"
            "return times"
        )
        assert sorted(seconds)[1] < 0.5, "of a machine with much else to do"
        assert page.run("return document.querySelector('.pane').offsetWidth") == before


HOSTILE = [
    "<script>hit()</script>",
    "<img/src=x/onerror=hit()>",
    "</template><svg/onload=hit()>",
    "&lt;b&gt;",
]


def test_texts_of_models_are_never_markup(browser: Page) -> None:
    vocabulary = {"<pad>": 0, "<mask>": 1, "<eos>": 2, "<unk>": 3}
    vocabulary |= {f"{HOSTILE[index % 4]}{index}": index for index in range(4, 50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    name = "<img src=x onerror=hit()>"
    decoding = DecodingConfig(gen_length=32, block_length=16, threshold=1.5, stop_at_eos=False)
    with serving(Served(name, random_model(), tokenizer, decoding)) as server:
        page = opened(browser, server)
        page.run("window.hits = 0; window.hit = () => { hits += 1; }")
        say(page, HOSTILE[0])
        shown = page.run(CANVAS, 0)
        assert any(face.startswith(HOSTILE[0]) for face in shown["faces"])
        assert HOSTILE[1] in page.text(".answer .text")
        assert page.text(".answer b") == name
        assert page.run("return document.querySelector('.model').value") == name
        assert page.run("return document.querySelectorAll('main img, main script, main svg').length") == 0
        sizes = page.run("""
          const pane = page.panes[0], sizes = new Set();
          for (let done = 0; done <= nfe(pane.answer.row); done++) {
            pane.done = done;
            pane.draw();
            for (const { chip } of pane.chips) sizes.add(`${chip.offsetWidth} ${chip.offsetHeight}`);
          }
          return [...sizes];""")
        assert len(sizes) == 1, "nothing moves, however long tokens are"
        with pytest.raises(AssertionError, match="TrustedHTML"):  # the browser lets no script do it
            page.run("document.body.innerHTML = '<p>'")
        assert page.run("return hits") == 0


def test_a_key_is_asked_for_and_kept_nowhere(browser: Page, teacher: Served) -> None:
    with serving(teacher, key="secret word") as server:
        page = browser
        page.visit(server.url)
        page.until("!document.getElementById('key-form').hidden")
        assert page.run("return document.getElementById('main').hidden")
        assert page.run("return document.activeElement.id") == "key"
        page.type("#key", "wrong" + ENTER)
        page.until("document.getElementById('key-message').textContent")
        page.type("#key", "secret word" + ENTER)
        page.until(READY)
        say(page, PUZZLE)
        assert page.run(CANVAS, 0)["state"] == "finished"
        kept = page.run(
            "return [location.href, document.cookie, JSON.stringify({ ...localStorage, ...sessionStorage }),"
            " document.documentElement.outerHTML, document.getElementById('key').value]"
        )
        assert not any("secret word" in place for place in kept)
        page.run("access.key = 'old'")
        say(page, PUZZLE, 2)
        page.until("!document.getElementById('key-form').hidden")
        page.type("#key", "secret word" + ENTER)
        page.until(READY)
        assert page.run("return page.turns.length") == 2, "the conversation is still there"


def test_errors_are_said_in_the_pane(browser: Page, teacher: Served, endless: Served) -> None:
    with serving(teacher, batch_size=1, queue=1) as server:
        page = opened(browser, server)
        say(page, "Tom " * 70)
        assert "at most 64 fit together" in page.run(CANVAS, 0)["problem"]
        page.run("page.panes[0].settings.given = { gen_length: 10, block_length: 4 }")
        say(page, "Tom", 2)
        assert "not divisible" in page.run(CANVAS, 0)["problem"]
    say(page, "Tom", 3)
    assert "connection to the server was lost" in page.run(CANVAS, 0)["problem"]
    with serving(endless, batch_size=1, queue=1) as server:
        page = opened(browser, server)
        left = threading.Event()

        def hold() -> None:
            with server.client() as client:
                body = {"model": "endless", "prompt": [7], "stream": True}
                with client.stream("POST", "/v1/completions", json={**body, "n": 2}):
                    left.wait(60)

        holding = threading.Thread(target=hold)
        holding.start()
        try:
            while server.engine.running + server.engine.waiting < 2:
                left.wait(0.01)
            say(page, "Tom")
        finally:
            left.set()
            holding.join()
        problem = page.run(CANVAS, 0)["problem"]
        assert problem.startswith("The server is busy: 1 responses are waiting already: try again in ")


@pytest.mark.parametrize(
    ("width", "scheme"), [(1600, "light"), (1000, "dark"), (390, "light"), (320, "dark")]
)
def test_it_fits_any_window(browser: Page, two: Running, width: int, scheme: str) -> None:
    page = opened(browser, two)
    page.show(width, 800, scheme)
    try:
        say(page, PUZZLE)
        page.run("for (const part of document.querySelectorAll('details')) part.open = true")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        colour = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(18, 21, 27)") == (scheme == "dark")
        nameless = page.run("""
          return [...document.querySelectorAll("body input, body select, body textarea, body button")]
            .filter((control) => !control.labels?.length && !control.getAttribute("aria-label")
              && !(control.localName === "button" && control.textContent))
            .map((control) => control.outerHTML)""")
        assert nameless == []
    finally:
        page.show(1400, 900)


def test_without_a_template_prompts_are_continued(browser: Page, teacher: Served) -> None:
    with serving(teacher, template=None) as server:
        page = opened(browser, server)
        assert "no chat template" in page.text("#hint")
        say(page, PUZZLE)
        [body] = sent(page)
        assert body["prompt"] == PUZZLE
        agrees(page, 0, expected(teacher, teacher.tokenizer.encode(PUZZLE)))
        page.click("#compare")
        page.run("document.getElementById('in-turn').checked = true")
        say(page, PUZZLE, 2)
        assert [body["model"] for body in sent(page)] == ["tiny", "tiny"]
        agrees(page, 1, expected(teacher, teacher.tokenizer.encode(PUZZLE)))
        page.click("#replay")
        page.until("page.timer === null")
        assert page.run("return page.panes[0].shownForwards === nfe(page.panes[0].answer.row)")

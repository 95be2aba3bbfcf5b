import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProtocolConfig
from dparallel.models.checkpoints import load_tokenizer, save_model
from dparallel.problems.judging import score
from dparallel.problems.prompts import (
    ChatTemplateError,
    encode_chat,
    encode_problems,
    finish,
    render,
    render_all,
    tokenizer_fingerprint,
)
from dparallel.problems.scorer import Verdict
from dparallel.problems.sources import Problem
from dparallel.tiny.tokenizer import build_tokenizer

DECODING = DecodingConfig(gen_length=36, block_length=12)


def ids(words: str) -> list[int]:
    return [build_tokenizer().get_vocab()[word] for word in words.split()]


def test_text_ends_before_the_first_end_of_text_and_keeps_stray_special_tokens() -> None:
    tokens = ids("Tom <pad> has <eos> 7 <eos>")
    assert finish(tokens, build_tokenizer(), ids("<eos>")) == "Tom <pad> has"
    assert finish(ids("Tom has"), build_tokenizer(), ids("<eos>")) == "Tom has"
    assert finish(tokens, build_tokenizer(), ids("<eos> has")) == "Tom <pad>"


TEMPLATE = (
    "{% for message in messages %}"
    "{% if not message.content %}{{ raise_exception('an empty turn') }}{% endif %}"
    "first {{ message.content }} {% endfor %}{% if add_generation_prompt %}answer{% endif %}"
)
PLAIN = ProtocolConfig()
CHAT = ProtocolConfig(chat=True)


def encode(protocol: ProtocolConfig, tokenizer, model, *prompts: str) -> list[list[int]]:
    problems = [Problem(f"p-{index}", "s", prompt) for index, prompt in enumerate(prompts)]
    return encode_problems(problems, protocol, tokenizer, model, DECODING)


def test_the_config_decides_whether_a_problem_is_a_turn(tiny_model) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert encode(PLAIN, tokenizer, tiny_model, "Tom 7") == [ids("Tom 7")]
    assert encode(CHAT, tokenizer, tiny_model, "Tom 7", "Ann") == [
        ids("first Tom 7 answer"),
        ids("first Ann answer"),
    ]


def test_a_template_beside_the_tokenizer_is_its_own(tiny_model, tmp_path) -> None:
    save_model(tiny_model, tmp_path, tokenizer=build_tokenizer())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert encode(CHAT, load_tokenizer(tmp_path), tiny_model, "Tom 7") == [ids("first Tom 7 answer")]


def test_no_template_says_how_to_give_one(tiny_model, tmp_path) -> None:
    remedy = (
        r"no chat template.*chat_template\.jinja beside its tokenizer.*"
        r"protocol\.chat_template: FILE.*protocol\.chat: false"
    )
    with pytest.raises(ChatTemplateError, match=remedy):
        encode(CHAT, build_tokenizer(), tiny_model, "Tom 7")
    file = tmp_path / "mine.jinja"
    given = CHAT.model_copy(update={"chat_template": str(file)})
    with pytest.raises(ChatTemplateError, match=r"chat_template=.*mine\.jinja: .*No such file"):
        encode(given, build_tokenizer(), tiny_model, "Tom 7")
    file.write_text(TEMPLATE, encoding="utf-8")
    assert encode(given, build_tokenizer(), tiny_model, "Tom 7") == [ids("first Tom 7 answer")]


@pytest.mark.parametrize("template", ["{% for", TEMPLATE])
def test_a_template_that_refuses_says_why(template: str) -> None:
    turns = [{"role": "user", "content": ""}]
    with pytest.raises(ChatTemplateError, match="the chat template refuses this conversation: ."):
        encode_chat(build_tokenizer(), turns, template)


def test_a_template_that_fails_or_says_nothing_is_named_with_its_problem(tiny_model, tmp_path) -> None:
    """Division by zero is not an error class of the template language."""
    file = tmp_path / "mine.jinja"
    given = CHAT.model_copy(update={"chat_template": str(file)})
    failures = {
        "{{ 1 / 0 }}": "fails on this conversation: ZeroDivisionError: division by zero",
        "{{ messages[0].content + 1 }}": "fails on this conversation: TypeError",
        "": "makes an empty prompt of this conversation",
        "{{ raise_exception('no turns') }}": "refuses this conversation: no turns",
    }
    for template, message in failures.items():
        file.write_text(template, encoding="utf-8")
        where = rf"problem p-0 \(s\): the chat template {message}.*\(template of .*mine\.jinja\)"
        with pytest.raises(ChatTemplateError, match=where):
            encode(given, build_tokenizer(), tiny_model, "Tom 7")


def plain(tokenizer, text: str) -> list[int]:
    return render(Problem("p", "s", text), PLAIN, tokenizer)


def test_a_token_in_front_of_every_text_is_not_doubled() -> None:
    tokenizer = build_tokenizer()
    eos = ids("<eos>")[0]
    assert plain(tokenizer, "<eos> Tom 7") == ids("<eos> Tom 7")
    assert plain(tokenizer, "Tom Tom Tom") == ids("Tom Tom Tom")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", eos)]
    )
    assert plain(tokenizer, "Tom 7") == ids("<eos> Tom 7")
    assert plain(tokenizer, "<eos> Tom 7") == ids("<eos> Tom 7")
    assert plain(tokenizer, "<eos> <eos> Tom") == ids("<eos> <eos> Tom")
    assert plain(tokenizer, "") == ids("<eos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <pad>", special_tokens=[("<eos>", eos), ("<pad>", ids("<pad>")[0])]
    )
    assert plain(tokenizer, "<eos> Tom") == ids("<eos> Tom")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, "<eos> " + TEMPLATE])
def test_bos_is_written_once_wherever_a_text_begins_with_it(adds_bos: bool, template: str, tmp_path) -> None:
    """As in D2F's prompts: `<|startoftext|>{question}`."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<eos>"
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", ids("<eos>")[0])]
        )
    file = tmp_path / "mine.jinja"
    file.write_text(template, encoding="utf-8")
    bos, question = "<eos> ", "Tom 7"
    for system, example, prompt in ((bos, "", ""), ("", bos, ""), ("", "", bos), (bos, bos, bos)):
        shown = {"user": example + "Ann 5 ?", "assistant": " 5"}
        given = {"examples": [shown], "separator": " ", "system": system + "first"}
        for turns in ((), (("user", example + "Sam"), ("assistant", "has"))):
            problem = Problem("p", "s", prompt + question, turns=turns)
            written = [render(problem, ProtocolConfig(**given), tokenizer)]
            assert written == [ids("<eos> first Ann 5 ? 5 Tom 7")]
            for form in ("text", "turns"):
                chat = ProtocolConfig(**given, chat=True, chat_template=str(file), examples_as=form)
                found = render(problem, chat, tokenizer)
                assert found.count(ids("<eos>")[0]) == 1, (system, example, prompt, form)
                assert found[0] == ids("<eos>")[0]


def test_a_conversation_is_encoded_turn_by_turn() -> None:
    turns = [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "7"}]
    assert encode_chat(build_tokenizer(), turns, TEMPLATE) == ids("first Tom first 7 answer")


def test_a_prompt_that_does_not_fit_names_problem_and_lengths(tiny_model) -> None:
    with pytest.raises(ValueError, match=r"problem p-1 \(s\).* 29 tokens.*gen_length=36.*at most 28"):
        encode(PLAIN, build_tokenizer(), tiny_model, "Tom 7", "Tom " * 29)


def test_the_longest_prompt_that_does_not_fit_is_named(tiny_model) -> None:
    """The largest length that fits after it fits after all."""
    with pytest.raises(ValueError, match=r"problem p-2 \(s\).* 40 tokens.* gen_length .* is 24\)"):
        encode(PLAIN, build_tokenizer(), tiny_model, "Tom " * 29, "Tom 7", "Tom " * 40, "Tom " * 35)


def test_a_prompt_that_holds_the_mask_is_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match="problem p-0.*holds token id 1"):
        encode(PLAIN, build_tokenizer(), tiny_model, "Tom <mask>")


def test_tokenizer_fingerprint_sees_vocabulary_and_template() -> None:
    one, other = build_tokenizer(), build_tokenizer()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    other = build_tokenizer()
    other.add_tokens(["word"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


def appends_eos(front: str = "") -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    special = [("<eos>", ids("<eos>")[0]), ("<pad>", ids("<pad>")[0])]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{front} $A <eos>".strip(), special_tokens=special
    )
    return tokenizer


def test_no_end_of_text_stands_between_prompt_and_response() -> None:
    """For tokenizers that append one to every text (`add_eos_token`), with and without BOS."""
    assert appends_eos().encode("Tom 7") == ids("Tom 7 <eos>")
    assert plain(appends_eos(), "Tom 7") == ids("Tom 7")
    assert plain(appends_eos("<pad>"), "Tom 7") == ids("<pad> Tom 7")
    assert plain(appends_eos("<pad>"), "<pad> Tom 7") == ids("<pad> Tom 7")
    assert plain(appends_eos(), "Tom 7 <eos>") == ids("Tom 7 <eos>"), "the text's own stays"
    tokenizer = appends_eos("<pad>")
    tokenizer.chat_template = TEMPLATE
    assert render(Problem("p", "s", "Tom"), CHAT, tokenizer) == ids("first Tom answer")


def test_a_tokenizer_without_an_unknown_token_encodes_the_words_that_it_has() -> None:
    model = WordLevel({"Tom": 0, "7": 1, "<mask>": 2})
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")
    assert plain(tokenizer, "Tom 7") == [0, 1]


EXAMPLES = [{"user": "Tom ?", "assistant": " 7"}, {"user": "Ann ?", "assistant": " 3"}]
TURNS = (
    "{% for message in messages %}"
    "{{ {'system': 'keys', 'user': 'first', 'assistant': 'answer'}[message.role] }} {{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "Eva ?"),
        ({"system": "hats"}, "hats Eva ?"),
        ({"examples": EXAMPLES}, "Tom ? 7 Ann ? 3 Eva ?"),
        ({"examples": EXAMPLES, "system": "hats", "separator": " . "}, "hats . Tom ? 7 . Ann ? 3 . Eva ?"),
        ({"chat": True}, "first Eva ? answer"),
        ({"chat": True, "system": "hats"}, "keys hats first Eva ? answer"),
        (
            {"chat": True, "system": "hats", "examples": EXAMPLES},
            "keys hats first Tom ? answer 7 first Ann ? answer 3 first Eva ? answer",
        ),
        (
            {"chat": True, "examples": EXAMPLES, "examples_as": "text", "separator": " . "},
            "first Tom ? 7 . Ann ? 3 . Eva ? answer",
        ),
    ],
)
def test_system_text_and_examples_come_before_the_problem_as_turns_or_as_text(
    settings: dict, expected: str
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TURNS
    protocol = ProtocolConfig.model_validate(settings)
    assert render(Problem("p", "s", "Eva ?"), protocol, tokenizer) == ids(expected)
    begun = Problem("p", "s", "Eva ?", prefill=" making 9")
    assert render(begun, protocol, tokenizer) == ids(f"{expected} making 9")


def test_many_problems_are_rendered_as_one_alone() -> None:
    problems = [Problem(f"p-{count}", "s", "Tom " * count) for count in range(1, 9)]
    tokenizer = appends_eos("<pad>")
    assert render_all(problems, PLAIN, tokenizer) == [render(each, PLAIN, tokenizer) for each in problems]
    assert render_all([], CHAT, tokenizer) == []


def test_a_response_ends_at_the_first_end_token_or_stop_text() -> None:
    tokenizer = build_tokenizer()
    tokens = ids("Tom has 7 <pad> . first Ann <eos>")
    stops = ("first", ".")
    assert finish(tokens, tokenizer, ids("<eos>")) == "Tom has 7 <pad> . first Ann"
    assert finish(tokens, tokenizer, ids("<eos>"), stops) == "Tom has 7 <pad> "
    assert finish(tokens, tokenizer, ids("<eos> <pad>"), stops) == "Tom has 7"
    assert finish(ids("Tom has"), tokenizer, ids("<eos>"), stops) == "Tom has"
    assert finish([], tokenizer, ids("<eos>"), stops) == ""


def test_an_end_of_turn_before_the_end_of_text_does_not_spoil_the_score() -> None:
    """LLaDA responds `4<|eot_id|><|endoftext|>`; here `<pad>` is the end-of-turn token."""
    problem, protocol = Problem("p", "s", "2 + 2?", reference="4"), ProtocolConfig(scorers=("exact",))
    for tokens in ("4 <pad> <eos>", "4 <eos>", "4 <pad> 7 <eos>"):
        response = finish(ids(tokens), build_tokenizer(), ids("<eos> <pad>"), protocol.stops)
        assert score([problem], [response], protocol) == [Verdict({"exact": True})]


def test_a_run_on_after_a_stop_text_is_not_scored() -> None:
    protocol = ProtocolConfig(scorers=("flexible_extract",), stops=("first",))
    problem = Problem("p", "s", "2 + 2?", reference="#### 4")
    response = finish(ids("answer 4 first Tom has 7"), build_tokenizer(), ids("<eos>"), protocol.stops)
    assert score([problem], [response], protocol) == [Verdict({"flexible_extract": True})]
    bare = finish(ids("answer 4 first Tom has 7"), build_tokenizer(), ids("<eos>"))
    assert score([problem], [bare], protocol) == [Verdict({"flexible_extract": False})]

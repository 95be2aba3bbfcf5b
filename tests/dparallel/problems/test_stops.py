"""Stop texts cut a response where its whole text would be cut, and end decoding as early as that is sure."""

from hypothesis import given
from hypothesis import strategies as st

from dparallel.problems.stops import cut, is_settled, stop_at
from dparallel.tiny.tokenizer import build_tokenizer

texts = st.text("abc", max_size=14)
some_stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def test_a_response_is_cut_before_the_first_stop() -> None:
    assert cut("4 then Question: 5", ["Question:", "then"]) == "4 "
    assert cut("4", ["Question:"]) == "4"
    assert cut("4", []) == "4"


def test_a_longer_stop_that_has_begun_is_waited_for() -> None:
    assert is_settled("xb", ["b"])
    assert not is_settled("ab", ["b", "abc"])
    assert is_settled("abx", ["b", "abc"])
    assert is_settled("abc", ["b", "abc"])
    assert not is_settled("a", ["ab"])


def test_the_first_bytes_of_a_character_may_belong_to_a_longer_stop() -> None:
    assert cut("\u00e9b\u00e9", ["b", "\u00e9b\u00e9"]) == ""
    assert not is_settled("\u00e9b\ufffd", ["b", "\u00e9b\u00e9"])
    assert is_settled("\u00e9bx", ["b", "\u00e9b\u00e9"])
    assert not is_settled("x\ufffd", ["\ufffd"])


@given(texts, texts, some_stops)
def test_what_follows_changes_nothing_once_it_is_settled(text, more, stops):
    if is_settled(text, stops):
        assert cut(text + more, stops) == cut(text, stops)
        assert is_settled(text + more, stops)
    elif cut(text, stops) != text:  # the wait is needed: some continuation moves the cut
        endings = (stop[place:] for stop in stops for place in range(len(stop)))
        assert any(len(cut(text + ending, stops)) < len(cut(text, stops)) for ending in endings)


def test_decoding_ends_with_the_token_that_completes_a_stop() -> None:
    tokenizer = build_tokenizer()
    ids = [tokenizer.get_vocab()[word] for word in ["Tom", "has", "7", "coins", ".", "first", "Ann"]]
    stop = stop_at(tokenizer, [". first"])
    assert stop is not None
    assert [stop(ids[:count]) for count in range(8)] == [None] * 6 + [6, 6]
    assert stop_at(tokenizer, []) is None

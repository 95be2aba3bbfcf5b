"""Values that cross between the candidate and its tests."""

import collections
import enum
import fractions
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dparallel.problems.sandbox.inside.codec import DEPTH, ProtocolError, Reference, decode, encode

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters()),
    st.binary(),
    st.fractions(),
    st.decimals(allow_nan=False),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(LEAVES, inner, max_size=3),
        st.frozensets(LEAVES, max_size=3),
    ),
    max_leaves=6,
)


def no_reference(value: Any) -> Reference:
    raise TypeError(type(value))


def crossed(value: Any) -> Any:
    return decode(encode(value, no_reference), lambda reference: reference)


def types_of(value: Any) -> Any:
    if isinstance(value, dict):
        return dict, [(types_of(key), types_of(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [types_of(inner) for inner in value]
    return type(value)


@given(VALUES)
def test_plain_data_crosses_unchanged(value: Any) -> None:
    assert crossed(value) == value
    assert types_of(crossed(value)) == types_of(value)


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(16**40),
        -0.0,
        math.inf,
        "\ud800",
        {1, 2},
        range(3, 9, 2),
        bytearray(b"a"),
        {"b": 1}.keys(),
        {"b": 1}.items(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_less_common_values_cross(value: Any) -> None:
    assert crossed(value) == value
    assert type(crossed(value)) is type(value)
    assert math.copysign(1, crossed(-0.0)) == -1


def test_not_a_number_stays_unequal_to_itself() -> None:
    assert math.isnan(crossed(math.nan))
    assert crossed([math.nan]) != [math.nan]


class Always(list):
    def __eq__(self, other: object) -> bool:
        return True


class Colour(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Always([1]), [1]),
        (Colour.RED, 3),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.namedtuple("Point", "x y")(1, 2), (1, 2)),
        (type("Text", (str,), {"__eq__": lambda one, other: True})("a"), "a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_instances_of_subclasses_arrive_as_the_plain_type(value: Any, plain: Any) -> None:
    assert crossed(value) == plain
    assert type(crossed(value)) is type(plain)


def test_other_objects_cross_as_references() -> None:
    kept: list[Any] = []

    def keep(value: Any) -> Reference:
        kept.append(value)
        return Reference(len(kept) - 1)

    found = decode(encode([1, object(), len], keep), lambda reference: kept[int(reference.key)])
    assert found == [1, kept[0], len]
    assert (
        decode(encode(print, lambda value: Reference("printer")), lambda reference: reference.key)
        == "printer"
    )


def test_nesting_is_limited_on_both_sides() -> None:
    value: Any = []
    for _ in range(DEPTH):
        value = [value]
    assert crossed(value) == value
    with pytest.raises(ProtocolError, match="deeper than 100"):
        crossed([value])
    with pytest.raises(ProtocolError, match="deeper than 100"):
        decode(b"l1:" * 500 + b"n", lambda reference: reference)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"i3:12",
        b"i1:g",
        b"l9:n",
        b"l-1:",
        b"S1:l0:",
        b"D1:n",
        b"s1:\xff",
        b"nn",
        b"d3:xyz",
        b"r1:n",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, lambda reference: reference)


@given(st.binary(max_size=40))
def test_no_bytes_do_more_than_fail(data: bytes) -> None:
    try:
        value = decode(data, lambda reference: None)
    except ProtocolError:
        return
    assert type(value) in {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        range,
        list,
        tuple,
    } | {
        dict,
        set,
        frozenset,
        fractions.Fraction,
        Decimal,
        type({}.keys()),
        type({}.values()),
        type({}.items()),
    }

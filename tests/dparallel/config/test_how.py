"""Settings are split into those that determine the result and those that do not, at any depth."""

from typing import Annotated

from pydantic import PositiveInt

from dparallel.config.base import HOW, Config


class Inner(Config):
    length: int = 3
    batch_size: Annotated[PositiveInt, HOW] = 4


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()
    named: dict[str, Inner] = {}
    listed: tuple[Inner, ...] = ()
    either: Inner | int = 1
    options: Annotated[dict[str, int], HOW] = {}


def test_what_and_how_at_any_depth() -> None:
    config = Outer(
        named={"x": Inner(batch_size=1)}, listed=(Inner(length=5),), either=Inner(), options={"stage": 2}
    )
    assert config.what() == {
        "name": "a",
        "inner": {"length": 3},
        "named": {"x": {"length": 3}},
        "listed": [{"length": 5}],
        "either": {"length": 3},
    }
    assert config.how() == {
        "inner": {"batch_size": 4},
        "named": {"x": {"batch_size": 1}},
        "listed": {"0": {"batch_size": 4}},
        "either": {"batch_size": 4},
        "options": {"stage": 2},
    }


def test_a_config_without_marked_settings_is_all_what() -> None:
    class Plain(Config):
        numbers: tuple[float, ...] = (0.5, 1)
        maybe: int | None = None

    assert Plain().what() == Plain().model_dump(mode="json")
    assert Plain().how() == {}

"""What each commit rule asks of the settings. `decoding.rules` holds the function of the same name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Rule(NamedTuple):
    """The settings and inputs that a commit rule takes.

    Attributes:
        scheduled: commits on a schedule of `steps` forwards, instead of by a `threshold`.
        whole_response: treats the response as one block, and may commit nothing in a forward.
        threshold_limit: the largest threshold that makes sense; None where any number does.
        needs_previous: compares with the previous forward's predictions.
        defaults: the rule's own settings and their defaults.
    """

    scheduled: bool = False
    whole_response: bool = False
    threshold_limit: float | None = None
    needs_previous: bool = False
    defaults: Mapping[str, float] = MappingProxyType({})

    @property
    def settings(self) -> dict[str, float | None]:
        """The settings that the rule takes, with their defaults; None where the user must choose."""
        return {"steps" if self.scheduled else "threshold": None, **self.defaults}


RULES: dict[str, Rule] = {
    "steps": Rule(scheduled=True),
    "confidence": Rule(threshold_limit=1),
    "entropy": Rule(defaults={"threshold": 0.5}),
    "entropy_budget": Rule(),
    "margin": Rule(threshold_limit=1),
    "stability": Rule(threshold_limit=1, needs_previous=True, defaults={"stability_threshold": 0.01}),
    "dream_entropy": Rule(scheduled=True, whole_response=True),
    "dream_maskgit_plus": Rule(scheduled=True, whole_response=True),
    "dream_topk_margin": Rule(scheduled=True, whole_response=True),
}

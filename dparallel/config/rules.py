"""Settings of each commit rule. `decoding.rules` implements it in the function of the same name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Rule(NamedTuple):
    """Settings and inputs of a commit rule.

    Attributes:
        scheduled: commits on a schedule of `steps` forward passes instead of by a `threshold`.
        whole_response: treats the response as one block, and may commit no token in a forward pass.
        threshold_limit: the largest valid threshold; None if there is no limit.
        needs_previous: compares with the predictions of the previous forward pass.
        defaults: further settings of this rule with their defaults.
    """

    scheduled: bool = False
    whole_response: bool = False
    threshold_limit: float | None = None
    needs_previous: bool = False
    defaults: Mapping[str, float] = MappingProxyType({})

    @property
    def settings(self) -> dict[str, float | None]:
        """All settings of this rule with their defaults; None if the user must give a value."""
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

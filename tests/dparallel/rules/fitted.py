"""Random weights of a commit rule, which make random models choose."""

from itertools import pairwise

import torch

from dparallel.models.commit_rule import CommitRule
from dparallel.rules.declaration import Weights
from dparallel.rules.features import FEATURES


def random_commit_rule(seed: int = 0, hidden: int = 3) -> CommitRule:
    """A rule with a hidden layer, or none; its logits are of either sign on models of `random_model`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(FEATURES), *([hidden] if hidden else []), 1]
    layers = tuple(
        (
            torch.randn(out, width, generator=generator, dtype=torch.float64),
            torch.randn(out, generator=generator, dtype=torch.float64),
        )
        for width, out in pairwise(sizes)
    )
    return CommitRule(Weights(layers))

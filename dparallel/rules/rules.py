"""Commit rules: pure functions from the predictions of a forward pass to the positions it commits.

To add a rule, write a function here and declare its parameters above it with `rule`. Settings, command line,
refusals and the table in docs/method.md follow from the declaration.

Settings and commands read the declarations without torch, so that functions here use methods of tensors, and
the few that need torch itself import it when they are called.
Legend: B rows, n positions read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING

from dparallel.rules.declaration import Choice, Context, Parameter, Prediction, Rule, RuleError
from dparallel.rules.features import features, network

if TYPE_CHECKING:
    from torch import Tensor

RULES: dict[str, Rule] = {}

STEPS = Parameter(meaning="forward passes for the whole response", least=1, whole=True)
PROBABILITY = Parameter(meaning="smallest probability of a token", most=1)


def rule(
    published: str = "",
    whole_response: bool = False,
    needs_previous: bool = False,
    needs_weights: bool = False,
    **parameters: Parameter,
) -> Callable[[Callable[..., Choice]], Callable[..., Choice]]:
    """Declare the function below it as the rule of its name; `Rule` explains the arguments.

    The first line of the function's docstring says what it commits, for the table in docs/method.md.
    """

    def declare(choose: Callable[..., Choice]) -> Callable[..., Choice]:
        _check(choose, parameters)
        needs = needs_previous, needs_weights
        RULES[choose.__name__] = Rule(choose, published, parameters, whole_response, *needs)
        return choose

    return declare


def _check(choose: Callable[..., Choice], parameters: Mapping[str, Parameter]) -> None:
    """Check a declaration; a script may declare its own rule again, as interactive sessions do."""
    name, file = choose.__name__, choose.__code__.co_filename
    if name in RULES and (__file__ in (file, RULES[name].choose.__code__.co_filename)):
        raise RuleError(f"rule {name!r} exists: choose another name for the function in {file}")
    taken = {key for key, of in signature(choose).parameters.items() if of.kind is of.KEYWORD_ONLY}
    if taken != set(parameters):
        raise RuleError(
            f"rule {name!r} declares {', '.join(sorted(parameters)) or 'no parameters'}, and its function "
            f"takes {', '.join(sorted(taken)) or 'none'} as keywords: make them the same"
        )


@rule(published="LLaDA", steps=STEPS)
def steps(prediction: Prediction, masked: Tensor, context: Context, *, steps: int) -> Choice:
    """The n most confident tokens, with n such that a block takes `steps` / blocks forward passes."""
    assert context.block_forwards is not None
    quota, extra = divmod(context.block_length, steps // context.blocks)
    count = quota + (context.block_forwards < extra).long()  # (B,)
    return Choice(-prediction.doubt, _rank(-prediction.doubt, masked) < count[:, None])


@rule(published="Fast-dLLM", threshold=PROBABILITY)
def confidence(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """Tokens with probability >= `threshold`."""
    return Choice(-prediction.doubt, prediction.doubt <= complement(threshold))


@rule(published="dParallel", threshold=Parameter(meaning="largest entropy of a token, in nats", default=0.5))
def entropy(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """Tokens with entropy <= `threshold`, in nats over the full vocabulary."""
    return Choice(-prediction.entropy, prediction.entropy <= threshold)


@rule(
    published="ours",
    threshold=Parameter(meaning="largest sum of all committed entropies, in nats"),
)
def entropy_budget(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """The tokens of lowest entropy, as many as keep the sum of all their entropies <= `threshold` nats.

    Stricter than `entropy_bound`, which leaves the largest entropy out: thresholds of the two do not compare.
    """
    ordered, rank = _ascending(prediction.entropy, masked)
    return Choice(-prediction.entropy, (ordered.cumsum(1) <= threshold).gather(1, rank))


@rule(
    published="EB-Sampler (Ben-Hamu et al. 2025)",
    threshold=Parameter(meaning="largest sum of all committed entropies but one, in nats"),
)
def entropy_bound(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """The tokens of lowest entropy, as many as keep the sum of all but their largest <= `threshold` nats.

    That sum bounds the error of drawing the tokens independently of each other (arXiv 2505.24857). Its
    tokens could be ordered by other scores as well; here they are ordered by entropy.
    """
    ordered, rank = _ascending(prediction.entropy, masked)
    smaller = ordered.cumsum(1).roll(1, dims=1)  # a difference of sums would lose small terms
    smaller[:, 0] = 0
    return Choice(-prediction.entropy, (smaller <= threshold).gather(1, rank))


@rule(
    published="Fast-dLLM++ (arXiv 2606.02955)",
    threshold=Parameter(meaning="smallest joint probability, by a bound", default=0.25, most=1),
)
def frechet(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """The n most confident tokens, the largest n with d_1 + … + d_n + d_n < 1 - `threshold`, d = 1 - p.

    By Fréchet's inequality the joint probability of n tokens is at least 1 - (d_1 + … + d_n), whatever their
    dependence; the largest doubt counts twice.
    """
    ordered, rank = _ascending(prediction.doubt, masked)
    return Choice(-prediction.doubt, (ordered.cumsum(1) + ordered < 1 - threshold).gather(1, rank))


@rule(
    published="Fast-dLLM",
    threshold=Parameter(meaning="largest product of the largest doubt and n + 1", default=1.0),
)
def factor(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """The n most confident tokens, the largest n with (n + 1) · d_n < `threshold`, d = 1 - p.

    As in the paper's theorem; the published loop also commits the last masked token of a block together with
    the others where only that one exceeds the limit.
    """
    ordered, rank = _ascending(prediction.doubt, masked)
    successors = ordered.new_ones(ordered.shape).cumsum(1) + 1  # n + 1
    return Choice(-prediction.doubt, (successors * ordered < threshold).gather(1, rank))


@rule(
    published="DMax (arXiv 2604.08302)",
    threshold=Parameter(meaning="smallest probability of a token in the run", default=0.5, most=1),
)
def contiguous(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """The run of masked tokens from the left, up to the first with probability < `threshold`.

    The best one, which is always committed, is the leftmost.
    """
    stops = masked & ~(prediction.doubt <= complement(threshold))
    run = stops.long().cumsum(1) == 0
    return Choice(-prediction.doubt.new_ones(run.shape).cumsum(1), run)


@rule(threshold=Parameter(meaning="smallest lead in probability", most=1))
def margin(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """Tokens whose probability exceeds that of the second most likely token by >= `threshold`."""
    doubt = prediction.doubt + runner_up(prediction.log_probability, context.mask_token_id)  # 1 - lead
    return Choice(-doubt, doubt <= complement(threshold))


@rule(
    published="KLASS",
    needs_previous=True,
    threshold=PROBABILITY,
    # Smaller differences are not resolved in float32.
    stability_threshold=Parameter(
        meaning="largest change since the last pass, in nats", default=0.01, least=1e-4
    ),
)
def stability(
    prediction: Prediction,
    masked: Tensor,
    context: Context,
    *,
    threshold: float,
    stability_threshold: float,
) -> Choice:
    """Tokens with probability >= `threshold` whose distribution changed by <= `stability_threshold` nats.

    The change is the KL divergence from the previous forward pass.
    """
    assert context.previous is not None
    assert context.seen is not None
    now, before = prediction.log_probability, context.previous
    moved = (now.exp() * (now.clamp(min=-1e4) - before.clamp(min=-1e4))).sum(-1)  # KL(now || before)
    stable = context.seen & (moved <= stability_threshold)
    return Choice(-prediction.doubt, stable & (prediction.doubt <= complement(threshold)))


@rule(
    published="ours",
    needs_weights=True,
    threshold=Parameter(
        meaning="smallest probability, by the model's own commit rule, of being final", most=1
    ),
)
def learned(prediction: Prediction, masked: Tensor, context: Context, *, threshold: float) -> Choice:
    """Tokens that a network fitted for the model takes for final with a probability >= `threshold`.

    The network reads how sure the prediction is, where its position is in the block, and how much of the
    block is committed (`rules.features`). `dparallel fit-rule` fits it on recorded trajectories.
    """
    assert context.weights is not None
    second = runner_up(prediction.log_probability, context.mask_token_id)
    score = network(context.weights, features(prediction, second, masked, context))
    return Choice(score, score.sigmoid() >= threshold)


@rule(published="Dream", whole_response=True, steps=STEPS)
def dream_entropy(prediction: Prediction, masked: Tensor, context: Context, *, steps: int) -> Choice:
    """A share of the masks, lowest entropy first, after temperature, top_p and top_k."""
    entropy, _ = certainty(prediction.token, prediction.drawn_from)
    return _dream(-entropy, masked, context, steps)


@rule(published="Dream", whole_response=True, steps=STEPS)
def dream_maskgit_plus(prediction: Prediction, masked: Tensor, context: Context, *, steps: int) -> Choice:
    """A share of the masks, highest probability first, after temperature, top_p and top_k."""
    _, doubt = certainty(prediction.token, prediction.drawn_from)
    return _dream(-doubt, masked, context, steps)


@rule(published="Dream", whole_response=True, steps=STEPS)
def dream_topk_margin(prediction: Prediction, masked: Tensor, context: Context, *, steps: int) -> Choice:
    """A share of the masks, largest lead over the second token first, after temperature, top_p and top_k."""
    likeliest = without(prediction.drawn_from, context.mask_token_id).argmax(-1)
    _, doubt = certainty(likeliest, prediction.drawn_from)
    score = -doubt - runner_up(prediction.drawn_from, context.mask_token_id)
    return _dream(score, masked, context, steps)


def _dream(score: Tensor, masked: Tensor, context: Context, steps: int) -> Choice:
    """Dream's schedule: time runs from 1 to 0.001; a step unmasks a share of the masks, the last one all."""
    import torch

    assert context.block_forwards is not None
    time = torch.linspace(1, 1e-3, steps + 1, device=score.device)
    share = 1 - time[1:] / time[:-1]
    last = context.block_forwards >= steps - 1
    step = context.block_forwards.clamp(max=steps - 1)
    count = torch.where(last, masked.sum(1), (masked.sum(1) * share[step]).long())  # (B,)
    return Choice(score, _rank(score, masked) < count[:, None])


def certainty(token: Tensor, log_probability: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy, and the probability of all tokens other than `token` (B, n), to relative float32 precision.

    The entropy term of a nearly certain token is computed from the other tokens: 1 - p would round to 0 for
    all of them, and they could not be ranked.
    """
    rivals = log_probability.exp().scatter(-1, token[..., None], 0.0)
    doubt = rivals.sum(-1)
    own = log_probability.gather(-1, token[..., None])[..., 0]
    own = (-doubt).log1p().where(doubt < 0.5, own.clamp(min=-1e4))
    # Clamp the logarithm of 0, since 0 ln 0 = 0; NaN remains NaN.
    return -(rivals * log_probability.clamp(min=-1e4)).sum(-1) - own.exp() * own, doubt


def without(values: Tensor, token_id: int) -> Tensor:
    """`values` (..., V) with one token excluded."""
    import torch

    tokens = torch.arange(values.shape[-1], device=values.device)
    return values.masked_fill(tokens == token_id, -torch.inf)


def complement(threshold: float) -> float:
    """The `doubt` at a probability of `threshold`; at 1, the rounding error of double precision."""
    return max(1 - threshold, 2.0**-53)


def runner_up(log_probability: Tensor, mask_token_id: int) -> Tensor:
    """Probability of the second most likely token, excluding the mask token, (B, n)."""
    return without(log_probability, mask_token_id).topk(2).values[..., 1].exp()


def _rank(score: Tensor, masked: Tensor) -> Tensor:
    """Rank of each position among the masked ones, the highest score first, (B, n)."""
    order = score.masked_fill(~masked, -float("inf")).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _ascending(values: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """`values` (B, n) from the smallest masked one up, then infinity; and the rank of each position."""
    ordered, order = values.masked_fill(~masked, float("inf")).sort(dim=1, stable=True)
    return ordered, order.argsort(dim=1)

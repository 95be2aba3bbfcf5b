"""The part of a denoise step that runs on the device: a forward pass, its predictions, and the rule's choice.

Legend: b rows, m positions of the input, n positions read, L canvas length, G `gen_length`, V vocabulary.
"""

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.cache import CacheView, KeyValueStore
from dparallel.decoding.predictions import choose, predict
from dparallel.decoding.revision import soft_inputs
from dparallel.decoding.sampling import uniform
from dparallel.models.backbone import DiffusionTransformer
from dparallel.rules.declaration import Context, Weights
from dparallel.rules.rules import RULES, complement, without

Array = TypeVar("Array")  # arrays on the host, tensors on the device


class Shape(NamedTuple):
    """What of a step is fixed when it is compiled, besides the sizes of its inputs.

    Attributes:
        length: L, canvas positions attended to.
        all_slots: whether the rows have the first b slots, in order.
    """

    length: int
    all_slots: bool


class Inputs(NamedTuple, Generic[Array]):
    """What a forward pass is computed from.

    Attributes:
        tokens: (b, m) the canvas, or the positions that are computed again.
        reads: (b, n) indices in `tokens` of the positions read; None if these are all of them.
        masked: (b, n) bool, which of the positions read may be committed; the others may only fill up.
        offsets: (b, n) the positions read, as positions of the response.
        slots: (b,) slots of the rows in the workspace.
        block_forwards: (b,) forward passes since the last block was opened.
        positions: (b, m) canvas positions of `tokens`; None for the first L.
        visible: (b, L) bool, the positions attended to; None for all.
        levels: (b, L) the attention pattern of block-causal and causal models, if `visible` does not say it.
        seed, draw, where: (b,), (b,), (b, n): what random numbers depend on; None without a temperature.
        seen: (b, n) bool, whether there is a previous prediction; None if the rule needs none.
        held, committed: (b, n), and bool: the tokens at the positions read and whether they are committed;
            None if none is revised.
    """

    tokens: Array
    reads: Array | None
    masked: Array
    offsets: Array
    slots: Array
    block_forwards: Array
    positions: Array | None = None
    visible: Array | None = None
    levels: Array | None = None
    seed: Array | None = None
    draw: Array | None = None
    where: Array | None = None
    seen: Array | None = None
    held: Array | None = None
    committed: Array | None = None


class Outcome(NamedTuple, Generic[Array]):
    """Result of a step for the positions read; all (b, n)."""

    token: Array
    probability: Array
    entropy: Array
    score: Array  # of the rule
    chosen: Array  # bool, what the rule selects
    sure: Array | None  # bool, by `final_threshold`; None if none is revised


@dataclass(frozen=True)
class Workspace:
    """What the device keeps of rows between forward passes, by slot, and the weights of their rule.

    Each is None if not needed.
    """

    store: KeyValueStore | None
    previous: Tensor | None  # (slots, G, V) log-probabilities
    sureness: Tensor | None = None  # (slots, G) probability of each token when it was last read
    weights: Weights | None = None

    @classmethod
    def allocate(
        cls, model: DiffusionTransformer, decoding: DecodingConfig, slots: int, length: int
    ) -> "Workspace":
        """Memory for `slots` rows of canvases with `length` positions."""
        config, device = model.config, model.device
        store = previous = weights = sureness = None
        if decoding.cache != "none":
            store = KeyValueStore(config, slots, length, device, model.dtype)
        if RULES[decoding.rule].needs_previous:
            previous = torch.zeros(slots, decoding.gen_length, config.vocab_size, device=device)
        if RULES[decoding.rule].needs_weights:
            weights = model.commit_rule.on(device)
        if decoding.revises:
            sureness = torch.zeros(slots, decoding.gen_length, device=device)
        return cls(store, previous, sureness, weights)

    @property
    def bytes(self) -> int:
        """Size of its tensors, without the weights of the rule."""
        stored = [] if self.store is None else [*self.store.keys, *self.store.values]
        return sum(each.nbytes for each in (*stored, self.previous, self.sureness) if each is not None)


def denoise(
    model: DiffusionTransformer,
    workspace: Workspace,
    decoding: DecodingConfig,
    shape: Shape,
    inputs: Inputs[Tensor],
) -> Outcome[Tensor]:
    """A forward pass of b rows, which also updates `workspace`."""
    logits = _forward(model, workspace, shape, inputs)  # (b, n, V)
    if decoding.suppress_eos:
        logits = without(logits, model.config.eos_token_id)
    numbers = None
    if inputs.seed is not None:
        assert inputs.draw is not None
        assert inputs.where is not None
        numbers = uniform(inputs.seed, inputs.draw, inputs.where, logits.shape[-1])
    told = decoding.temperature, decoding.top_p, numbers, decoding.top_k
    prediction = predict(logits, model.config.mask_token_id, *told)
    context = _context(model, workspace, decoding, inputs)
    score, chosen = choose(decoding.rule, decoding.parameters, prediction, inputs.masked, context)
    sure = None
    if workspace.previous is not None:
        workspace.previous[inputs.slots[:, None], inputs.offsets] = prediction.log_probability
    if workspace.sureness is not None:
        workspace.sureness[inputs.slots[:, None], inputs.offsets] = prediction.probability
        assert decoding.final_threshold is not None
        sure = prediction.doubt <= complement(decoding.final_threshold)
    return Outcome(prediction.token, prediction.probability, prediction.entropy, score, chosen, sure)


def _forward(
    model: DiffusionTransformer, workspace: Workspace, shape: Shape, inputs: Inputs[Tensor]
) -> Tensor:
    """Logits (b, n, V) at the positions read."""
    cache = soft = None
    if workspace.store is not None:
        cache = CacheView(workspace.store, inputs.slots, inputs.positions, shape.length, shape.all_slots)
    if workspace.sureness is not None:
        where, held, committed = inputs.where, inputs.held, inputs.committed
        assert where is not None  # (b, n) of the active block, from its first position on
        assert held is not None
        assert committed is not None
        every = inputs.positions
        if every is None:
            every = torch.arange(shape.length, device=where.device)
        soft = soft_inputs(
            model.get_input_embeddings(),
            model.config.mask_token_id,
            inputs.tokens,
            places=every - where[:, :1],
            tokens=held,
            committed=committed,
            probability=workspace.sureness[inputs.slots[:, None], inputs.offsets],
        )
    return model(inputs.tokens, inputs.visible, inputs.reads, inputs.positions, cache, inputs.levels, soft)


def _context(
    model: DiffusionTransformer, workspace: Workspace, decoding: DecodingConfig, inputs: Inputs[Tensor]
) -> Context:
    """What the rule may read."""
    previous = None
    if workspace.previous is not None:
        previous = workspace.previous[inputs.slots[:, None], inputs.offsets]
    return Context(
        blocks=decoding.blocks,
        block_length=decoding.block_length,
        mask_token_id=model.config.mask_token_id,
        block_forwards=inputs.block_forwards,
        previous=previous,
        seen=inputs.seen,
        offsets=inputs.offsets,
        weights=workspace.weights,
    )

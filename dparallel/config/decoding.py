"""Settings of decoding.

`rules.rules.RULES` declares the parameters of each rule, `config.modes` the modes and their settings.
Settings, defaults and error messages are derived from these declarations.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveInt, create_model, field_validator, model_validator

from dparallel.config.base import Config, nearest
from dparallel.config.foreign import FOREIGN_RULES, FOREIGN_SETTINGS
from dparallel.config.modes import GEN_LENGTH, MODES, SETTINGS
from dparallel.rules.declaration import Parameter
from dparallel.rules.rules import RULES

MIN_TEMPERATURE = 1e-6  # resolution of float32 log-probabilities; much smaller values overflow 1 / T
MAX_TEMPERATURE = 1e6  # all tokens are equally likely well before; larger values overflow in float32
MIN_TOP_P = 1e-6  # smaller values underflow in float32; the most likely token alone is left long before


class _Blocks(Config):
    """The blocks of a response, and the rule that fills them."""

    gen_length: PositiveInt = 256
    block_length: PositiveInt = 32
    rule: str = "entropy"

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule in FOREIGN_RULES:
            raise ValueError(f"unknown rule={rule!r}: {FOREIGN_RULES[rule]}")
        if rule not in RULES:
            hint = nearest(rule, list(RULES))
            raise ValueError(f"unknown rule={rule!r}; {hint}known rules: {', '.join(RULES)}")
        if unknown := set(RULES[rule].parameters) - set(cls.model_fields):
            raise ValueError(
                f"rule={rule!r} takes {sorted(unknown)[0]!r}, which is no setting: declare the rule in "
                f"dparallel/rules/rules.py, or give its parameters names of {', '.join(parameters_by_name())}"
            )
        return rule


def parameters_by_name() -> dict[str, dict[str, Parameter]]:
    """The parameters that rules share a setting for: by name, then by rule."""
    names = dict.fromkeys(name for rule in RULES.values() for name in rule.parameters)
    return {
        name: {key: rule.parameters[name] for key, rule in RULES.items() if name in rule.parameters}
        for name in names
    }


if TYPE_CHECKING:

    class _Numbers(_Blocks):
        threshold: float | None = None
        stability_threshold: float | None = None
        steps: int | None = None
        block_add_threshold: float | None = None
        decoded_token_threshold: float | None = None
        final_threshold: float | None = None
        revision_passes: int | None = None
        settle_rounds: int | None = None
        refresh_every: int | None = None

else:  # a field for each parameter of a rule, with the widest limits, and for each setting of a mode

    def _field(takers):  # `_wrong_numbers` compares with the limits of the rule
        kind = int if all(parameter.whole for parameter in takers) else float
        return kind | None, Field(None, ge=min(parameter.least for parameter in takers))

    _Numbers = create_model(
        "_Numbers",
        __base__=_Blocks,
        __module__=__name__,
        **{name: _field(takers.values()) for name, takers in parameters_by_name().items()},
        **{
            name: ((int if setting.whole else float) | None, Field(None, **setting.limits))
            for name, setting in SETTINGS.items()
        },
    )


def _is_off(value: Any) -> bool:
    """Whether a setting has no effect. It is left out of dumps: keys of results are those without it."""
    return value is None or value is False


class DecodingConfig(_Numbers):
    """How a response is decoded: the order of blocks, the tokens committed per forward pass, the KV cache.

    Args:
        gen_length: response length in tokens, a multiple of `block_length`.
        block_length: tokens per block.
        rule: selects the masked tokens to commit after a forward pass; the best one is always committed.
            `python -m pydoc dparallel.rules.rules` says what each rule commits, and docs/method.md with which
            modes and caches it goes.
        threshold: of the rule: its smallest probability, its largest entropy in nats, or what the rule
            declares; only some rules have a default.
        stability_threshold: of the rule `stability`, in nats.
        steps: forward passes of the rule `steps` and of Dream's samplers, which treat the response as one
            block.
        mode: when a block becomes active.
            `sequential`: when the previous block is complete.
            `multi_block` (d3LLM): when a fraction `block_add_threshold` (default 0.1) of the previous
            block is committed. The first incomplete block commits a token in every forward pass.
            d3LLM's `decoded_token_threshold`, from which the next block must commit a token as well, is
            accepted but has no effect: all blocks before the first incomplete one are complete.
            `revising` (DMax): as `sequential`, but tokens of the active block are predicted again until they
            are final, and count as input only as far as the model is sure of them; for models trained to
            correct themselves. The rule is `contiguous` by default.
            `pipelined` (D2F): for block-causal models, in which no position attends to a later block.
            As in `multi_block`, but no block is added after an end-of-sequence token. A forward pass
            commits the tokens that the rule selects, and the best token of each block whose previous
            block is committed to a fraction `decoded_token_threshold` (default 0.95).
            `autoregressive`: for causal models; one token per forward pass, left to right.
        cache: which keys and values are kept between forward passes. `prefix` and `dual` are
            approximations for bidirectional models: the whole sequence is computed at the start of a
            block, then `prefix` recomputes everything from the active block on, `dual` only the active
            block. In `multi_block`, the whole sequence is recomputed every `refresh_every` forward
            passes (default 8) and a complete block for `settle_rounds` further passes (default 1).
            `exact`, the default of `pipelined` and `autoregressive`: keeps the keys and values that
            later tokens cannot change.
        block_add_threshold, decoded_token_threshold: fractions of a block; see `mode`.
        final_threshold, revision_passes: of `revising`. A block without masks is final when all its tokens
            have at least the probability `final_threshold` (default 0.9), when a forward pass changes none of
            them, or after `revision_passes` (default 8) further forward passes.
        settle_rounds, refresh_every: forward passes of the caches in `multi_block`; see `cache`.
        stop_at_eos: stop when an end-of-sequence token and all tokens before it are committed; always on
            in `autoregressive`.
        eos_fill: of `sequential` and `multi_block`, with `stop_at_eos`. `immediate` (d3LLM's early stop): as
            soon as an end-of-sequence token is committed, every position behind it becomes that token, while
            positions before it may still be masked. By default these positions stay as they are until the
            end, and may take forward passes.
        suppress_eos: never predict the end-of-sequence token (LLaDA's `logits_eos_inf`); a response may still
            end with an end-of-turn token.
        temperature: sampling temperature; 0 takes the most likely token.
        top_p: sample from the most likely tokens with this total probability.
        top_k: sample from this number of most likely tokens. With `top_p` as well, tokens have to be in both
            sets, and both are of the distribution after `temperature`.
        seed: of sampling. Equal seed and prompt give equal tokens, independent of the rest of the batch.
        compile: use compiled kernels with fixed shapes; on a GPU, CUDA graphs.
    """

    foreign: ClassVar[Mapping[str, str]] = FOREIGN_SETTINGS

    mode: Literal["sequential", "multi_block", "revising", "pipelined", "autoregressive"] = "sequential"
    cache: Literal["none", "prefix", "dual", "exact"] = "none"
    stop_at_eos: bool = True
    eos_fill: Literal["immediate"] | None = Field(None, exclude_if=_is_off)
    suppress_eos: bool = Field(False, exclude_if=_is_off)
    temperature: NonNegativeFloat = 0.0
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: PositiveInt | None = Field(None, exclude_if=_is_off)
    seed: int | None = Field(None, ge=0, lt=2**63)
    compile: bool = False

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the rule by name, as its function takes them."""
        values = {name: getattr(self, name) for name in RULES[self.rule].parameters}
        whole = RULES[self.rule].whole
        return {name: int(value) if name in whole else value for name, value in values.items()}

    @property
    def looks_back(self) -> bool:
        """Whether every position attends to its own and earlier blocks only."""
        return self.mode in ("pipelined", "autoregressive")

    @property
    def most_forwards(self) -> int:
        """Forward passes of a response at most; every one commits a token or revises a complete block."""
        return self.steps or self.gen_length + self.blocks * (self.revision_passes or 0)

    @property
    def revises(self) -> bool:
        """Whether committed tokens of the active block may change."""
        return self.mode == "revising"

    def stated(self) -> dict[str, Any]:
        """The settings that were given, as JSON values, without those that follow from others."""
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if name in self.model_fields_set and value is not None
        }

    def portable(self) -> dict[str, Any]:
        """The settings that describe this decoding on any machine and for any draw, as JSON values.

        Left out are the seed, compilation, and settings that follow from others.
        """
        out = {"seed", "compile", *self._fixed()}
        if self.temperature == 0:
            out.add("temperature")
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if value is not None and name not in out
        }

    @model_validator(mode="after")
    def _complete_and_consistent(self) -> "DecodingConfig":
        mode = MODES[self.mode]
        self._fill_in({"cache": mode.caches[0], **mode.usual, **mode.fixed})
        self._fill_in({**self._own_settings(), **self._fixed()})
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Set the settings that the user omitted; called during construction, before the object is frozen."""
        for field, default in defaults.items():
            if field not in self.model_fields_set or getattr(self, field) is None:
                self.__dict__[field] = self._value(default)

    def _value(self, entry: Any) -> Any:
        return self.gen_length if entry == GEN_LENGTH else entry

    def _fixed(self) -> dict[str, Any]:
        """Settings for which the chosen rule and mode allow one value only."""
        whole = {"block_length": GEN_LENGTH} if RULES[self.rule].whole_response else {}
        return {**MODES[self.mode].fixed, **whole}

    def _own_settings(self) -> dict[str, Any]:
        """Settings that exist only for the chosen rule, mode and cache, with their defaults."""
        mode = MODES[self.mode]
        return {**RULES[self.rule].settings, **mode.defaults, **(mode.cached if self.cache != "none" else {})}

    def _problems(self) -> Iterator[str]:
        yield from self._wrong_choices()
        yield from self._without_effect()
        yield from self._wrong_numbers()

    def _wrong_choices(self) -> Iterator[str]:
        """Combinations of values that exclude each other."""
        mode = MODES[self.mode]
        for field, entry in self._fixed().items():
            if getattr(self, field) != self._value(entry):
                kind = "mode" if field in mode.fixed else "rule"
                valid = f"gen_length={self.gen_length}" if entry == GEN_LENGTH else repr(entry)
                yield (
                    f"{field}={getattr(self, field)!r} with {kind}={getattr(self, kind)!r}: there it always "
                    f"is {valid}; drop it or use another {kind}"
                )
        if self.cache not in mode.caches:
            yield f"cache={self.cache!r} with mode={self.mode!r}: give {_any_of(mode.caches)}"
        if RULES[self.rule].scheduled and not mode.scheduled:
            yield (
                f"rule={self.rule!r} with mode={self.mode!r}: its schedule is per block; use "
                "mode='sequential' or a rule with a threshold"
            )

    def _without_effect(self) -> Iterator[str]:
        """Settings that belong to another rule, mode or cache."""
        rule, mode, cache = f"rule={self.rule!r}", f"mode={self.mode!r}", f"cache={self.cache!r}"
        for chosen, needed, takers in (
            (rule, "rule={}", {name: rule.settings for name, rule in RULES.items()}),
            (mode, "mode={}", {name: mode.defaults for name, mode in MODES.items()}),
            (f"{mode}, {cache}", "mode={} with a cache", {name: mode.cached for name, mode in MODES.items()}),
        ):
            for field in {field: None for settings in takers.values() for field in settings}:
                value = getattr(self, field)
                if value is not None and field not in self._own_settings():
                    valid = needed.format(_any_of(name for name in takers if field in takers[name]))
                    yield f"{field}={value} has no effect with {chosen}: drop it or use {valid}"
        if self.eos_fill is not None and not self.stop_at_eos:
            yield f"eos_fill={self.eos_fill} has no effect with stop_at_eos=False: drop one of them"
        for field in ("top_p", "top_k"):
            if getattr(self, field) is not None and self.temperature == 0:
                yield (
                    f"{field}={getattr(self, field)} has no effect at temperature=0.0: raise temperature or "
                    f"drop {field}"
                )

    def _fitting_blocks(self) -> list[int]:
        """Up to two divisors of `gen_length`, the nearest below `block_length`; never blocks of one token."""
        most = min(self.block_length, self.gen_length)
        fitting = [size for size in range(2, most + 1) if self.gen_length % size == 0]
        return fitting[-2:] or [self.gen_length]

    def _wrong_numbers(self) -> Iterator[str]:
        rule = RULES[self.rule]
        if self.gen_length % self.block_length:
            nearest_length = max(1, round(self.gen_length / self.block_length)) * self.block_length
            yield (
                f"gen_length={self.gen_length} is not divisible by block_length={self.block_length}; "
                f"the nearest valid gen_length is {nearest_length}; or give a block_length that divides it, "
                f"such as {' or '.join(map(str, self._fitting_blocks()))}"
            )
        for field, parameter in rule.parameters.items():
            value = getattr(self, field)
            if value is None:
                limits = f"at most gen_length={self.gen_length}" if field == "steps" else parameter.limits
                yield f"rule={self.rule!r} with {field}=None: give {field} ({limits})"
            elif value < parameter.least or (parameter.most is not None and value > parameter.most):
                yield (
                    f"{field}={value} for rule={self.rule!r}, where it is the {parameter.meaning}: give "
                    f"{parameter.limits}"
                )
            elif parameter.whole and not float(value).is_integer():
                yield (
                    f"{field}={value} for rule={self.rule!r}, where it is the {parameter.meaning}: give a "
                    f"whole number, {parameter.limits}"
                )
        if self.steps is not None and (self.steps > self.gen_length or self.steps % self.blocks):
            yield (
                f"steps={self.steps} must be a multiple of the {self.blocks} blocks "
                f"(gen_length / block_length) and at most gen_length={self.gen_length}"
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            yield (
                f"temperature={self.temperature} is too small to draw tokens in float32: give at least "
                f"{MIN_TEMPERATURE}, or 0 to take the most likely ones"
            )
        if self.temperature > MAX_TEMPERATURE:
            yield (
                f"temperature={self.temperature} is too large to draw tokens in float32: give at most "
                f"{MAX_TEMPERATURE:g}, at which all tokens are equally likely"
            )
        if self.top_p is not None and self.top_p < MIN_TOP_P:
            yield (
                f"top_p={self.top_p} is too small to draw tokens in float32: give at least {MIN_TOP_P}, or "
                "temperature=0 to take the most likely ones"
            )


def _any_of(names: Iterable[str]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


def beside(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of decoding in `settings` that `changes`, which count first, leave as they are.

    Settings that belong to a rule, mode or cache that `changes` replace are left out, and so are settings
    that follow from others. What belongs to a replaced rule or mode that this version does not know is
    unknown as well, and is left out.
    """
    fields = DecodingConfig.model_fields
    usual = _usual(settings.get("mode"))
    named = {
        name: settings.get(name) or usual.get(name) or fields[name].default
        for name in ("rule", "mode", "cache")
    }
    replaced = {name for name in named if changes.get(name, named[name]) != named[name]}
    mode, rule = _entry(MODES, named["mode"]), _entry(RULES, named["rule"])
    next_mode = _entry(MODES, changes.get("mode")) or mode
    next_rule = _entry(RULES, changes.get("rule")) or rule
    out = set(changes)
    for chosen in filter(None, (mode, next_mode)):
        out |= {*chosen.fixed}
    if any(chosen.whole_response for chosen in (rule, next_rule) if chosen is not None):
        out.add("block_length")
    if "rule" in replaced or (next_mode is not None and "rule" in next_mode.fixed):
        out |= {*(parameters_by_name() if rule is None else rule.parameters)}
    if "mode" in replaced and mode is not None:
        out |= {*mode.defaults, *mode.cached, "cache"}
    if "mode" in replaced and "rule" in {*usual, *_usual(changes.get("mode"))} - set(changes):
        out |= {"rule", *(parameters_by_name() if rule is None else rule.parameters)}
    if "cache" in replaced and mode is not None:
        out |= {*mode.cached}
    if ("rule" in replaced and rule is None) or ("mode" in replaced and mode is None):
        out |= settings.keys() - fields.keys()
    return {name: value for name, value in settings.items() if name not in out}


def _usual(mode: Any) -> Mapping[str, Any]:
    """The defaults of a mode that differ from those of other modes."""
    known = _entry(MODES, mode)
    return {} if known is None else known.usual


def combined(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of several layers, of which earlier ones count first; see `beside`."""
    settings: dict[str, Any] = {}
    for layer in layers:
        settings = {**beside(layer, settings), **settings} if settings else dict(layer)
    return settings


Entry = TypeVar("Entry")


def _entry(table: Mapping[str, Entry], name: Any) -> Entry | None:
    return table.get(name) if isinstance(name, str) else None

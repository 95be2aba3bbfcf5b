"""Invalid decoding settings are rejected with the field, its value and the remedy."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

import dparallel.config.decoding
from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.foreign import FOREIGN_RULES, FOREIGN_SETTINGS
from dparallel.rules.declaration import Parameter
from dparallel.rules.rules import RULES, rule
from dparallel.serving.bodies import ChatBody

MULTI_BLOCK = {"mode": "multi_block"}
REVISING = {"mode": "revising"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 100}, r"gen_length=100 is not divisible by block_length=32; .* nearest .* is 96"),
        ({"gen_length": 8}, r"gen_length=8 is not divisible by block_length=32; .* nearest .* is 32"),
        (
            {"rule": "fastest"},
            r"^rule: unknown rule='fastest'; .*known rules: steps, confidence, .*margin, stability",
        ),
        ({"rule": "entrpy"}, r"^rule: unknown rule='entrpy'; did you mean 'entropy'\? known rules: "),
        ({"rule": "steps"}, r"rule='steps' with steps=None: give steps \(at most gen_length=256\)"),
        (
            {"rule": "steps", "steps": 256, "threshold": 0.5},
            r"threshold=0\.5 has no effect with rule='steps': drop it or use rule='confidence', 'entropy', ",
        ),
        ({"rule": "steps", "steps": 300}, r"steps=300 must be a multiple of the 8 blocks"),
        ({"rule": "steps", "steps": 264}, r"steps=264 .* at most gen_length=256"),
        (
            {"rule": "entropy", "steps": 8},
            r"steps=8 has no effect with rule='entropy': drop it or use rule='steps', 'dream_entropy', ",
        ),
        ({"rule": "confidence"}, r"rule='confidence' with threshold=None: give threshold"),
        ({"rule": "entropy_budget"}, r"rule='entropy_budget' with threshold=None: give threshold"),
        (
            {"rule": "entropy_bound"},
            r"rule='entropy_bound' with threshold=None: give threshold \(at least 0\)",
        ),
        (
            {"rule": "frechet", "threshold": 1.5},
            r"threshold=1\.5 for rule='frechet', where it is the smallest joint prob.*: give 0 to 1",
        ),
        ({"rule": "frechett"}, r"^rule: unknown rule='frechett'; did you mean 'frechet'\? known rules: "),
        ({"rule": "entropy_bond"}, r"^rule: unknown rule='entropy_bond'; did you mean 'entropy_bound'\?"),
        (
            {"rule": "factor", "steps": 8},
            r"steps=8 has no effect with rule='factor': drop it or use rule='ste",
        ),
        ({"rule": "margin"}, r"rule='margin' with threshold=None: give threshold"),
        ({"rule": "stability"}, r"rule='stability' with threshold=None: give threshold"),
        (
            {"rule": "confidence", "threshold": 1.5},
            r"threshold=1\.5 for rule='confidence', where it is the smallest probability .*: give 0 to 1",
        ),
        (
            {"rule": "margin", "threshold": 1.5},
            r"threshold=1\.5 for rule='margin', where it is the smallest lead in probability: give 0 to 1",
        ),
        (
            {"rule": "stability", "threshold": 2.0},
            r"threshold=2\.0 for rule='stability', .* smallest probability of a token: give 0 to 1",
        ),
        (
            {"rule": "confidence", "threshold": 0.9, "stability_threshold": 0.1},
            r"stability_threshold=0\.1 has no effect with rule='confidence': drop it or use rule='stability'",
        ),
        (
            {"block_add_threshold": 0.5},
            r"block_add_threshold=0\.5 has no effect with mode='sequential': drop it or use mode=",
        ),
        (
            {"decoded_token_threshold": 0.5},
            r"decoded_token_threshold=0\.5 has no effect with mode='sequential': drop it or use",
        ),
        (
            {"cache": "dual", "settle_rounds": 2},
            r"settle_rounds=2 has no effect with mode='sequential', cache='dual': drop it or use .* a cache",
        ),
        (
            {**MULTI_BLOCK, "refresh_every": 4},
            r"refresh_every=4 has no effect with mode='multi_block', cache='none': drop it or use .* a cache",
        ),
        (
            {**MULTI_BLOCK, "rule": "steps", "steps": 8},
            r"rule='steps' with mode='multi_block': .*; use mode='sequential' or a rule with a threshold",
        ),
        (
            {"mode": "pipelined", "rule": "steps", "steps": 8},
            r"rule='steps' with mode='pipelined': .*; use mode='sequential' or a rule with a threshold",
        ),
        (
            {"mode": "pipelined", "cache": "dual"},
            r"cache='dual' with mode='pipelined': give 'exact' or 'none'",
        ),
        ({"cache": "exact"}, r"cache='exact' with mode='sequential': give 'none', 'prefix' or 'dual'"),
        ({**MULTI_BLOCK, "cache": "exact"}, r"cache='exact' with mode='multi_block': give 'none', 'prefix'"),
        (
            {"mode": "pipelined", "settle_rounds": 2},
            r"settle_rounds=2 has no effect with mode='pipelined', cache='exact': drop it",
        ),
        (
            {**REVISING, "rule": "steps", "steps": 8},
            r"rule='steps' with mode='revising': .*; use mode='sequential' or a rule with a threshold",
        ),
        ({**REVISING, "cache": "exact"}, r"cache='exact' with mode='revising': give 'none', 'prefix' or 'd"),
        (
            {"revision_passes": 2},
            r"revision_passes=2 has no effect with mode='sequential': drop it or use mode='revising'",
        ),
        (
            {**MULTI_BLOCK, "final_threshold": 0.5},
            r"final_threshold=0\.5 has no effect with mode='multi_block': drop it or use mode='revising'",
        ),
        (
            {**REVISING, "block_add_threshold": 0.5},
            r"block_add_threshold=0\.5 has no effect with mode='revising': drop it or use mode='multi_",
        ),
        (
            {"mode": "autoregressive", "block_add_threshold": 0.5},
            r"block_add_threshold=0\.5 has no effect with mode='autoregressive': drop it or use mode=",
        ),
        (
            {"mode": "autoregressive", "block_length": 4, "steps": 64, "gen_length": 64},
            r"block_length=4 with mode='autoregressive': there it always is 1; drop it or use another mode",
        ),
        (
            {"mode": "autoregressive", "rule": "entropy", "threshold": 0.5, "steps": None},
            r"rule='entropy' with mode='autoregressive': there it always is 'steps'; drop it or use another",
        ),
        (
            {"mode": "autoregressive", "stop_at_eos": False},
            r"stop_at_eos=False with mode='autoregressive': there it always is True; drop it or use another",
        ),
        (
            {"mode": "autoregressive", "steps": 64},
            r"steps=64 with mode='autoregressive': there it always is gen_length=256; drop it",
        ),
        (
            {"rule": "dream_entropy", "steps": 8, "block_length": 32},
            r"block_length=32 with rule='dream_entropy': there it always is gen_length=256; drop it",
        ),
        (
            {"mode": "pipelined", "rule": "dream_entropy", "steps": 8},
            r"rule='dream_entropy' with mode='pipelined': .*; use mode='sequential' or a rule with a thresh",
        ),
        (
            {"temperature": 1e-40},
            r"temperature=1e-40 is too small to draw .* float32: give at least 1e-06, or 0 to take",
        ),
        (
            {"temperature": 1e39},
            r"temperature=1e\+39 is too large to draw .* float32: give at most 1e\+06, at which all tokens",
        ),
        (
            {"temperature": 1.0, "top_p": 1e-60},
            r"top_p=1e-60 is too small to draw .* float32: give at least 1e-06, or temperature=0",
        ),
        ({"top_p": 0.9}, r"top_p=0\.9 has no effect at temperature=0\.0: raise temperature or drop top_p"),
        ({"top_k": 9}, r"top_k=9 has no effect at temperature=0\.0: raise temperature or drop top_k"),
        (
            {"eos_fill": "immediate", "stop_at_eos": False},
            r"eos_fill=immediate has no effect with stop_at_eos=False: drop one of them",
        ),
        *(
            (
                {"mode": mode, "eos_fill": "immediate"},
                rf"eos_fill=immediate has no effect with mode='{mode}': drop it or use mode='sequent",
            )
            for mode in ("revising", "pipelined", "autoregressive")
        ),
        ({"rule": "low_confidence"}, r"^rule: unknown rule='low_confidence': it is LLaDA's name of steps"),
        ({"rule": "origin"}, r"^rule: unknown rule='origin': .* not built in: give dream_entropy$"),
    ],
)
def test_combinations_without_sense(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        DecodingConfig(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 0}, "gen_length: .*greater than 0"),
        ({"block_length": 0}, "block_length: .*greater than 0"),
        ({"threshold": -0.1}, "threshold: .*greater than or equal to 0"),
        ({"threshold": float("nan")}, "threshold: .*finite number"),
        (
            {"rule": "stability", "threshold": 0.5, "stability_threshold": -1},
            "stability_threshold: .*greater than or equal to 0",
        ),
        ({"rule": "steps", "steps": 0}, "steps: .*greater than or equal to 1"),
        ({"mode": "parallel"}, "mode: .*known: sequential, multi_block, revising, pipelined"),
        ({"cache": "full"}, "cache: .*known: none, prefix, dual, exact"),
        ({**MULTI_BLOCK, "block_add_threshold": 0.0}, "block_add_threshold: .*greater than 0"),
        ({**MULTI_BLOCK, "block_add_threshold": 1.1}, "block_add_threshold: .*less than or equal to 1"),
        ({**MULTI_BLOCK, "decoded_token_threshold": 0.0}, "decoded_token_threshold: .*greater than 0"),
        (
            {**MULTI_BLOCK, "decoded_token_threshold": 1.1},
            "decoded_token_threshold: .*less than or equal to 1",
        ),
        ({**MULTI_BLOCK, "cache": "dual", "settle_rounds": 0}, "settle_rounds: .*greater than 0"),
        ({**MULTI_BLOCK, "cache": "dual", "refresh_every": 0}, "refresh_every: .*greater than 0"),
        ({"temperature": -1.0}, "temperature: .*greater than or equal to 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: .*greater than 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: .*less than or equal to 1"),
        ({**REVISING, "final_threshold": 1.1}, "final_threshold: .*less than or equal to 1"),
        ({**REVISING, "final_threshold": -0.1}, "final_threshold: .*greater than or equal to 0"),
        ({**REVISING, "revision_passes": -1}, "revision_passes: .*greater than or equal to 0"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"seed": 10**20}, "seed: .*less than"),
        ({"compile": "maybe"}, "compile: .*valid boolean"),
        ({"block_size": 32}, "block_size: unknown key; did you mean 'block_length'"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: .*greater than 0"),
        ({"eos_fill": "later"}, "eos_fill: unknown value 'later'; known: immediate"),
        ({"cfg_scale": 1.5}, r"cfg_scale: classifier-free guidance .*not built in: leave it out, [^;]*$"),
        ({"eps": 0.01, "alg": "origin"}, r"eps: .* 0\.001: leave it out; alg: Dream's .*built in$"),
        ({"cfg_scale": 1, "stepz": 3}, r"cfg_scale: classifier.* stepz: unknown key; .*'steps'\? known: bl"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        DecodingConfig(**settings)


def test_what_a_rule_declares_are_settings_with_its_defaults_and_limits():
    for name, declared in RULES.items():
        for field, parameter in declared.parameters.items():
            needed = [other for other, default in declared.settings.items() if default is None]
            others = {other: 1 for other in needed if other != field}
            blocks = {"gen_length": 8, "block_length": 8, "rule": name, **others}
            if parameter.default is not None:
                assert getattr(DecodingConfig(**blocks), field) == parameter.default
            assert getattr(DecodingConfig(**blocks, **{field: parameter.least}), field) == parameter.least
            above = [] if parameter.most is None else [parameter.most + 1e-5]
            for value in (parameter.least - 1e-5, *above):
                with pytest.raises(ConfigError, match=f"{field}"):
                    DecodingConfig(**blocks, **{field: value})


@pytest.fixture
def calm():
    """A rule with a parameter that no other rule has."""

    @rule(calm=Parameter(meaning="largest unrest", default=0.5, most=2))
    def calm_tokens(prediction, masked, context, *, calm):
        """Tokens with little unrest."""

    yield "calm_tokens"
    del RULES["calm_tokens"]


def test_a_parameter_with_a_new_name_is_a_setting(calm):
    """A rule in the package's file is declared before the settings are made: here they are made again."""
    made = runpy.run_path(str(Path(dparallel.config.decoding.__file__)))["DecodingConfig"]
    assert made(rule=calm).parameters == {"calm": 0.5}
    assert made(rule=calm, calm=2).calm == 2.0
    assert made().calm is None
    for settings, message in (
        ({"rule": calm, "calm": 2.5}, r"calm=2\.5 for rule='calm_tokens', .* largest unrest: give 0 to 2"),
        ({"rule": calm, "calm": -1}, r"calm: .*greater than or equal to 0"),
        ({"rule": calm, "threshold": 1}, r"threshold=1\.0 has no effect with rule='calm_tokens'"),
        ({"calm": 1}, r"calm=1\.0 has no effect with rule='entropy': drop it or use rule='calm_tokens'"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**settings)


def test_a_rule_of_a_script_has_parameters_of_known_names(calm):
    with pytest.raises(
        ConfigError, match="takes 'calm', which is no setting: declare .* names of steps, thr"
    ):
        DecodingConfig(rule=calm)


def test_a_parameter_may_be_whole_for_one_rule_and_not_for_others():
    """The setting takes any number; the rule takes whole ones, as such."""

    @rule(threshold=Parameter(meaning="tokens", default=2, least=1, whole=True))
    def so_many(prediction, masked, context, *, threshold):
        """So many tokens."""

    try:
        assert repr(DecodingConfig(rule="so_many").parameters) == "{'threshold': 2}"
        assert repr(DecodingConfig(rule="so_many", threshold=3).parameters) == "{'threshold': 3}"
        for value in (2.5, float("inf")):
            with pytest.raises(ConfigError, match=f"threshold={value} .* rule='so_many'|finite"):
                DecodingConfig(rule="so_many", threshold=value)
        with pytest.raises(ConfigError, match=r"threshold=2\.5 .* tokens: give a whole number, at least 1"):
            DecodingConfig(rule="so_many", threshold=2.5)
        assert DecodingConfig(rule="entropy", threshold=2.5).parameters == {"threshold": 2.5}
    finally:
        del RULES["so_many"]


def test_names_of_others_are_none_of_ours():
    assert not FOREIGN_SETTINGS.keys() & {*DecodingConfig.model_fields, *ChatBody.model_fields}
    assert not FOREIGN_RULES.keys() & RULES.keys()
    for advice in (*FOREIGN_SETTINGS.values(), *FOREIGN_RULES.values()):
        for setting, value in re.findall(r"\b([a-z_]+): ([a-z_]+)", advice.split("built in: ")[-1]):
            if setting not in DecodingConfig.model_fields:
                continue
            kept = {"threshold": 0.5} if value == "confidence" else {}
            kept |= {"steps": 256} if value == "steps" or value.startswith("dream_") else {}
            chosen = yaml.safe_load(value)
            assert getattr(DecodingConfig(**{setting: chosen}, **kept), setting) == chosen


def test_nested_mistakes_in_python_are_one_line():
    problems = {"benchmark": "coins", "count": 1}
    with pytest.raises(ConfigError, match=r"^decoding\.rule: unknown rule='entrpy'; did you mean 'entropy'"):
        TrajectoriesConfig(problems=problems, decoding={"rule": "entrpy"})
    with pytest.raises(ConfigError, match=r"^decoding: steps=3 has no effect with rule='entropy'"):
        TrajectoriesConfig(problems=problems, decoding={"steps": 3})
    with pytest.raises(ConfigError, match=r"^decoding\.stepz: unknown key; did you mean 'steps'\?"):
        TrajectoriesConfig(problems=problems, decoding={"stepz": 3})
    with pytest.raises(ConfigError, match=r"^decoding\.remasking: LLaDA's low_confidence is rule: steps, or"):
        TrajectoriesConfig(problems=problems, decoding={"remasking": "random"})

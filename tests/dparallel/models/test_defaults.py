"""Decode defaults of a checkpoint: precedence, refusals, and the file that holds them."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from dparallel import DecodingConfig, complete, generate, load_model, load_tokenizer, save_model
from dparallel.config.base import ConfigError
from dparallel.config.decoding import combined
from dparallel.models.defaults import Defaults, read_defaults, write_defaults
from dparallel.models.formats import CheckpointError
from dparallel.stages.generation_file import EMPTY, GENERATION, KEY, with_defaults, without_defaults
from dparallel.stages.manifest import FileRecord, file_digest, fingerprint, matches
from tests.conftest import GOLDEN

SETTINGS = {
    "gen_length": 24,
    "block_length": 8,
    "rule": "confidence",
    "threshold": 0.7,
    "mode": "multi_block",
}
PROMPT = [5, 6, 7]


def made(settings: dict[str, Any], pattern: str | None = "full") -> Defaults:
    return Defaults(settings, {"benchmark": "coins", "split": "validation"}, Path("m") / GENERATION, pattern)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gen_length", (64, 96, 32, 256)),
        ("block_length", (4, 8, 16, 32)),
        ("rule", ("margin", "frechet", "confidence", "entropy")),
        ("threshold", (0.2, 0.4, 0.7, 0.5)),
        ("mode", ("multi_block", "sequential", "multi_block", "sequential")),
        ("cache", ("prefix", "dual", "prefix", "none")),
        ("stop_at_eos", (True, False, False, True)),
        ("temperature", (0.1, 0.2, 0.3, 0.0)),
    ],
)
def test_options_count_before_a_config_the_checkpoint_and_what_is_built_in(name: str, values: Any) -> None:
    option, config, checkpoint, built_in = values
    beside = {"threshold": 0.5} if name == "rule" else {}
    defaults = made({name: checkpoint, **beside})
    given = [
        ({name: option, **beside}, {name: config, **beside}),
        ({}, {name: config, **beside}),
        ({}, {}),
    ]
    found = [getattr(defaults.resolve(*layers)[0], name) for layers in given]
    assert [*found, getattr(Defaults().decoding(), name)] == [option, config, checkpoint, built_in]


def test_what_the_checkpoint_supplies_is_told() -> None:
    decoding, kept = made(SETTINGS).resolve({"threshold": 0.9}, {"gen_length": 32})
    assert decoding == DecodingConfig(**{**SETTINGS, "threshold": 0.9, "gen_length": 32})
    assert kept == {"block_length": 8, "rule": "confidence", "mode": "multi_block"}
    assert made(SETTINGS).sentence(kept) == (
        "the checkpoint's decode defaults block_length 8, rule confidence, mode multi_block "
        "(m/generation_config.json, chosen on validation problems of coins)"
    )
    inaccurate = Defaults(SETTINGS, {"benchmark": "coins", "split": "validation", "keeps_accuracy": False})
    assert inaccurate.sentence({"rule": "confidence"}).endswith(
        "chosen on validation problems of coins, where it loses more than was allowed)"
    )
    assert made(SETTINGS).decoding(threshold=0.9) == DecodingConfig(**{**SETTINGS, "threshold": 0.9})
    assert Defaults().resolve() == (DecodingConfig(), {})


def test_what_belongs_to_a_replaced_rule_mode_or_cache_is_dropped() -> None:
    stored = {**SETTINGS, "cache": "prefix", "refresh_every": 4, "settle_rounds": 2}
    assert made(stored).decoding(rule="entropy").threshold == 0.5
    assert made(stored).decoding(cache="none").refresh_every is None
    sequential = made(stored).decoding(mode="sequential")
    assert (sequential.cache, sequential.refresh_every, sequential.threshold) == ("none", None, 0.7)
    assert made(stored).decoding(mode="sequential", rule="dream_entropy", steps=24).block_length == 24
    assert combined({"cache": "none"}, {"rule": "margin"}, stored) == {
        "gen_length": 24,
        "block_length": 8,
        "mode": "multi_block",
        "rule": "margin",
        "cache": "none",
    }


def test_a_rule_that_this_version_does_not_know_counts_only_where_it_is_used() -> None:
    later = made({**SETTINGS, "rule": "psychic", "foresight": 3})
    with pytest.raises(CheckpointError) as refused:
        later.decoding()
    message = str(refused.value)
    assert message.startswith("m/generation_config.json has decode defaults that this version of dparallel ")
    assert "foresight: unknown key" in message
    assert 'update dparallel, or correct the key "dparallel" in it, or delete that key' in message
    with pytest.raises(CheckpointError, match="unknown rule='psychic'.*known rules: steps"):
        made({**SETTINGS, "rule": "psychic"}).decoding()
    assert later.decoding(rule="entropy") == DecodingConfig(
        gen_length=24, block_length=8, rule="entropy", mode="multi_block"
    )
    with pytest.raises(CheckpointError, match="mode: unknown value 'later'"):
        made({"mode": "later"}).decoding()
    assert made({"mode": "later", "when": 1.0}).decoding(mode="sequential") == DecodingConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gen_length": 36}, "gen_length=36 is not divisible by block_length=8"),
        ({"rule": "steps", "steps": 24}, "rule='steps' with mode='multi_block'"),
        ({"threshold": 1.7}, "threshold=1.7 for rule='confidence'"),
        ({"refresh_every": 4}, "refresh_every=4 has no effect"),
        (
            {"rule": "dream_entropy", "steps": 24, "block_length": 8},
            "block_length=8 with rule='dream_entropy'",
        ),
    ],
)
def test_what_does_not_go_with_the_defaults_names_them(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        made(SETTINGS).resolve(given, called=lambda name: f"--{name}")
    assert message in str(refused.value)
    assert "; beside the checkpoint's decode defaults " in str(refused.value)
    assert str(refused.value).endswith("problems of coins): give other values instead")


def test_a_mode_that_does_not_suit_the_model_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="mode='multi_block' in its .* attention_pattern='block_causal'"
    ):
        made(SETTINGS, "block_causal").decoding()
    assert made(SETTINGS, "block_causal").decoding(mode="pipelined").mode == "pipelined"
    assert made(SETTINGS, None).decoding().mode == "multi_block"


@pytest.mark.parametrize(
    "decoding",
    [
        DecodingConfig(seed=3, compile=True),
        DecodingConfig(gen_length=64, rule="steps", steps=32, cache="dual", stop_at_eos=False),
        DecodingConfig(gen_length=64, rule="dream_entropy", steps=64, temperature=0.2, top_p=0.9),
        DecodingConfig(mode="multi_block", rule="frechet", cache="prefix", refresh_every=4),
        DecodingConfig(mode="pipelined", rule="confidence", threshold=0.9),
        DecodingConfig(mode="autoregressive", gen_length=12),
    ],
)
def test_every_decoding_survives_the_file(decoding: DecodingConfig, tmp_path: Path) -> None:
    assert write_defaults(tmp_path, decoding.portable(), {"benchmark": "coins"})
    assert not write_defaults(tmp_path, decoding.portable(), {"benchmark": "coins"}), "nothing changed"
    found = read_defaults(tmp_path)
    assert found.chosen == {"benchmark": "coins"}
    settings = {**decoding.model_dump(), "seed": None, "compile": False}
    assert DecodingConfig(**found.settings) == DecodingConfig(**settings)


def test_settings_that_follow_from_others_follow_from_the_new_ones(tmp_path: Path) -> None:
    write_defaults(tmp_path, DecodingConfig(mode="autoregressive", gen_length=12).portable())
    stored = Defaults(read_defaults(tmp_path).settings, attention_pattern="causal")
    assert stored.decoding(gen_length=20).steps == 20


def test_foreign_keys_are_read_without_harm_and_kept(tmp_path: Path) -> None:
    """As Dream publishes them: the names of some are ours, with other meanings."""
    foreign = {"bos_token_id": 1, "steps": 512, "alg": "origin", "eps": 0.001}
    (tmp_path / GENERATION).write_text(json.dumps(foreign), encoding="utf-8")
    assert read_defaults(tmp_path).settings == {}
    assert read_defaults(tmp_path / "none").settings == {}
    write_defaults(tmp_path, SETTINGS)
    assert json.loads((tmp_path / GENERATION).read_bytes()) == {**foreign, KEY: {"decoding": SETTINGS}}
    assert read_defaults(tmp_path).settings == SETTINGS
    theirs = GenerationConfig.from_pretrained(str(tmp_path))
    assert theirs.bos_token_id == 1
    theirs.save_pretrained(str(tmp_path))
    assert read_defaults(tmp_path).settings == SETTINGS, "transformers keeps keys that it does not know"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list"),
        ('{"dparallel": 3}', "has dparallel=3, expected an object"),
        ('{"dparallel": {"decoding": []}}', "has dparallel.decoding=[], expected an object"),
        (
            '{"dparallel": {"decoding": {"rule": ["entropy"]}}}',
            "dparallel.decoding.rule=['entropy'], expected",
        ),
        ('{"dparallel": {"decoding": {"rule": null}}}', "dparallel.decoding.rule=None, expected"),
        ('{"dparallel": {"rule": "entropy"}}', "has rule under dparallel, where only decoding and chosen"),
        ('{"dparallel": {"decoding": {}, "threshold": 1, "x": 2}}', "has threshold, x under dparallel"),
        ('{"dparallel": {"chosen": 1}}', "has dparallel.chosen=1, expected an object"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / GENERATION).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        read_defaults(tmp_path)
    assert str(tmp_path / GENERATION) in str(refused.value)
    assert "\n" not in str(refused.value)
    shutil.copytree(GOLDEN / "llada_tiny", tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


@pytest.mark.parametrize("before", [EMPTY, b'{"eos_token_id": 2, "a": "\xc3\xa9"}', b'{\n  "b": 1.5\n}\n'])
def test_digests_leave_decode_defaults_out(before: bytes, tmp_path: Path) -> None:
    plain = with_defaults(before, None)
    changed = with_defaults(before, {"decoding": SETTINGS})
    assert without_defaults(before) == before
    assert without_defaults(changed) == plain == with_defaults(changed, None)
    file = tmp_path / GENERATION
    file.write_bytes(plain)
    record = FileRecord(bytes=len(plain), sha256=file_digest(file))
    file.write_bytes(changed)
    assert matches(file, record)
    assert matches(file, record, hashed=False)
    file.write_bytes(changed.replace(b"24", b"25"))
    assert matches(file, record), "another length"
    file.write_bytes(with_defaults(b'{"eos_token_id": 3}', {"decoding": SETTINGS}))
    assert not matches(file, record)
    file.write_bytes(b"{")
    assert not matches(file, record)


def test_the_fingerprint_of_a_model_is_not_that_of_its_defaults(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    before = fingerprint(folder)
    write_defaults(folder, SETTINGS)
    assert fingerprint(folder) == before
    write_defaults(folder, None)
    (folder / GENERATION).write_text('{"eos_token_id": 2}', encoding="utf-8")
    assert fingerprint(folder) != before


def test_the_library_uses_them_and_saves_them(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    assert load_model(folder).defaults.decoding() == DecodingConfig()
    settings = {"gen_length": 12, "block_length": 6, "rule": "confidence", "threshold": 0.3}
    write_defaults(folder, settings, {"benchmark": "coins", "split": "validation"})
    model, tokenizer, decoding = load_model(folder), load_tokenizer(folder), DecodingConfig(**settings)
    with caplog.at_level(logging.INFO):
        assert generate(model, [PROMPT]) == generate(model, [PROMPT], decoding)
    [line] = [line for line in caplog.messages if "decode defaults" in line]
    assert line.startswith(
        "decoding with the checkpoint's decode defaults gen_length 12, block_length 6, rule "
    )
    assert complete(model, tokenizer, ["Tom"]) == complete(model, tokenizer, ["Tom"], decoding)
    other = model.defaults.decoding(block_length=12)
    assert other == DecodingConfig(**{**settings, "block_length": 12})
    save_model(model, tmp_path / "saved", tokenizer=tokenizer)
    assert read_defaults(tmp_path / "saved").settings == settings
    model.defaults = None
    save_model(model, tmp_path / "without", tokenizer=tokenizer)
    assert not (tmp_path / "without" / GENERATION).exists()

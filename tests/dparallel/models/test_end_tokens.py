"""All tokens that end a response, from any of the checkpoint's files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dparallel import DecodingConfig, generate, load_model, load_tokenizer, save_model
from dparallel.models.checkpoints import read_config
from dparallel.models.end_tokens import tokenizer_end_ids
from dparallel.models.formats import CheckpointError
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import GOLDEN, random_model
from tests.dparallel.models.published import edit_json, publish


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    """Without a tokenizer and without end tokens."""
    return shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "dream")


def ends(folder: Path) -> tuple[int | None, tuple[int, ...]]:
    config = read_config(folder)
    return config.eos_token_id, config.end_token_ids


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (254, None, (254,)),
        ([254, 253], None, (254, 253)),
        (254, [253, 254, 7], (254, 253, 7)),
        ([9], 254, (9, 254)),
        (None, [254, 253], (254, 253)),
        (None, 254, (254,)),
        (None, None, ()),
    ],
)
def test_both_configs_may_name_one_or_several(
    dream: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    """The first end token fills the positions after the end."""
    edit_json(dream / "config.json", eos_token_id=config)
    (dream / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}), encoding="utf-8")
    assert ends(dream) == (next(iter(expected), None), expected)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"eos_token_id=\[\], expected int or a list of at least one"),
        ("254", r"eos_token_id='254', expected int or a list"),
        ([254, True], r"eos_token_id=\[254, True\], expected int or a list"),
        ([254, None], r"eos_token_id=\[254, None\], expected int or a list"),
        (2.0, r"eos_token_id=2.0, expected int or a list"),
        ([254, 256], r"eos_token_id=256, outside the vocabulary \(0 to 255\)"),
        (-1, r"eos_token_id=-1, outside the vocabulary"),
    ],
)
def test_what_is_no_token_id_is_refused(dream: Path, file: str, value: Any, message: str) -> None:
    (dream / "generation_config.json").write_text("{}", encoding="utf-8")
    edit_json(dream / file, eos_token_id=value)
    with pytest.raises(CheckpointError, match=f"dream/{file} has {message}"):
        read_config(dream)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_tokenizers_ends_of_turn_and_text_end_a_response(tmp_path: Path, family: str) -> None:
    folder = publish(tmp_path / family, family)
    assert ends(folder) == (254, (254,))
    file, tokens = {
        "llada": ("tokenizer.json", "added_tokens"),
        "dream": ("tokenizer_config.json", "added_tokens_decoder"),
    }[family]
    named = {250: "<|im_end|>", 251: "<|im_start|>", 252: "<|eot_id|>"}
    fields = json.loads((folder / file).read_text(encoding="utf-8"))[tokens]
    if isinstance(fields, dict):
        fields |= {str(key): {"content": text, "special": key != 252} for key, text in named.items()}
    else:
        fields += [{"id": key, "content": text, "special": key != 252} for key, text in named.items()]
    edit_json(folder / file, **{tokens: fields})
    assert ends(folder) == (254, (254, 250)), "a start is no end, and an ordinary word is none either"


def test_the_tokenizers_own_end_may_be_an_ordinary_word_of_its_vocabulary(tmp_path: Path) -> None:
    folder = publish(tmp_path / "llada", "llada")
    edit_json(folder / "tokenizer_config.json", eos_token={"content": "w9"})
    assert ends(folder) == (254, (254, 9))
    folder = publish(tmp_path / "dream", "dream")
    edit_json(folder / "tokenizer_config.json", eos_token="hi")
    assert ends(folder) == (254, (254, json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["hi"]))
    edit_json(folder / "tokenizer_config.json", eos_token="no such word")
    assert ends(folder) == (254, (254,))


def test_a_tokenizer_may_name_the_only_end_and_tokens_the_model_does_not_know(dream: Path) -> None:
    added = {"300": {"content": "<|eot_id|>", "special": True}, "x": {}, "7": "no object"}
    (dream / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added}), encoding="utf-8"
    )
    (dream / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}), encoding="utf-8")
    (dream / "added_tokens.json").write_text(json.dumps({"<end>": 12}), encoding="utf-8")
    assert tokenizer_end_ids(dream) == [12, 300]
    assert ends(dream) == (12, (12,))


def test_they_survive_saving_in_our_own_format(tmp_path: Path) -> None:
    model = random_model(end_token_ids=(7, 9))
    assert (model.config.eos_token_id, model.config.end_token_ids) == (2, (2, 7, 9))
    save_model(model, tmp_path, tokenizer=build_tokenizer())
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["end_token_ids"] == [2, 7, 9]
    assert ends(tmp_path) == (2, (2, 7, 9))
    again = load_model(tmp_path, "cpu")
    assert again.config.end_token_ids == (2, 7, 9)
    edit_json(tmp_path / "config.json", end_token_ids=[7, "9"])
    with pytest.raises(CheckpointError, match=r"end_token_ids=\[7, '9'\], expected int or a list"):
        read_config(tmp_path)


def test_they_survive_saving_in_the_publishers_format(tmp_path: Path) -> None:
    folder = publish(tmp_path / "dream", "dream")
    edit_json(folder / "config.json", eos_token_id=[254, 252])
    edit_json(folder / "generation_config.json", eos_token_id=[251])
    model = load_model(folder, "cpu")
    save_model(model, tmp_path / "original", format="original")
    save_model(model, tmp_path / "native", tokenizer=load_tokenizer(folder))
    assert ends(folder) == ends(tmp_path / "original") == ends(tmp_path / "native") == (254, (254, 252, 251))


def test_a_turn_ends_a_response_of_a_published_model(tmp_path: Path) -> None:
    """Its first prediction is declared an end-of-turn token: the response is one token, then EOS."""
    folder = publish(tmp_path / "llada", "llada")
    decoding = DecodingConfig(gen_length=16, block_length=8, rule="steps", steps=16, stop_at_eos=False)
    [free] = generate(load_model(folder, "cpu"), [[5, 6, 7]], decoding)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [254, free.tokens[3]]}), encoding="utf-8"
    )
    [ended] = generate(
        load_model(folder, "cpu"), [[5, 6, 7]], decoding.model_copy(update={"stop_at_eos": True})
    )
    end = free.tokens.index(free.tokens[3]) + 1
    assert (ended.num_tokens, ended.tokens[:end]) == (end, free.tokens[:end])
    assert ended.nfe < free.nfe


@pytest.mark.parametrize("stated", [None, "full", "block_causal"])
@pytest.mark.parametrize("format", ["native", "original"])
def test_what_is_said_of_the_attention_pattern_survives_saving(
    tmp_path: Path, stated: str | None, format: str
) -> None:
    """A missing pattern differs from `full`: published block-causal models do not state theirs."""
    folder = publish(tmp_path / "llada", "llada")
    model = load_model(folder, "cpu")
    assert model.config.attention_pattern is None
    model.config.attention_pattern = stated
    save_model(model, tmp_path / "saved", format=format)
    raw = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert raw.get("attention_pattern") == stated
    assert read_config(tmp_path / "saved").attention_pattern == stated

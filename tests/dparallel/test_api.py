"""The public API, and that importing it has no side effects."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import dparallel
from dparallel import Completion, DecodingConfig, complete, generate
from dparallel.members import MODULES
from dparallel.rules.rules import RULES
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model

ROOT = Path(__file__).parents[2]
DECODING = DecodingConfig(gen_length=24, block_length=8, threshold=1.5)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}answer{% endif %}"
)


def test_everything_named_is_there_and_typed() -> None:
    assert sorted(dparallel.__all__, key=str.lower) == sorted(set(dparallel.__all__), key=str.lower)
    for name in dparallel.__all__:
        assert getattr(dparallel, name) is not None
    assert dparallel.RULES is RULES
    assert files("dparallel").joinpath("py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["dparallel"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dparallel.version.__version__"}
    for error in ("ChatTemplateError", "CheckpointError", "ConfigError", "DecodingError"):
        assert issubclass(getattr(dparallel, error), dparallel.UserError)


def test_members_imported_later_are_those_that_are_typed() -> None:
    """The package's file declares their types; the table says from where they are imported."""
    tree = ast.parse(Path(dparallel.__file__).read_text(encoding="utf-8"))
    [choice] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {name.name: line.module for line in choice.body for name in line.names}  # type: ignore[attr-defined]
    assert typed == MODULES
    assert set(dparallel.__all__) <= set(dir(dparallel))
    with pytest.raises(AttributeError, match="module 'dparallel' has no attribute 'generat'"):
        dparallel.generat  # type: ignore[attr-defined]  # noqa: B018
    for name, module in MODULES.items():
        assert getattr(dparallel, name) is getattr(importlib.import_module(module), name)


@pytest.mark.slow
def test_importing_changes_nothing_and_warns_of_nothing() -> None:
    """Neither on the environment nor on logging and warnings; nor does an adapter make DeepSpeed log."""
    code = """
import json, logging, os, sys, warnings
def state():
    root = logging.getLogger()
    ours = logging.getLogger("dparallel")
    logs = [(log.level, list(map(repr, log.handlers)), log.propagate) for log in (root, ours)]
    return [dict(os.environ), logs, list(map(repr, warnings.filters))]
# What torch and transformers do by themselves is theirs.
from torch.nn.attention import flex_attention
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
before = state()
import dparallel
for name in dparallel.__all__:
    getattr(dparallel, name)
after = state()
print(json.dumps([before == after] + [name in sys.modules for name in ("deepspeed", "peft", "datasets")]))
from dparallel.models.lora import attach
from dparallel.config.experiment import LoraSettings
from tests.conftest import random_model
attach(random_model(), LoraSettings(rank=2, alpha=2))
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    assert json.loads(done.stdout) == [True, False, False, False]
    assert done.stderr == ""


def test_completions_are_what_generate_decodes() -> None:
    model, tokenizer = random_model(2), build_tokenizer()
    texts = [f"Tom has {count}" for count in range(12)]
    completions = complete(model, tokenizer, texts, DECODING, batch_size=5)
    generations = generate(model, [tokenizer.encode(text) for text in texts], DECODING)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion, generation in zip(completions, generations, strict=True):
        tokens = generation.tokens[: generation.num_tokens]
        ended = tokens[-1] == tokenizer.eos_token_id
        assert completion == Completion(
            text=tokenizer.decode(tokens[:-1] if ended else tokens),
            tokens=tokens,
            nfe=generation.nfe,
            tokens_per_forward=len(tokens) / generation.nfe,
            finish_reason="stop" if ended else "length",
        )
        assert "<eos>" not in completion.text


def test_a_turns_end_stops_a_completion_and_is_no_text() -> None:
    tokenizer = build_tokenizer()
    [free] = complete(random_model(), tokenizer, ["Tom has"], DECODING)
    end = free.tokens[2]
    [ended] = complete(random_model(end_token_ids=(end,)), tokenizer, ["Tom has"], DECODING)
    assert (ended.finish_reason, ended.tokens[-1]) == ("stop", end)
    assert ended.text == tokenizer.decode(ended.tokens[:-1])


def test_a_stop_text_ends_a_completion_and_is_no_text() -> None:
    model, tokenizer = random_model(2), build_tokenizer()
    [free] = complete(model, tokenizer, ["Tom has"], DECODING)
    stop = free.text.split()[2]
    [ended] = complete(model, tokenizer, ["Tom has"], DECODING, stops=[stop])
    assert ended.text == free.text.partition(stop)[0]
    assert ended.finish_reason == "stop"
    assert len(ended.tokens) <= 3 < len(free.tokens)
    assert ended.nfe < free.nfe
    for wrong in ("Tom", [""], [5], None):
        with pytest.raises(dparallel.DecodingError, match="stops=.*: give a list of texts, none of them"):
            complete(model, tokenizer, ["Tom has"], DECODING, stops=wrong)  # type: ignore[arg-type]


def test_a_conversation_goes_through_the_chat_template_and_may_stand_beside_texts() -> None:
    model, tokenizer = random_model(), build_tokenizer()
    chat = [{"role": "user", "content": "Tom has 7"}]
    with pytest.raises(dparallel.ChatTemplateError, match="has no chat template"):
        complete(model, tokenizer, [chat], DECODING)
    tokenizer.chat_template = TEMPLATE
    assert complete(model, tokenizer, [chat, "Tom"], DECODING) == complete(
        model, tokenizer, ["user Tom has 7 answer", "Tom"], DECODING
    )
    assert complete(model, tokenizer, [], DECODING) == []


def test_a_beginning_of_text_is_put_in_front_once() -> None:
    model, tokenizer = random_model(), build_tokenizer()
    plain = complete(model, tokenizer, ["<eos> Tom has"], DECODING)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert complete(model, tokenizer, ["Tom has"], DECODING) == plain
    assert complete(model, tokenizer, ["<eos> Tom has"], DECODING) == plain


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Tom", "prompts is one text or one conversation: give a list of them"),
        ([{"role": "user", "content": "Tom"}], "prompts is one text or one conversation"),
        ({"role": "user", "content": "Tom"}, "prompts is one text or one conversation"),
        ([[5, 6]], r"prompt 0 is \[5, 6\]: give a text, or a conversation .* generate takes token ids"),
        (["Tom", 7], "prompt 1 is 7: give a text"),
        (["Tom", "\ud83d"], r"prompt 1 is '\\ud83d', not a text in UTF-8: surrogates not allowed"),
        ((text for text in ["Tom"]), "prompts is a generator: give a list of texts or conversations"),
        (5, "prompts is a int: give a list of texts"),
        (None, "prompts is a NoneType: give a list of texts"),
    ],
)
def test_what_is_neither_text_nor_conversation_is_refused(prompts: object, message: str) -> None:
    with pytest.raises(dparallel.DecodingError, match=message):
        complete(random_model(), build_tokenizer(), prompts, DECODING)  # type: ignore[arg-type]


@pytest.mark.parametrize("decoding", [{"rule": "entropy"}, "entropy"])
def test_a_decoding_is_given_as_its_configuration(decoding: object) -> None:
    with pytest.raises(dparallel.DecodingError, match="decoding=.*: give a DecodingConfig"):
        generate(random_model(), [[5]], decoding)  # type: ignore[arg-type]


def test_a_model_is_saved_where_the_path_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    dparallel.save_model(random_model(), "~/saved", tokenizer=build_tokenizer())
    assert (tmp_path / "home" / "saved" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
    (tmp_path / "file").touch()
    for path in ("file", "file/inside", "x" * 300, "/dev/null"):
        with pytest.raises(dparallel.UserError, match=f"{path} cannot be written"):
            dparallel.save_model(random_model(), path)


def test_the_only_cpu_has_a_number_too(tiny_checkpoint: Path) -> None:
    assert dparallel.load_model(tiny_checkpoint, device="cpu:0").device == torch.device("cpu")


def test_a_batch_size_that_is_no_number_is_refused() -> None:
    with pytest.raises(dparallel.DecodingError, match="batch_size='4': give a whole number of at least 1"):
        generate(random_model(), [[5]], DECODING, batch_size="4")  # type: ignore[arg-type]

"""The checkpoint for trying things: every text survives its tokenizer, and every command can use it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dparallel
from dparallel.models.checkpoints import read_config
from dparallel.problems.prompts import encode_chat, finish
from dparallel.tiny import byte_level
from dparallel.tiny.byte_level import LLADA, MASK, QWEN, TEMPLATES, save_checkpoint

ENDS = {LLADA: {"<|endoftext|>", "<|eot_id|>"}, QWEN: {"<|endoftext|>", "<|im_end|>"}}


@given(st.text())
def test_every_text_is_encoded_byte_by_byte_without_loss(text: str) -> None:
    tokenizer = byte_level.byte_level()
    if not any(special in text for special in tokenizer.all_special_tokens):
        tokens = tokenizer.encode(text)
        assert len(tokens) == len(text.encode())
        assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_saved_checkpoint_is_whole(model: str, tmp_path: Path) -> None:
    template = TEMPLATES[model]
    save_checkpoint(tmp_path, template)
    loaded, tokenizer = dparallel.load_model(tmp_path), dparallel.load_tokenizer(tmp_path)
    assert tokenizer.chat_template == template
    assert len(tokenizer) == loaded.config.vocab_size == 256 + len(byte_level.SPECIAL[template]) + 1
    assert tokenizer.convert_ids_to_tokens(loaded.config.mask_token_id) == MASK
    ends = read_config(tmp_path).end_token_ids
    assert set(tokenizer.convert_ids_to_tokens(list(ends))) == ENDS[template], "end of text, and of turn"
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "2 + 2?"}])
    decoding = dparallel.DecodingConfig(gen_length=8, block_length=8)
    [generation] = dparallel.generate(loaded, [prompt], decoding)
    assert isinstance(finish(generation.tokens, tokenizer, ends), str)


def test_the_command_writes_the_same_checkpoint_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        monkeypatch.setattr("sys.argv", ["byte_level", str(tmp_path / name), "--seed", seed])
        assert byte_level.main() == 0
    assert capsys.readouterr().out == "".join(f"{tmp_path / name}\n" for name in ("one", "same", "other"))
    one, same, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["byte_level", str(tmp_path / "file")])
    assert byte_level.main() == 2
    assert capsys.readouterr().err.startswith("python -m dparallel.tiny.byte_level: error: ")

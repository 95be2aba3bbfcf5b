"""Files with other accounts, other library versions, and leftovers of killed processes."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dparallel import load_model, load_tokenizer, save_model
from dparallel.models.formats import CheckpointError
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import random_model
from tests.dparallel.models.published import edit_json, publish


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("format", ["native", "original"])
def test_files_get_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, format: str) -> None:
    model = load_model(publish(tmp_path / "llada", "llada"), "cpu")
    before = os.umask(umask)
    try:
        save_model(model, tmp_path / "out", tokenizer=build_tokenizer(), format=format)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.slow
def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    code = f"""
import os
from dparallel.models import checkpoints
from tests.conftest import random_model
checkpoints.give_usual_modes = lambda files: os._exit(9)  # between writing and giving the files their places
checkpoints.save_model(random_model(), {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    [leftover] = tmp_path.iterdir()
    assert leftover.name.startswith(".saving-")
    names = save_model(random_model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        *(
            pytest.param(file, marks=pytest.mark.slow)
            for file in ("model.safetensors", "tokenizer_config.json", ".")
        ),
    ],
)
def test_what_may_not_be_read_is_one_line(tiny_checkpoint: Path, tmp_path: Path, file: str) -> None:
    """In a process without capabilities, because root can read everything."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / file).chmod(0)
    code = f"""
import ctypes
import dparallel
from dparallel.models.formats import CheckpointError
version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(version_3, none) == 0
try:
    dparallel.load_model({str(folder)!r}, "cpu")
    dparallel.load_tokenizer({str(folder)!r})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    (folder / file).chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert str(folder if file == "." else folder / file) in done.stdout
    assert "Permission denied" in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("content", ['{"vocab_size": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_python_cannot_hold_is_named(tiny_checkpoint: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def test_a_tokenizer_of_another_version_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    edit_json(folder / "tokenizer.json", model={"type": "Tomorrow", "vocab": {}})
    with pytest.raises(Exception, match="untagged enum"):
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load: .*untagged enum"):
        load_tokenizer(folder)


def test_a_saved_tokenizer_is_written_as_transformers_4_reads_it(tmp_path: Path) -> None:
    """It has no TokenizersBackend, and requires extra special tokens as an object."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|im_end|>"]})
    save_model(random_model(vocab_size=52), tmp_path, tokenizer=tokenizer)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<|eot_id|>", "<|im_end|>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(fields)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.all_special_ids == tokenizer.all_special_ids
    assert (again.mask_token, again.eos_token, again.pad_token) == ("<mask>", "<eos>", "<pad>")

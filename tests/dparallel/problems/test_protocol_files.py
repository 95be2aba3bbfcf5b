"""The protocols in configs/: the exact texts that they ask, and what else makes them complete.

Expected texts are hashes of texts that were assembled by the templates and the code of lm-eval 0.4.8 and of
dParallel's repository (2ca4d14), followed by LLaDA's or Qwen's chat template.
"""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.files import load_config
from dparallel.config.problems import ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.prompts import ChatTemplateError, render
from dparallel.problems.sources import Problem, ProblemsError, dataset_problems
from dparallel.tiny.byte_level import LLADA, QWEN, byte_level

PROTOCOLS = Path(__file__).parents[3] / "configs" / "protocols"
NAMES = sorted(path.stem for path in PROTOCOLS.glob("*.yaml"))
ROWS = {
    name: part["row"]
    for name, part in json.loads(
        Path(__file__).with_name("published_rows.json").read_text(encoding="utf-8")
    ).items()
}
FILES = {
    "gsm8k": "gsm8k_test.jsonl",
    "math": "math_test.jsonl",
    "math500": "math500_test.jsonl",
    "humaneval": "HumanEval.jsonl.gz",
    "mbpp": "mbpp.jsonl",
}
TEXTS = {
    "gsm8k_llada": "f04d94d9fa7ff53ccae152a552ee6a6a1fe4687ced10a8270b7bd0164b7ca9d2",
    "gsm8k_dream": "5ea35e569e37fc89f2cb218c92f8f1eca553108980e81f36316c031e6d91b54c",
    "gsm8k_llada_raw": "3ecf69624b1ce95ae0b41a1fc9ccaf38e0c07a2bb6c7c959ffc1c5a749dc049b",
    "gsm8k_d2f": "df7b80fc607720b34dddd524eb3359ce6b97187bc61f7d9e2c997cae95b3a759",
    "math500_llada": "d1b82a88649869080ac461b117476de68bca7f953c6eca927d56b29813de02a3",
    "math500_dream": "7f22ae2f6b278bee0726e43336e2c308b88bdbae3c0abe5f7f5fb6c1b557c995",
    "math500_llada_raw": "4bd892f8fbe87b969e2a46990861afab2a7aeee3caaa5e8f6da7363905f0e57d",
    "math500_d2f": "390a5c41b0cf4f3c7f5598a3e6811cc0e01c996da92d7d6bf913c0ff4804be3e",
    "humaneval_llada": "6ac323f202034324ae8be3639cd9cd3c6bb9bd32356f47b897f7188ea9e4c717",
    "humaneval_dream": "1009d44095f59fca12b5860952299d4f91a29ac482e3dcdddca238a51046b214",
    "humaneval_llada_raw": "6ac323f202034324ae8be3639cd9cd3c6bb9bd32356f47b897f7188ea9e4c717",
    "humaneval_d2f": "622766130cae38482081bb55f5205bcc0c4278e2ee790baed930bf773a2094a8",
    "mbpp_llada": "48280ef574422adfcf8317facd95c1c30333d0565a1d50f5369a04742d5e19a1",
    "mbpp_dream": "6919f755afa65c7477b054c27c36283d18795e18ff5ed37635191c47e4033bf1",
    "mbpp_llada_raw": "48280ef574422adfcf8317facd95c1c30333d0565a1d50f5369a04742d5e19a1",
    "mbpp_d2f": "a734bc1fd9cecf46f0782744671bb0954a0db1e45dceef64edadd81dad16ceac",
}


def load(name: str) -> ProtocolConfig:
    return load_config(ProtocolConfig, PROTOCOLS / f"{name}.yaml")


def benchmark_of(name: str) -> str:
    return name.partition("_")[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published files, each with one row that counts."""
    folder = tmp_path_factory.mktemp("published")
    others = {**ROWS["mbpp"], "task_id": 0}
    contents: dict[str, list[dict[str, Any]]] = {
        "gsm8k": [ROWS["gsm8k"]],
        "math": [ROWS["math500"]],
        "math500": [ROWS["math500"]],
        "humaneval": [ROWS["humaneval"]],
        "mbpp": [*[others] * 10, ROWS["mbpp"]],
    }
    for name, rows in contents.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = folder / FILES[name]
        file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return folder


def first(name: str, published: Path) -> Problem:
    config = ProblemsConfig(benchmark="dataset", protocol=load(name), path=str(published))
    [problem] = dataset_problems(config)
    return problem


def asked(name: str, published: Path) -> str:
    tokenizer = byte_level(QWEN if name.endswith("_dream") else LLADA)
    text = tokenizer.decode(render(first(name, published), load(name), tokenizer))
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", NAMES)
def test_the_text_asked_is_the_published_one(name: str, published: Path) -> None:
    text = asked(name, published)
    assert hashlib.sha256(text.encode()).hexdigest() == TEXTS[name.replace("math_", "math500_")], text
    assert text.count("<|startoftext|>") <= 1


def test_a_text_by_hand(published: Path) -> None:
    question = ROWS["gsm8k"]["question"]
    assert asked("gsm8k_llada", published) == (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nQuestion: {question}\n"
        "Answer: Please reason step by step, and put your final answer within \\boxed{}.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert asked("gsm8k_dream", published) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nQ: {question}\nA: Let's think step by step.<|im_end|>\n<|im_start|>assistant\n"
    )
    row = ROWS["mbpp"]
    task = f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass"
    assert asked("mbpp_dream", published) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{task} these tests:\n\n" + "\n".join(row["test_list"]) + "<|im_end|>\n"
        "<|im_start|>assistant\nHere is the completed function:\n```python\n"
    )


EXTRA = {"humaneval": {"prompt", "entry_point", "test"}, "mbpp": {"test_list", "test_setup_code"}}


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_complete(name: str, published: Path) -> None:
    protocol, problem = load(name), first(name, published)
    assert protocol.licence
    assert protocol.decoding is not None
    assert protocol.decoding.gen_length == (512 if name.endswith("_d2f") else 256)
    assert problem.reference, "the canonical solution"
    assert set(problem.extra) == EXTRA.get(benchmark_of(name), set())
    assert problem.source.startswith(protocol.data[0].path)
    own = {"humaneval": "HumanEval/0", "mbpp": "11", "math500": "test/precalculus/807.json"}
    assert problem.problem_id == own.get(benchmark_of(name), f"{_stem(protocol)}-00001")


def _stem(protocol: ProtocolConfig) -> str:
    return protocol.data[0].path.partition("/")[2]


def test_protocols_of_a_benchmark_differ_in_the_asking_only() -> None:
    for name in NAMES:
        other = load(next(other for other in NAMES if benchmark_of(other) == benchmark_of(name)))
        for setting in ("data", "problems", "file", "licence", "extra"):
            assert getattr(load(name), setting) == getattr(other, setting), (name, setting)
    for name in (name for name in NAMES if benchmark_of(name) == "math"):
        part, whole = load(name.replace("math_", "math500_")), load(name)
        same = {name: getattr(part, name) for name in ("data", "problems", "file", "licence")}
        assert whole.model_copy(update=same) == part


THRESHOLDS = {  # of dParallel: GSM8K, MATH, HumanEval, MBPP
    "llada": (0.5, 0.5, 0.5, 0.45),
    "dream": (0.45, 0.45, 0.5, 0.5),
}


@pytest.mark.parametrize("model", THRESHOLDS)
def test_the_decoding_is_the_published_one(model: str) -> None:
    found = [load(f"{name}_{model}").decoding for name in ("gsm8k", "math", "humaneval", "mbpp")]
    assert tuple(decoding.threshold for decoding in found if decoding) == THRESHOLDS[model]
    added = [load(f"{name}_d2f").decoding for name in ("gsm8k", "math", "humaneval", "mbpp")]
    assert [d.block_add_threshold for d in added if d] == [0.7, 0.1, 0.1, 0.9]
    assert [d.block_length for d in added if d] == [64, 32, 32, 32]


def test_what_a_protocol_lacks_is_named_before_anything_is_decoded(published: Path, tmp_path: Path) -> None:
    tokenizer = byte_level(LLADA)
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match=r"no chat template.*protocol\.chat: false"):
        render(first("gsm8k_llada", published), load("gsm8k_llada"), tokenizer)
    (tmp_path / "mbpp.jsonl").write_text('{"task": "a", "task_id": 1}\n' * 11, encoding="utf-8")
    with pytest.raises(
        ProblemsError, match=r"mbpp\.jsonl train\[10:510\]: no column 'text'; its columns: task, "
    ):
        first("mbpp_llada", tmp_path)

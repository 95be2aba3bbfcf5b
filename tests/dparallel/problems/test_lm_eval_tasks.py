"""Tasks of lm-eval: its own requests and verdicts are the reference. Without it most tests are skipped."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.problems import ProblemsConfig
from dparallel.problems.judging import score
from dparallel.problems.prompts import render_all
from dparallel.problems.registry import load_problems, problems_digest, protocol_of
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import ProblemsError
from dparallel.tiny.byte_level import LLADA, QWEN, byte_level

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is missing")
if importlib.util.find_spec("lm_eval") is not None:
    pytestmark = [
        pytest.mark.filterwarnings("ignore"),  # of lm-eval and of what it imports
        pytest.mark.slow,  # it takes seconds to import
    ]
ROWS = [
    {"question": f"Tom has {n} coins and finds {n}. How many?", "answer": f"{n} + {n}\n#### {2 * n},000"}
    for n in range(1, 9)
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = {}
    for split, rows in {"test": ROWS[:5], "train": ROWS[5:]}.items():
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[split] = str(path)
    return found


def config(task: str | None = "gsm8k", **settings: Any) -> ProblemsConfig:
    return ProblemsConfig(**{"benchmark": "lm_eval", "task": task, **settings})


def own_task(name: str, num_fewshot: int, files: dict[str, str]) -> Any:
    """The task as lm-eval's evaluator prepares it."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / "gsm8k"
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    members = [{"task": name, **data}]
    [task] = manager.load({"group": "own", "task": members})["tasks"].values()
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    return task


@needs_lm_eval
@pytest.mark.parametrize("template", [LLADA, QWEN])
@pytest.mark.parametrize(
    ("name", "shots", "chat", "turns", "system"),
    [
        ("gsm8k_cot_zeroshot", 0, False, False, None),
        ("gsm8k", 2, False, False, None),
        ("gsm8k", 2, False, False, "Be brief."),
        ("gsm8k", 2, True, True, None),
        ("gsm8k", 2, True, False, None),
        ("gsm8k_cot", 3, True, True, "Be brief."),
        ("gsm8k_cot", 3, True, False, "Be brief."),
        ("gsm8k_cot_zeroshot", 0, True, False, None),
    ],
)
def test_prompts_and_stops_are_those_of_lm_evals_requests(
    name: str, shots: int, chat: bool, turns: bool, system: str | None, template: str, files: dict[str, str]
) -> None:
    tokenizer = byte_level(template)
    task = own_task(name, shots, files)
    task.build_all_requests(
        system_instruction=system,
        apply_chat_template=chat,
        fewshot_as_multiturn=turns,
        chat_template=lambda messages, add_generation_prompt: tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        ),
    )
    protocol = {"chat": chat, "system": system, **({"examples_as": "text"} if chat and not turns else {})}
    asked = config(name, num_fewshot=shots, data_files=files, protocol=protocol)
    problems, rules = load_problems(asked), protocol_of(asked)
    texts = [tokenizer.decode(ids) for ids in render_all(problems, rules, tokenizer)]
    assert texts == [request.args[0] for request in task.instances]
    assert all(list(rules.stops) == request.args[1]["until"] for request in task.instances)
    assert len(problems) == 5


@needs_lm_eval
def test_verdicts_are_those_of_lm_evals_filters_and_metrics(files: dict[str, str]) -> None:
    responses = [
        "#### 2000",
        "so $2,000.",
        "2,000.00",
        "",
        "The answer is 2000. No, 3.",
        "#### 2,000",
        "-2000",
        "... #### 2000.",
    ]
    asked = config("gsm8k", num_fewshot=0, data_files=files)
    problem, rules = load_problems(asked)[0], protocol_of(asked)
    found = score([problem] * len(responses), responses, rules)
    task = own_task("gsm8k", 0, files)
    task.build_all_requests(limit=1)
    [request] = task.instances
    for response, verdict in zip(responses, found, strict=True):
        request.resps = [response]
        task.apply_filters()
        expected = {
            f"{metric},{name}": bool(value)
            for name, filtered in request.filtered_resps.items()
            for metric, value in task.process_results(request.doc, [filtered]).items()
        }
        assert verdict.metrics == expected, response
    assert {verdict.metrics["exact_match,strict-match"] for verdict in found} == {True, False}


@needs_lm_eval
def test_a_metric_is_chosen_as_the_accuracy_and_problems_are_selected(files: dict[str, str]) -> None:
    asked = config(
        "gsm8k", num_fewshot=2, data_files=files, metric="exact_match,flexible-extract", rows="[1:]", count=2
    )
    assert accuracy_metric(protocol_of(asked)) == "exact_match,flexible-extract"
    assert [scorer.metrics[1] for scorer in scorers_of(asked.protocol)] == ["exact_match,strict-match"]
    whole = load_problems(asked.model_copy(update={"rows": None, "count": None}))
    assert load_problems(asked) == whole[1:3], "the examples drawn are those of the whole set"
    assert [problem.problem_id for problem in whole[:2]] == ["gsm8k-00001", "gsm8k-00002"]
    assert whole[0].reference == ROWS[0]["answer"]
    assert asked.files() == [Path(file) for file in files.values()]
    chat = asked.model_copy(update={"protocol": config(protocol={"chat": True}).protocol})
    assert problems_digest(load_problems(chat)) != problems_digest(load_problems(asked))


@needs_lm_eval
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "humaneval"}, "task='humaneval' of lm-eval runs generated code, which needs a sandbox"),
        ({"task": "arc_easy"}, "is of the type multiple_choice, and only generate_until"),
        ({"task": "squadv2"}, "is written in Python"),
        ({"task": "gsm8k_cot_self_consistency"}, "takes 64 responses to every problem, and one is decoded"),
        ({"task": "wmt16-de-en"}, "has the metric 'bleu', which is no share of correct responses"),
        ({"metric": "acc"}, "metric='acc' of task='gsm8k' is unknown; known: exact_match,strict-match, ex"),
        ({"num_fewshot": 3}, "reads the split 'train' for its examples, and data_files gives test: give t"),
        (
            {"data_files": {"train": "a"}},
            "reads the split 'test', and data_files gives train: give test: FILE",
        ),
        ({"data_files": {"test": "no.jsonl"}}, r"data_files: no\.jsonl: no such file"),
        ({"data_files": {}}, "cannot be loaded .*; offline, give data_files"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(
    settings: dict[str, Any], message: str, files: dict[str, str]
) -> None:
    local = {"test": files["test"]}
    with pytest.raises(ProblemsError, match=message):
        load_problems(config(**{"num_fewshot": 0, "data_files": local, **settings}))


@needs_lm_eval
def test_unknown_tasks_and_groups_name_others() -> None:
    with pytest.raises(ProblemsError, match="unknown task='gsm8k_cott'.* similar ones: gsm8k_cot, "):
        load_problems(config("gsm8k_cott"))
    with pytest.raises(ProblemsError, match="'mmlu' is a group of tasks .* such as mmlu_humanities"):
        load_problems(config("mmlu"))


@needs_lm_eval
def test_a_metric_that_is_neither_right_nor_wrong_is_named() -> None:
    from dparallel.problems.lm_eval_tasks import _flag

    assert [_flag("a", "f1,none", value) for value in (1, 0.0, True)] == [True, False, True]
    for value in (0.5, None, (1, 2), "x"):
        with pytest.raises(ProblemsError, match="the metric 'f1,none' of task='a' is .*neither 0 nor 1"):
            _flag("a", "f1,none", value)


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    with pytest.raises(
        ProblemsError, match=r"task='a_task' needs lm-eval.*pip install 'dparallel\[lm_eval\]'"
    ):
        load_problems(config("a_task"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": None}, "benchmark='lm_eval' needs task"),
        ({"task": "a b"}, "task: String should match"),
        ({"path": "a"}, "task names its data; give local files as data_files"),
        ({"sources": [{"path": "a"}]}, "give local files as data_files"),
        ({"seed": 1}, "seed=1: it draws count problems"),
        ({"num_fewshot": -1}, "num_fewshot: .*greater than or equal to 0"),
        ({"protocol": {"prompt": "{a}", "stops": ["b"]}}, "prompt, stops: with .* the task gives them; drop"),
        ({"chat": True}, r"chat: unknown key; did you mean 'protocol\.chat'"),
        ({"benchmark": "coins", "count": 1}, "with task: they belong to benchmark='lm_eval'"),
        ({"benchmark": "dataset", "task": None, "metric": "a", "sources": [{"path": "a"}]}, "with metric: "),
    ],
)
def test_settings_of_a_task_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**{"task": "gsm8k", **settings})


def test_the_scorer_is_that_of_the_task() -> None:
    assert config("gsm8k").protocol.scorers == ("lm_eval:gsm8k",)
    assert config("gsm8k", metric="exact_match,none").protocol.scorers == ("lm_eval:gsm8k:exact_match,none",)

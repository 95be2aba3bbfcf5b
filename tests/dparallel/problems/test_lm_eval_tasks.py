"""Tasks of lm-eval: its own requests are the reference. Without it most tests are skipped."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.base import ConfigError
from dparallel.problems.lm_eval_index import lm_eval_module, names, task_settings
from dparallel.problems.prompts import render_all
from dparallel.problems.registry import load_problems, problems_digest, protocol_of
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import ProblemsError
from dparallel.tiny.byte_level import LLADA, QWEN, byte_level
from tests.dparallel.problems.lm_eval_made import HAS_LM_EVAL, MARKS, ROWS, config, needs_lm_eval, own_task

if HAS_LM_EVAL:
    pytestmark = MARKS


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
        (
            {"task": "humaneval"},
            "task='humaneval' of lm-eval runs generated code without a sandbox: take our own protocol .* "
            "--protocol humaneval_llada",
        ),
        ({"task": "mbpp_plus_instruct"}, "--protocol mbpp_llada"),
        ({"task": "cruxeval_input"}, "without a sandbox, and there is no protocol of the same"),
        ({"task": "arc_easy"}, "is of the type multiple_choice, and only generate_until"),
        ({"task": "squadv2"}, "is written in Python"),
        ({"metric": "acc"}, "metric='acc' of task='gsm8k' is unknown; known: exact_match,strict-match, ex"),
        ({"num_fewshot": 3}, "reads the split 'train' for its examples, and data_files gives test: give t"),
        (
            {"data_files": {"train": "a"}},
            "reads the split 'test', and data_files gives train: give test: FILE",
        ),
        ({"data_files": {"test": "no.jsonl"}}, r"data_files: no\.jsonl: no such file"),
        ({"data_files": {}}, r"cannot be loaded .* splits of openai/gsm8k: data_files: \{test: FILE\}"),
        ({"data_files": {}, "num_fewshot": 1}, r"data_files: \{test: FILE, train: FILE\}"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(
    settings: dict[str, Any], message: str, files: dict[str, str]
) -> None:
    local = {"test": files["test"]}
    with pytest.raises(ProblemsError, match=message):
        load_problems(config(**{"num_fewshot": 0, "data_files": local, **settings}))


@needs_lm_eval
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"text": "a", "code": "b"}'],
            r"the columns of data_files \(.*own.jsonl has text, code\): give files",
        ),
        (['{"question": 5'], "own.jsonl, row 1: not JSON"),
        (['{"question": "a", "answer": "#### 1"}', "{]"], "own.jsonl, row 2: not JSON"),
        ([], "own.jsonl holds 0 rows"),
    ],
)
def test_files_that_do_not_fit_a_task_are_named(lines: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ProblemsError, match=message):
        load_problems(config(num_fewshot=0, data_files={"test": str(file)}))


@needs_lm_eval
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tset": "a.jsonl"}, "data_files gives tset, and task='gsm8k' of lm-eval reads test: drop it"),
        ({"train": "LICENSE.txt"}, r"give files of one kind, named \.jsonl"),
        ({"train": "rows.parquet"}, "give files of one kind, JSON or Parquet"),
    ],
)
def test_files_of_other_splits_and_kinds_are_named(
    more: dict[str, str], message: str, files: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "LICENSE.txt").write_text("MIT", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with pytest.raises(ProblemsError, match=message):
        load_problems(config(num_fewshot=0, data_files={"test": files["test"], **more}))


@needs_lm_eval
def test_unknown_tasks_and_groups_name_others_without_importing_lm_eval(tmp_path: Path) -> None:
    script = """
import sys, time
from dparallel.problems.lm_eval_index import names, task_settings, task_settings
from dparallel.problems.sources import Problem, ProblemsError
for name in ("gsm8k_cott", "mmlu", "math_word_problems", "RC_tasks"):
    try:
        task_settings(name)
    except ProblemsError as error:
        print(error)
assert "lm_eval" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    unknown, mmlu, words, reading = done.stdout.splitlines()
    assert unknown.startswith("unknown task='gsm8k_cott' of lm-eval; did you mean 'gsm8k_cot' or ")
    for group, line in {"mmlu": mmlu, "math_word_problems": words, "RC_tasks": reading}.items():
        assert line.startswith(
            f"task={group!r} is a group of tasks of lm-eval: name one of its tasks, such as "
        )


@needs_lm_eval
def test_the_names_are_those_of_lm_evals_own_index() -> None:
    from lm_eval.tasks import TaskManager

    everything, found = TaskManager(), names()
    files = {name: str(everything.task_index[name].yaml_path) for name in everything.all_subtasks}
    assert found.tasks == files
    assert set(found.groups) == set(everything.all_groups)
    assert set(found.tags) >= set(everything.all_tags)


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    task_settings.cache_clear()
    names.cache_clear()
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    with pytest.raises(
        ProblemsError, match=r"task='a_task': .* needs lm-eval.*pip install 'dparallel\[lm-eval\]'"
    ):
        load_problems(config("a_task"))


@pytest.fixture
def made_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `lm_eval` that lacks another package; the folder of its tasks."""
    tasks = tmp_path / "lm_eval" / "tasks"
    (tasks / "sums").mkdir(parents=True)
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tasks / "__init__.py").write_text("import lxml_that_is_missing\n", encoding="utf-8")
    for name in ("one", "two", "three"):
        (tasks / "sums" / f"{name}.yaml").write_text(f"task: sum_{name}\n", encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    caches = (task_settings, names)
    for cached in caches:
        cached.cache_clear()
    yield tasks
    for cached in caches:
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["tasks", "api.registry", "no_such_module"])
def test_a_package_that_lm_eval_lacks_is_named_with_the_remedy(made_lm_eval: Path, module: str) -> None:
    missing = "lxml_that_is_missing" if module == "tasks" else "lm_eval."
    with pytest.raises(
        ProblemsError, match=rf"lm-eval cannot be imported .*{missing}.*pip install 'dparallel\[lm-eval\]'$"
    ):
        lm_eval_module(module)


def test_what_lm_eval_lacks_is_an_error_of_the_task(made_lm_eval: Path) -> None:
    with pytest.raises(
        ProblemsError, match="^task='sum_one': lm-eval cannot be imported .*lxml_that_is_missing"
    ):
        load_problems(config("sum_one"))


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        ("[sum_one, sum_two]", "sum_one, sum_two"),
        ("sum_two", "sum_two"),
        ("\n  - task: sum_two\n    num_fewshot: 5\n  - sum_one", "sum_two, sum_one"),
        ("\n  - group: inner\n    task:\n      - task: sum_three\n      - sum_one", "sum_three, sum_one"),
        ("[more, sum_one]", "sum_two, sum_three, sum_one"),
        ("[group_of_all, sum_one]", "sum_one"),
        ("\n  - dataset_path: someone/sums\n    doc_to_text: !function utils.text\n  - sum_one", "sum_one"),
    ],
)
def test_the_tasks_that_a_group_lists_are_named(made_lm_eval: Path, listed: str, shown: str) -> None:
    (made_lm_eval / "groups").mkdir()
    for name, members in (("group_of_all", listed), ("more", "[sum_two, sum_three]")):
        file = made_lm_eval / "groups" / f"{name}.yaml"
        file.write_text(f"group: {name}\ntask: {members}\n", encoding="utf-8")
    with pytest.raises(ProblemsError, match=f"is a group of .*: name one of its tasks, such as {shown}$"):
        task_settings("group_of_all")


def test_a_group_of_tasks_without_names_says_so(made_lm_eval: Path) -> None:
    (made_lm_eval / "groups").mkdir()
    text = "group: unnamed\ntask:\n  - dataset_path: someone/sums\n"
    (made_lm_eval / "groups" / "unnamed.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ProblemsError, match="is a group of tasks of lm-eval without names: choose another"):
        task_settings("unnamed")


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

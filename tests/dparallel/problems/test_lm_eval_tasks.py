"""Tasks of lm-eval: its own requests and verdicts are the reference. Without it most tests are skipped."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dparallel.config.base import ConfigError
from dparallel.config.problems import ProblemsConfig
from dparallel.problems import lm_eval_data, lm_eval_tasks
from dparallel.problems.judging import score
from dparallel.problems.lm_eval_index import names, task_settings
from dparallel.problems.prompts import render_all
from dparallel.problems.registry import load_problems, problems_digest, protocol_of
from dparallel.problems.scoring import accuracy_metric, scorers_of
from dparallel.problems.sources import Problem, ProblemsError
from dparallel.problems.stops import cut
from dparallel.tiny.byte_level import LLADA, QWEN, byte_level
from tests.dparallel.problems.rows import DATA

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

    folders = [Path(tasks.__file__).parent / folder for folder in ("gsm8k", "minerva_math")]
    manager = tasks.TaskManager(include_path=list(map(str, folders)), include_defaults=False)
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
        (
            {"task": "humaneval"},
            "task='humaneval' of lm-eval runs generated code without a sandbox: take a p",
        ),
        ({"task": "mbpp_plus_instruct"}, "such as humaneval_llada or mbpp_llada"),
        ({"task": "cruxeval_input"}, "runs generated code without a sandbox"),
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


YAML = """
task: own
dataset_path: someone/sums
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ProblemsConfig]]:
    """Writes a task of one's own, with its rows; gives the settings of its problems."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("dparallel.problems.lm_eval_index._folder", lambda: tmp_path / "tasks")
    caches = (names, task_settings, lm_eval_data.open_task, lm_eval_tasks._binary)

    def write(yaml: str, answers: Sequence[str], code: str = "", **settings: Any) -> ProblemsConfig:
        for cached in caches:
            cached.cache_clear()
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / "own.yaml").write_text(YAML.lstrip() + yaml, encoding="utf-8")
        (tmp_path / "tasks" / "own_code.py").write_text(code, encoding="utf-8")
        rows = [{"question": f"Question {n}?", "answer": answer} for n, answer in enumerate(answers)]
        file = tmp_path / "own.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return config("own", num_fewshot=0, data_files={"test": str(file)}, **settings)

    yield write
    for cached in caches:
        cached.cache_clear()


EXACT = "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"


@needs_lm_eval
@pytest.mark.parametrize(
    ("yaml", "stops"),
    [
        ("", ("\n\n",)),
        ("generation_kwargs: {do_sample: false}\n", ("\n\n",)),
        ("generation_kwargs: {until: END}\n", ("END",)),
        ("generation_kwargs: {until: [END, '.']}\n", ("END", ".")),
        ("generation_kwargs: {until: []}\n", ()),
        ('fewshot_delimiter: "\\n---\\n"\n', ("\n---\n",)),
        ('fewshot_delimiter: "\\n---\\n"\ngeneration_kwargs: {temperature: 0}\n', ("\n---\n",)),
    ],
)
def test_stops_and_verdicts_are_lm_evals_also_where_a_task_names_no_stop(
    yaml: str, stops: tuple[str, ...], own: Callable[..., ProblemsConfig], tmp_path: Path
) -> None:
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
    from lm_eval.tasks import TaskManager

    asked = own(EXACT + yaml, ["2", "4"])
    version = scorers_of(asked.protocol)[0].version
    problems, rules = load_problems(asked), protocol_of(asked)
    [scorer] = scorers_of(rules)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": dict(asked.data_files)}}
    [task] = manager.load({"group": "g", "task": [{"task": "own", **data}]})["tasks"].values()
    task.build_all_requests()
    for request in task.instances:
        until = request.args[1]["until"]
        assert rules.stops == stops == tuple([until] if isinstance(until, str) else until)
    for reply in ("2\n\nNext question: 3+3?", "2ENDLESS", "2.", "2\n---\nmore", "2", "3"):
        for request in task.instances:
            until = handle_stop_sequences(request.args[1]["until"], eos=None)
            request.resps = [postprocess_generated_text(reply, until, None)]
        task.apply_filters()
        first = task.instances[0]
        expected = task.process_results(first.doc, [first.filtered_resps["none"]])["exact_match"]
        [verdict] = scorer.score(problems[:1], [cut(reply, rules.stops)])
        assert verdict.metrics == {"exact_match,none": bool(expected)}, reply
    assert scorer.version == version, "loading a task leaves the key of its verdicts as it is"


GRADED = """
def f1(doc, results):
    right, said = set(doc["answer"].split()), set(results[0].split())
    both = len(right & said)
    exact = float(doc["answer"] == results[0])
    return {"exact": exact, "f1": 2 * both / (len(right) + len(said)) if both else 0.0, "contains": exact}
"""
MEANS = "".join(
    f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in ("f1", "exact")
)
RESULTS = "process_results: !function own_code.f1\n"


@needs_lm_eval
@pytest.mark.parametrize("answers", [["a", "b", "the red fox"], ["a"] * 3])
def test_graded_metrics_are_left_out_before_anything_is_decoded(
    answers: list[str], own: Callable[..., ProblemsConfig], caplog: pytest.LogCaptureFixture
) -> None:
    asked = own(MEANS + RESULTS, answers, GRADED)
    problems, rules = load_problems(asked), protocol_of(asked)
    assert "left out 'f1,none' is 0." in caplog.text
    assert "the accuracy is exact,none" in caplog.text
    assert rules.scorers == ("lm_eval:own without f1,none",)
    assert accuracy_metric(rules) == "exact,none"
    [scorer] = scorers_of(rules)
    verdicts = scorer.score(problems[-1:] * 2, ["the fox", answers[-1]])
    assert [verdict.metrics for verdict in verdicts] == [{"exact,none": False}, {"exact,none": True}]
    chosen = own(MEANS + RESULTS, answers, GRADED, metric="exact,none")
    load_problems(chosen)
    assert [scorer.metrics for scorer in scorers_of(protocol_of(chosen))] == [("exact,none",)]


@needs_lm_eval
@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (
            MEANS,
            {"metric": "f1,none"},
            "metric='f1,none' of task='own' is not 0 or 1 for every .*: give metric: exact,none, or choose",
        ),
        (
            MEANS.splitlines(True)[0],
            {},
            r"task='own' of lm-eval has no metric that is 0 or 1 .*'f1,none' is 0\.\d+ for '.*' in row \d",
        ),
    ],
)
def test_a_task_without_a_metric_that_is_0_or_1_is_refused(
    metrics: str, settings: dict[str, Any], message: str, own: Callable[..., ProblemsConfig]
) -> None:
    with pytest.raises(ProblemsError, match=message):
        load_problems(own(metrics + RESULTS, ["a", "the red fox"], GRADED, **settings))


@needs_lm_eval
def test_metrics_are_tried_on_the_selected_rows_and_for_a_bounded_time(
    own: Callable[..., ProblemsConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def f1(doc, results):\n    return {'exact': 0.5 if doc['answer'] == 'odd' else 0.0}\n"
    yaml = MEANS.splitlines(True)[1] + RESULTS
    answers = ["a"] * 40 + ["odd"] + ["a"] * 9
    with pytest.raises(ProblemsError, match="'exact,none' is 0.5 for '' in row 41"):
        load_problems(own(yaml, answers, code))
    assert len(load_problems(own(yaml, answers, code, rows="[:40]"))) == 40
    monkeypatch.setattr(lm_eval_tasks, "PROBE_SECONDS", 0.0)
    assert len(load_problems(own(yaml, answers, code))) == 50
    broken = "def f1(doc, results):\n    raise KeyError('span')\n"
    monkeypatch.setattr(lm_eval_tasks, "PROBE_SECONDS", 3.0)
    with pytest.raises(ProblemsError, match="cannot judge the response '' to row 1 .KeyError: 'span'."):
        load_problems(own(yaml, answers, broken))


@needs_lm_eval
def test_metrics_that_do_not_compare_with_the_target_are_tried_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target of drop is the names of its answer's columns; its metrics compare with the texts in them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    empty = {"number": "", "date": {"day": "", "month": "", "year": ""}, "worker_id": "", "hit_id": ""}
    row = {
        "section_id": "s",
        "query_id": "q",
        "passage": "A fox and a dog.",
        "question": "Who?",
        "answer": {**empty, "spans": ["the red fox"]},
        "validated_answers": {name: [] for name in ("number", "date", "spans", "worker_id", "hit_id")},
    }
    (tmp_path / "drop.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    asked = config("drop", num_fewshot=0, data_files={"validation": str(tmp_path / "drop.jsonl")})
    [problem], rules = load_problems(asked), protocol_of(asked)
    assert rules.scorers == ("lm_eval:drop without f1,none",)
    verdicts = score([problem] * 3, ["the red fox", "red", ""], rules)
    assert [verdict.metrics["em,none"] for verdict in verdicts] == [True, False, False]


def test_a_value_that_turns_out_graded_names_its_metric() -> None:
    assert [lm_eval_tasks.flag(value) for value in (1, 0.0, True)] == [True, False, True]
    for value in (0.5, None, (1, 2), "x", float("nan")):
        assert lm_eval_tasks.flag(value) is None
        verdict = lm_eval_tasks.verdict_of("a", {"em,none": 1, "f1,none": value})
        assert verdict.metrics == {"em,none": True, "f1,none": None}
        assert verdict.note == f"the metric 'f1,none' is {value!r}, neither 0 nor 1"
        with pytest.raises(
            ProblemsError,
            match="the metric 'f1,none' of task='a' is .*neither 0 nor 1: give metric: em,none, or choose",
        ):
            lm_eval_tasks.verdict_of("a", {"f1,none": value, "em,none": 1})
        with pytest.raises(ProblemsError, match="neither 0 nor 1: choose another task"):
            lm_eval_tasks.verdict_of("a", {"f1,none": value})


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    task_settings.cache_clear()
    names.cache_clear()
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    with pytest.raises(
        ProblemsError, match=r"task='a_task': .* needs lm-eval.*pip install 'dparallel\[lm_eval\]'"
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


def answers_of(problem: Problem) -> list[str]:
    """Right, wrong and doubtful responses to a problem."""
    reference = problem.reference or ""
    answer = reference.rpartition("#### ")[2] or reference
    return [
        reference,
        f"The answer is {answer}.",
        f"The answer is {answer}",
        f"#### {answer}\n#### 5",
        rf"so $\boxed{{{answer}}}$",
        f"Final Answer: The final answer is ${answer}$. I hope it is correct.",
        f"${answer}.00, that is 7",
        "",
        "-" * 300,
        "1,000,000 \\frac{",
    ]


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "shots", "rows"),
    [("gsm8k_cot_zeroshot", 0, "gsm8k"), ("gsm8k", 2, "gsm8k"), ("minerva_math500", 0, "math500")],
)
def test_verdicts_are_those_of_lm_evals_own_evaluation(
    name: str, shots: int, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts for the same rows: lm-eval's evaluation of a model that says them, and our judging."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = (DATA / f"{rows}.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    data = {}
    for split, copies in {"test": 10, "train": 1}.items():  # each row once for every response
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(line + "\n" for line in lines for _ in range(copies)), encoding="utf-8")
        data[split] = str(file)
    asked = config(name, num_fewshot=shots, data_files=data)
    problems, protocol = load_problems(asked), protocol_of(asked)
    responses = [answers_of(problem)[number % 10] for number, problem in enumerate(problems)]

    class Says(TemplateLM):
        eot_token_id = 0

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(string.encode())

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            assert [request.args[0] for request in requests] == [problem.prompt for problem in problems]
            return responses

    found = simple_evaluate(
        Says(), tasks=[own_task(name, shots, data)], log_samples=True, bootstrap_iters=0, num_fewshot=shots
    )
    verdicts = score(problems, responses, protocol)
    metrics = {metric for verdict in verdicts for metric in verdict.metrics}
    assert metrics == {key for key in found["results"][name] if "," in key and "stderr" not in key}
    for metric in metrics:
        measured, _, part = metric.partition(",")
        samples = [sample for sample in found["samples"][name] if sample["filter"] == part]
        theirs = {sample["doc_id"]: bool(sample[measured]) for sample in samples}
        ours = [verdict.metrics[metric] for verdict in verdicts]
        assert ours == [theirs[number] for number in range(len(problems))], metric
        assert found["results"][name][metric] == pytest.approx(sum(map(bool, ours)) / len(ours))
        assert set(ours) == {True, False}, metric

"""Tasks of lm-eval (lm-evaluation-harness): its prompts, stop texts, filters and metrics, our decoding.

lm-eval is optional: `pip install 'dparallel[lm-eval]'`. Tested with 0.4.13.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dparallel.config.problems import LM_EVAL, ProblemsConfig
from dparallel.config.protocol import ProtocolConfig
from dparallel.problems.lm_eval_data import open_task
from dparallel.problems.lm_eval_metrics import reference_of
from dparallel.problems.lm_eval_probing import usable_scorer
from dparallel.problems.sources import Problem, ProblemsError, json_value, selected

EXAMPLE_SEED = 1234  # lm-eval's default seed of few-shot examples


def protocol_of_task(config: ProblemsConfig) -> ProtocolConfig:
    """The protocol of `config` with the stop texts of its task, and the scorer of its metrics.

    Stop texts are those of lm-eval's own requests: for a task that names none, the text between its examples.
    The system text is a part of the problems, since lm-eval joins it with the task's description.

    Raises:
        ProblemsError: as `task_problems`.
    """
    task = _task_of(config)
    until = (task.config.generation_kwargs or {}).get("until") or []
    stops = [until] if isinstance(until, str) else until
    return config.protocol.model_copy(
        update={
            "stops": tuple(dict.fromkeys(filter(None, stops))),
            "system": None,
            "scorers": (_usable_scorer(config, task),),
        }
    )


def task_problems(config: ProblemsConfig) -> list[Problem]:
    """The selected problems of a task of lm-eval, as its own requests ask them.

    Raises:
        ProblemsError: lm-eval is missing; the task is unknown or cannot be used; the data cannot be read,
            lack a split or do not fit the task; or no metric can be the accuracy.
    """
    task = _task_of(config)
    task.set_fewshot_seed(EXAMPLE_SEED)
    given = {"task": config.task, "num_fewshot": config.num_fewshot, "data_files": dict(config.data_files)}
    numbers = _rows(config, task)
    chosen, last = set(numbers), max(numbers)
    problems = []
    for number, doc in enumerate(task.eval_docs):
        if number > last:
            break
        with _row_of(config, number):
            asked = _asked(task, doc, config.protocol)  # examples are drawn anew for every row
        if number in chosen:
            problems.append(
                Problem(
                    problem_id=f"{config.task}-{number + 1:05d}",
                    source=f"lm_eval {config.task}",
                    reference=reference_of(task, doc),
                    extra={
                        "doc": json_value(f"{config.task}, row {number + 1}", "doc", dict(doc)),
                        LM_EVAL: given,
                    },
                    **asked,
                )
            )
    _usable_scorer(config, task)
    return problems


def _task_of(config: ProblemsConfig) -> Any:
    assert config.task is not None
    return open_task(config.task, config.num_fewshot, tuple(config.data_files.items()))


def _rows(config: ProblemsConfig, task: Any) -> list[int]:
    """The numbers of the selected rows."""
    return list(selected(range(len(task.eval_docs)), config, f"lm_eval {config.task}"))


@contextmanager
def _row_of(config: ProblemsConfig, number: int) -> Iterator[None]:
    """Errors of a task, which is a program of its own, name the row."""
    try:
        yield
    except Exception as error:
        raise ProblemsError(
            f"task={config.task!r} of lm-eval cannot ask row {number + 1} of its data "
            f"({type(error).__name__}: {error}): correct the row or leave it out"
        ) from error


def _asked(task: Any, doc: dict[str, Any], protocol: ProtocolConfig) -> dict[str, Any]:
    """Prompt, prefill and preceding turns of a problem."""
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        system_instruction=protocol.system,
        apply_chat_template=protocol.chat,
        fewshot_as_multiturn=protocol.examples_as == "turns",
        chat_template=_turns if protocol.chat else None,
        gen_prefix=task.doc_to_prefix(doc),
    )
    if not protocol.chat:
        return {"prompt": context}
    *turns, (role, text) = context
    prefill = ""
    if role == "assistant":
        prefill = text
        *turns, (_, text) = turns
    return {"prompt": text, "prefill": prefill, "turns": tuple(turns)}


def _turns(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[tuple[str, str]]:
    """Takes the place of a chat template: the turns as they are."""
    return [(message["role"], message["content"]) for message in messages]


def _usable_scorer(config: ProblemsConfig, task: Any) -> str:
    """The name of the task's scorer, with what is found about its metrics."""
    [name] = config.protocol.scorers
    return usable_scorer(
        name, config.num_fewshot, tuple(config.data_files.items()), tuple(_rows(config, task))
    )

import json
from pathlib import Path

import pytest

from dparallel.config.problems import ProblemsConfig, ProtocolConfig
from dparallel.problems.judging import score
from dparallel.problems.registry import check_disjoint, load_problems, problems_digest
from dparallel.problems.sources import Problem, ProblemsError
from tests.dparallel.evaluation.oracle import dataset


def judge(config: ProblemsConfig, problem: Problem, response: str) -> dict[str, bool | None]:
    [verdict] = score([problem], [response], config.protocol)
    return verdict.metrics


def test_coins_references_are_right_and_wrong_numbers_are_not() -> None:
    config = ProblemsConfig(benchmark="coins", split="validation", count=20, seed=3)
    problems = load_problems(config)
    assert len({problem.problem_id for problem in problems}) == 20
    for problem in problems:
        assert problem.reference is not None
        assert judge(config, problem, problem.reference) == {"solution": True, "answer": True}
        *steps, answer = problem.reference.split()
        wrong_answer = " ".join([*steps, str((int(answer) + 1) % 10)])
        assert judge(config, problem, wrong_answer) == {"solution": False, "answer": False}
        assert judge(config, problem, f"#### {answer}") == {"solution": False, "answer": True}


def test_problems_are_the_same_every_time_and_others_for_another_seed() -> None:
    config = ProblemsConfig(benchmark="coins", count=10)
    assert load_problems(config) == load_problems(config)
    other = load_problems(config.model_copy(update={"seed": 1}))
    assert problems_digest(other) != problems_digest(load_problems(config))


def test_a_data_set_is_scored_as_its_config_says(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "reference": " 7 apples #### 7"}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    by_text = dataset(tmp_path / "p.jsonl")
    by_number = by_text.model_copy(update={"protocol": ProtocolConfig(scorers=("flexible_extract",))})
    known, unknown = load_problems(by_number)
    assert judge(by_text, known, "7 apples #### 7\n") == {"exact": True}
    assert judge(by_text, known, "it is 7") == {"exact": False}
    assert judge(by_number, known, "it is 7") == {"flexible_extract": True}
    assert judge(by_number, unknown, "it is 7") == {"flexible_extract": None}


def test_a_reference_without_a_number_cannot_be_scored_by_number(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "reference": "one half"}\n', encoding="utf-8")
    config = dataset(tmp_path / "p.jsonl").model_copy(
        update={"protocol": ProtocolConfig(scorers=("flexible_extract",))}
    )
    with pytest.raises(ProblemsError, match=r"p-00001 .*compares numbers, .* ends in 'one half'"):
        load_problems(config)


def problems(*prompts: str) -> list[Problem]:
    return [Problem(f"p-{index}", "somewhere", prompt) for index, prompt in enumerate(prompts)]


def test_sets_that_share_a_prompt_are_both_named() -> None:
    sets = {"trajectories": problems("a", "b"), "validation": problems("c"), "test": problems("d", "d")}
    check_disjoint(sets)
    with pytest.raises(ProblemsError, match="^trajectories and test share 1 prompts, such as 'b'"):
        check_disjoint({**sets, "test": problems("d", "b")})
    with pytest.raises(ProblemsError, match="^validation and test share 1 prompts, such as 'c'"):
        check_disjoint({**sets, "test": problems("c")})


def test_every_split_of_coins_has_its_own_problems() -> None:
    splits = ("train", "distillation", "validation", "test")
    check_disjoint(
        {split: load_problems(ProblemsConfig(benchmark="coins", split=split, count=300)) for split in splits}
    )

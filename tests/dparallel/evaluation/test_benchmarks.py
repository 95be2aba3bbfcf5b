import json
from pathlib import Path

import pytest

from dparallel.config import ProblemsConfig
from dparallel.evaluation.benchmarks import (
    Problem,
    ProblemsError,
    Score,
    check_disjoint,
    load_problems,
    problems_digest,
    score,
)


def jsonl(path: Path, *lines: object) -> ProblemsConfig:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return ProblemsConfig(benchmark="jsonl", path=str(path))


def test_coins_references_are_right_and_wrong_numbers_are_not() -> None:
    config = ProblemsConfig(benchmark="coins", split="validation", count=20, seed=3)
    problems = load_problems(config)
    assert len({problem.problem_id for problem in problems}) == 20
    for problem in problems:
        assert problem.reference is not None
        assert score(config, problem, problem.reference) == Score(solution=True, answer=True)
        *steps, answer = problem.reference.split()
        wrong_answer = " ".join([*steps, str((int(answer) + 1) % 10)])
        assert score(config, problem, wrong_answer) == Score(solution=False, answer=False)
        assert score(config, problem, f"#### {answer}") == Score(solution=False, answer=True)


def test_problems_are_the_same_every_time_and_others_for_another_seed() -> None:
    config = ProblemsConfig(benchmark="coins", count=10)
    assert load_problems(config) == load_problems(config)
    other = load_problems(config.model_copy(update={"seed": 1}))
    assert problems_digest(other) != problems_digest(load_problems(config))


def test_jsonl_scores_exact_text_and_keeps_what_is_unknown(tmp_path: Path) -> None:
    config = jsonl(tmp_path / "p.jsonl", {"prompt": "a", "reference": " b "}, "", {"prompt": "c"})
    known, unknown = load_problems(config)
    assert (known.problem_id, unknown.problem_id) == ("p-00001", "p-00003")
    assert score(config, known, "b\n") == Score(solution=True, answer=None)
    assert score(config, known, "B") == Score(solution=False, answer=None)
    assert score(config, unknown, "anything") == Score(solution=None, answer=None)


def test_jsonl_reads_the_fields_it_is_told(tmp_path: Path) -> None:
    jsonl(tmp_path / "p.jsonl", {"q": "one", "a": "1"}, {"q": "two", "a": "2"})
    config = ProblemsConfig(
        benchmark="jsonl", path=str(tmp_path / "p.jsonl"), prompt_field="q", reference_field="a", count=1
    )
    (problem,) = load_problems(config)
    assert (problem.prompt, problem.reference) == ("one", "1")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds 0 problems"),
        (["", "  "], "holds 0 problems"),
        ([{"prompt": "a"}, '{"prompt": '], "line 2: not JSON"),
        (["[1]"], "line 1: holds list, expected an object"),
        ([{"question": "a", "answer": "b"}], "line 1: prompt_field='prompt'.*its fields: answer, question"),
        ([{"prompt": 3}], "line 1: prompt_field='prompt' is not a text"),
        ([{"prompt": " "}], "line 1: prompt_field='prompt' is not a text"),
        ([{"prompt": "a", "reference": 3}], "line 1: reference_field='reference' holds 3"),
    ],
)
def test_bad_jsonl_is_named(tmp_path: Path, lines: list, message: str) -> None:
    config = jsonl(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(ProblemsError, match=message) as raised:
        load_problems(config)
    assert "bad.jsonl" in str(raised.value)


def test_a_reference_field_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    config = jsonl(tmp_path / "p.jsonl", {"prompt": "a", "answer": "b"})
    with pytest.raises(ProblemsError, match="no reference_field='anwser'; its fields: answer, prompt"):
        load_problems(config.model_copy(update={"reference_field": "anwser"}))


def test_fewer_problems_than_wanted_is_an_error(tmp_path: Path) -> None:
    config = jsonl(tmp_path / "p.jsonl", {"prompt": "a"})
    with pytest.raises(ProblemsError, match="holds 1 problems, wanted 2"):
        load_problems(config.model_copy(update={"count": 2}))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ProblemsError, match=r"nowhere\.jsonl: no such problems file"):
        load_problems(ProblemsConfig(benchmark="jsonl", path="nowhere.jsonl"))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x01", b"\x00\x01\x02", '{"prompt": "é"}'.encode("latin-1")]
)
def test_a_file_that_is_not_text_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(ProblemsError, match=r"weights\.bin.*: not (a text file|JSON)"):
        load_problems(ProblemsConfig(benchmark="jsonl", path=str(tmp_path / "weights.bin")))


def problems(*prompts: str) -> list[Problem]:
    return [Problem(f"p-{index}", "somewhere", prompt, None) for index, prompt in enumerate(prompts)]


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

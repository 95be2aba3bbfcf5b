"""Names of flow runs, tags and keys of artifacts: those of different experiments differ."""

import re
from pathlib import Path
from typing import Any

from flows.environment import flow

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect import get_client, runtime

from flows.names import experiment_of, flow_run_name, name_of, title_of
from tasks.labels import artifact_key, tag_stage

SNAPSHOT = {"config": "some/file.yaml", "settings": {"name": "sums"}, "overrides": ["name=sums", "seed=3"]}
SNAPSHOT_ALONE = {"config": SNAPSHOT | {"overrides": []}}


@pytest.mark.parametrize(
    ("flow_name", "parameters", "expected"),
    [
        ("distill", {"config": "configs/tiny.yaml"}, "tiny: distill"),
        ("distill", {"config": "configs/tiny.yaml", "overrides": ["name=short"]}, "short: distill"),
        (
            "distill",
            {
                "config": "configs/tiny.yaml",
                "overrides": ["runs=x", "training.seed=1", "name=a", "name=b"],
            },
            "b: distill (seed=1)",
        ),
        ("training", {"config": SNAPSHOT, "student": "fast"}, "sums: training fast (seed=3)"),
        (
            "training",
            {"config": SNAPSHOT, "overrides": ["x=1"], "student": None},
            "sums: training (seed=3, x=1)",
        ),
        (
            "benchmark",
            {"config": SNAPSHOT | {"overrides": []}, "benchmark": "gsm8k"},
            "sums: benchmark gsm8k",
        ),
        ("distill", {"config": "table1_llada.yaml"}, "table1_llada: distill"),  # comes with the package
        ("distill", {"config": "configs/tiny.yaml", "overrides": ["name=[", "x=1"]}, "tiny: distill (x=1)"),
        ("distill", {"config": "absent/file.yaml"}, "file: distill"),
        ("distill", {"config": 5, "overrides": None}, "5: distill"),
        ("distill", {}, "None: distill"),
        ("distill", {"config": SNAPSHOT_ALONE["config"] | {"overrides": 5}}, "sums: distill"),
        ("distill", {"config": SNAPSHOT_ALONE["config"] | {"overrides": "abc"}}, "sums: distill"),
        ("distill", {"config": "configs/tiny.yaml", "settings": "abc", "overrides": "abc"}, "tiny: distill"),
        ("distill", {"config": "configs/tiny.yaml", "overrides": ["name="]}, "tiny: distill"),
        ("distill", {"config": "a\0b.yaml"}, "a?b: distill"),
        ("distill", {"config": "~a\0b"}, "~a?b: distill"),
        ("distill", {"config": "\ud800.yaml"}, "?: distill"),
        (
            "distill",
            {"config": "configs/tiny.yaml", "settings": {"students": {"a.b": {"region": "block"}}}},
            'tiny: distill (region="block")',
        ),
    ],
)
def test_names(flow_name: str, parameters: dict[str, Any], expected: str) -> None:
    assert name_of(flow_name, parameters) == expected


texts = st.text(st.characters(exclude_categories=()), max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
parts = st.fixed_dictionaries({}, optional={"name": anything, "seed": anything, "overrides": anything})
configs = anything | st.fixed_dictionaries({}, optional={"settings": parts | anything, "overrides": anything})


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "config": configs,
            "settings": parts | anything,
            "overrides": anything,
            "student": anything,
            "benchmark": anything,
        },
    )
)
def test_names_never_fail(parameters: dict[str, Any]) -> None:
    for text in (name_of("distill", parameters), title_of("distill", parameters), experiment_of(parameters)):
        assert "\0" not in text
        text.encode("utf-8")


def test_titles_are_without_what_was_overridden() -> None:
    assert title_of("measurements", {"config": SNAPSHOT, "benchmark": "gsm8k"}) == "sums: measurements gsm8k"


def test_long_names_are_cut() -> None:
    overrides = [f"training.key{number}=1" for number in range(10, 99)]
    name = name_of("distill", {"config": "a.yaml", "overrides": overrides})
    assert name == "a: distill (key10=1, key11=1, key12=1, 86 more)"


def test_a_file_without_a_name_or_that_is_no_yaml_lends_its_own(tmp_path: Path) -> None:
    for text in ("seed: 1", "[", "just text", "name: ''"):
        (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
        assert experiment_of({"config": str(tmp_path / "own.yaml")}) == "own"


def test_a_file_outside_of_the_roots_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "own.yaml").write_text("name: secret", encoding="utf-8")
    assert experiment_of({"config": str(tmp_path / "own.yaml")}) == "secret"
    monkeypatch.setenv("DPARALLEL_ROOTS", str(tmp_path / "inside"))
    assert experiment_of({"config": str(tmp_path / "own.yaml")}) == "own"


def test_keys_of_artifacts_tell_experiments_apart() -> None:
    assert artifact_key("tiny", "training fast") == "tiny-training-fast"
    assert artifact_key("tiny", "training trajectory_ordered") == "tiny-training-trajectory--ordered"
    alike = ("exp_a", "exp-a", "exp--a", "Exp-a", "exp a", "exp.a", "exp_a_", "_exp_a", "expä", "exp")
    keys = {artifact_key(name, "distill") for name in alike}
    assert len(keys) == len(alike)
    assert all(re.fullmatch("[a-z0-9]+(-+[a-z0-9]+)*", key) for key in keys)


@flow("training", flow_run_name)
def training(config: str, student: str | None = None) -> tuple[str, Any]:
    tag_stage("training", "sums", student=student, benchmark=None)
    tag_stage("merging", "sums", student="another")  # a stage within the flow run of another one
    return runtime.flow_run.name, runtime.flow_run.id


def test_a_flow_run_is_named_tagged_and_versioned(prefect_server: None) -> None:
    name, run_id = training("configs/tiny.yaml", "fast")
    assert name == "tiny: training fast"
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    assert run.name == name
    assert set(run.tags) == {"experiment:sums", "student:fast"}
    assert training.version is not None
    assert training.version.startswith("0.")

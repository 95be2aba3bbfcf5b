"""Where results may lie: `runs` on this machine, `store` anywhere, credentials nowhere in a config."""

from pathlib import Path

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config, with_inputs
from dparallel.config.paths import shipped_configs
from dparallel.config.teacher import TeacherConfig

TINY = "tiny.yaml"


@pytest.mark.parametrize("url", ["s3://bucket/exp", "gs://bucket", "file:///mnt/store"])
def test_urls_of_stores(url: str) -> None:
    assert load_config(DistillConfig, TINY, [f"store={url}/"]).store == url


def test_a_folder_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tiny = (shipped_configs() / TINY).read_text(encoding="utf-8")
    (tmp_path / "a" / "own.yaml").write_text(f"{tiny}\nstore: ../store\n", encoding="utf-8")
    assert load_config(DistillConfig, tmp_path / "a" / "own.yaml").store == str(tmp_path / "store")
    assert load_config(DistillConfig, TINY, ["store=here"]).store == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "runs=s3://bucket/exp",
            "runs: 's3://bucket/exp' is a URL.*set store: s3://bucket/exp, and leave runs",
        ),
        ("store=s3://", "must name a bucket or folder"),
        ("store=s3://bucket?endpoint=x", "options are set in the environment"),
        ("store=ftp://host/a", "no store is known for ftp://; valid: a folder, file://, gs://, s3://"),
        ("teacher=http://host/model", "no store is known for http://"),
        ("launch.hostfile=s3://bucket/hosts", "launch.hostfile: 's3://bucket/hosts' is a URL: give a path"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(DistillConfig, TINY, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["store", "teacher", "runs"])
def test_credentials_are_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DistillConfig, TINY, [f"{key}=s3://user:secret@bucket/a"])
    assert "secret" not in str(error.value)
    assert key == "runs" or "give credentials in the environment" in str(error.value)


def test_the_folder_of_a_teacher_that_is_trained_is_on_this_machine() -> None:
    with pytest.raises(ConfigError, match="out: 's3://bucket/tiny' is a URL"):
        load_config(TeacherConfig, "tiny_teacher.yaml", ["out=s3://bucket/tiny"])


def test_the_paths_of_inputs_are_changed_and_no_names() -> None:
    source = {"path": "a.jsonl", "reference": "answer"}
    settings = {
        "teacher": "t",
        "runs": "r",
        "store": "s",
        "trajectories": {
            "problems": {"sources": [source], "protocol": {"chat_template": "c", "data": [source]}}
        },
        "students": {"model": {"path": 1}, "path": "recipe"},
        "benchmarks": {
            "model": {
                "test": {"data_files": {"test": "d.json"}},
                "baselines": {"path": {"model": "m"}},
                "student_sweeps": {"model": ["path"]},
            }
        },
    }
    seen: list[tuple[str, str]] = []

    def change(key: str, path: str) -> str:
        seen.append((key, path))
        return f"changed {path}"

    changed = with_inputs(settings, change)
    assert sorted(seen) == [
        ("chat_template", "c"),
        ("data_files", "d.json"),
        ("model", "m"),
        ("path", "a.jsonl"),
        ("path", "a.jsonl"),
        ("teacher", "t"),
    ]
    assert changed["students"] == settings["students"]
    assert changed["benchmarks"]["model"]["test"]["data_files"] == {"test": "changed d.json"}
    assert (changed["runs"], changed["store"]) == ("r", "s")

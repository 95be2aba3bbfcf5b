"""Paths of runs on a worker stay inside the folders that it allows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.config.paths import DEEPSPEED_FILES
from dparallel.config.protocol import FileConfig
from dparallel.config.roots import ROOTS, check_inside_roots, check_path
from dparallel.config.sources import SourceConfig
from dparallel.distillation.settings import DeepSpeedSettings
from dparallel.problems.folders import read_folder
from dparallel.problems.tables import TableError
from tasks.checks import checked_experiment, checked_teacher

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(ROOTS, f"{tmp_path / 'inside'}, s3://bucket/ours")
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


def tiny(*overrides: str) -> DistillConfig:
    return load_config(DistillConfig, str(CONFIGS / "tiny.yaml"), list(overrides))


@pytest.mark.parametrize(
    "override",
    [
        "runs=runs",
        "runs={0}/inside/a/../b",
        "teacher=somebody/model-7B",
        "store=s3://bucket/ours/deep",
        "store={0}/inside/store",
        "store=file://{0}/inside/store",
        "training.deepspeed={{flops_profiler: {{enabled: true, output_file: flops.txt}}}}",
    ],
)
def test_what_lies_inside(override: str, roots: Path) -> None:
    check_inside_roots(tiny(override.format(roots)).model_dump(mode="json"))


@pytest.mark.parametrize(
    "override",
    [
        "runs={0}/outside",
        "runs={0}/inside/../outside",
        "runs={0}/inside/link/runs",
        "runs=..",
        "runs=/",
        "teacher={0}/outside/model",
        "teacher=../outside",
        "store={0}/outside",
        "store=s3://bucket/oursnot",
        "store=s3://other/ours",
        "store=file://{0}/outside",
        "store=file://{0}/inside/../outside",
        "store=file://{0}/inside/link",
    ],
)
def test_what_lies_outside(override: str, roots: Path) -> None:
    (roots / "inside" / "link").symlink_to(roots / "outside")
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}=.*outside of the folders .* add its folder to {ROOTS}"):
        check_inside_roots(tiny(override.format(roots)).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("problems.path", {"problems": {"path": "/outside/*.jsonl"}}),
        ("problems.path", {"problems": {"path": "/*/rows.jsonl"}}),
        ("problems.path", {"problems": {"path": "data/*/../../../outside/rows.jsonl"}}),
        ("runs", {"runs": "a[b]/../../outside"}),
        ("problems.sources.1.path", {"problems": {"sources": [{"path": "a.jsonl"}, {"path": "../b.jsonl"}]}}),
        ("problems.data_files.test", {"problems": {"data_files": {"test": "/outside/rows.jsonl"}}}),
        ("baselines.rival.model", {"baselines": {"rival": {"model": "/outside/rival"}}}),
        ("launch.hostfile", {"launch": {"hostfile": "/outside/hosts"}}),
        ("out", {"out": "/outside/teacher"}),
        (
            "training.deepspeed.flops_profiler.output_file",
            {"training": {"deepspeed": {"flops_profiler": {"output_file": "/outside/file"}}}},
        ),
        ("offload_param.nvme_path", {"offload_param": {"device": "nvme", "nvme_path": "../outside"}}),
        ("offload_optimizer.nvme_path", {"offload_optimizer": {"nvme_path": "/outside"}}),
    ],
)
def test_settings_at_any_depth(key: str, settings: dict[str, Any], roots: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}=.*outside of the folders"):
        check_inside_roots(settings)


def test_roots_may_be_urls_of_folders(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROOTS, f"file://{roots}/inside")
    for inside in (f"file://{roots}/inside/store", f"{roots}/inside", f"file://{roots}/inside"):
        check_path("store", inside)
    (roots / "inside" / "link").symlink_to(roots / "outside")
    for outside in (f"file://{roots}/inside/link", f"{roots}/inside/link/a", f"file://{roots}/insidenot"):
        with pytest.raises(ConfigError, match="outside of the folders"):
            check_path("store", outside)


def test_what_deepspeed_writes_is_known() -> None:
    """All its settings that look like a file or folder are checked."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero import config, offload_config

    models = [config.DeepSpeedZeroConfig, CommsLoggerConfig, DeepSpeedSettings]
    models += [offload_config.DeepSpeedZeroOffloadParamConfig]
    models += [offload_config.DeepSpeedZeroOffloadOptimizerConfig]
    names = {name for model in models for name in model.model_fields}
    names |= set(AIO_DEFAULT_DICT) | set(vars(DeepSpeedFlopsProfilerConfig({})))
    places = {name for name in names if re.search("file$|path|dir|folder", name)}
    assert places == set(DEEPSPEED_FILES)


@pytest.mark.parametrize("outside", ["/outside", "../outside", "a/../../outside", "..", "a\\..\\..\\b"])
def test_names_below_a_folder_do_not_lead_out_of_it(outside: str, tmp_path: Path) -> None:
    message = "leads out of its folder: give a name below it"
    with pytest.raises(ConfigError, match=f"subset: .*{message}"):
        SourceConfig(path="data", subset=outside)
    with pytest.raises(ConfigError, match=f"split: .*{message}"):
        SourceConfig(path="data", split=outside)
    with pytest.raises(ConfigError, match=f"names.0: .*{message}"):
        FileConfig(names=(outside,))
    (tmp_path / "data").mkdir()
    for entry in ({"data_dir": outside}, {"data_files": [{"split": "train", "path": f"{outside}/a.jsonl"}]}):
        card = json.dumps({"configs": [{"config_name": "default", **entry}]})
        (tmp_path / "data" / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
        with pytest.raises(TableError, match="which leads out of the folder"):
            read_folder(tmp_path / "data", None)


def test_config_files_and_those_that_they_include(roots: Path) -> None:
    secret = roots / "outside" / "own.yaml"
    secret.write_text("secret: value", encoding="utf-8")
    (roots / "inside" / "includes.yaml").write_text(f"training: {secret}", encoding="utf-8")
    for given in (
        lambda: checked_experiment(str(secret)),
        lambda: checked_teacher(str(secret)),
        lambda: checked_experiment("includes.yaml"),
        lambda: checked_experiment("tiny.yaml", [f"training={secret}"]),
    ):
        with pytest.raises(ConfigError, match="outside of the folders") as error:
            given()
        assert "value" not in str(error.value)
    load_config(DistillConfig, "tiny.yaml")  # which comes with the package


def test_without_the_variable_nothing_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", " , "):
        monkeypatch.setenv(ROOTS, value)
        check_inside_roots(tiny("runs=/anywhere").model_dump(mode="json"))

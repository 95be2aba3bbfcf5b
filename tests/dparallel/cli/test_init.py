"""`dparallel init`, and a package as it is installed from a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dparallel.cli.init import known_configs
from dparallel.cli.main import main
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config, read_settings
from dparallel.config.teacher import TeacherConfig
from dparallel.stages.manifest import fingerprint, read_manifest

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("source", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_the_copy_means_the_same_anywhere(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sub" / "mine.yaml"
    assert main(["init", str(file), "--from", source]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(file)
    if "teacher" not in read_settings(file):  # an embedded teacher's own settings
        return
    shipped = load_config(DistillConfig, CONFIGS / f"{source}.yaml")
    assert load_config(DistillConfig, file) == shipped.model_copy(update={"name": "mine"})
    text = file.read_text(encoding="utf-8")
    assert f"configs/{source}.yaml" not in text, "the commands in its header are those of the copy"
    assert "make demo" not in text
    assert "../" not in text
    original = (CONFIGS / f"{source}.yaml").read_text(encoding="utf-8")
    comments = [line for line in original.splitlines() if line.startswith("#")]
    kept = [line for line in text.splitlines()[3:] if line.startswith("#")]
    assert len(kept) == len(comments)
    changed = [line for line, old in zip(kept, comments, strict=True) if line != old]
    assert all("mine.yaml" in line for line in changed), "only commands"


def test_a_teacher_that_is_trained_lies_beside_the_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "sub/mine.yaml", "--from", "tiny_teacher"]) == 0
    assert "  python -m flows.teacher --config sub/mine.yaml" in capsys.readouterr().out
    assert load_config(TeacherConfig, "sub/mine.yaml").out == str(tmp_path / "sub" / "runs" / "mine")


def test_parts_are_copied_too_and_mistakes_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "recipe.yaml", "--from", "recipes/d2f"]) == 0
    assert read_settings("recipe.yaml") == read_settings(CONFIGS / "recipes" / "d2f.yaml")
    capsys.readouterr()
    for arguments, message in [
        (["recipe.yaml"], "recipe.yaml exists already"),
        (["a.yaml", "--from", "recipes/d2g"], "did you mean 'recipes/d2f'? known: dream_7b, "),
        (["a.txt"], "a.txt: name a config with the suffix .yaml"),
    ]:
        assert main(["init", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert {"tiny", "protocols/mbpp_dream", "benchmarks/coins"} <= set(known_configs())


@pytest.mark.slow
def test_an_installed_package_holds_all_it_needs(tmp_path: Path) -> None:
    """From a wheel, in a folder of its own: configs, recipes and teachers, and flows that use them."""
    pytest.importorskip("setuptools", minversion="77")
    skipped = shutil.ignore_patterns(".*", "runs", "mlflow.db*", "build", "tests", "docs", "__pycache__")
    shutil.copytree(ROOT, "source", ignore=skipped)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", "./source"]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    [wheel] = Path("wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall("site")
    Path("work").mkdir()
    site = tmp_path / "site"

    def run(*module_and_arguments: str) -> str:
        """Output of a module of the wheel, and not of this clone, run in the folder `work`."""
        ran = subprocess.run(
            [sys.executable, "-m", *module_and_arguments],
            cwd="work",
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            encoding="utf-8",
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    run("dparallel", "init", "mine.yaml")
    run("dparallel", "init", "recipes/certainty_forcing.yaml", "--from", "recipes/consistency")
    settings = ["trajectories.problems.count=2", "trajectories.decoding.steps=18"]
    folder = run("flows.trajectories", "--config", "mine.yaml", "--set", *settings).splitlines()[-1]
    manifest = read_manifest(tmp_path / "work" / folder)
    assert manifest.inputs == {"teacher": fingerprint(site / "dparallel" / "teachers" / "tiny")}
    plan = load_config(DistillConfig, tmp_path / "work" / "mine.yaml")
    assert plan.students["certainty_forcing"] == plan.students["consistency"]

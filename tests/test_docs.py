"""Snippets in README and docs are run: Python and shell blocks completely, other commands are parsed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dparallel.cli.parser import build_parser
from dparallel.completion import complete
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import load_config
from dparallel.config.protocol import ProtocolConfig
from dparallel.config.teacher import TeacherConfig
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.problems import coins, ledger
from dparallel.problems.embedded import NAMES, answer_is_right
from dparallel.problems.scoring import scorers_of
from tests import rule_tables

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("operations", "benchmarks", "serving", "extending")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_HERE = ("FILE", "CONFIG", "ID")  # placeholders for the reader's own values


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of an unmarked block: its page and its words."""
    for page in PAGES:
        for line in "".join(blocks(page, "")).splitlines():
            words = shlex.split(line.replace("…", ""), comments=True)
            if words:
                yield page.name, words


def folder_with_the_clone(folder: Path) -> Path:
    """A folder in which the pages' relative paths work, and in which the clone is not writable."""
    for name in ("configs", "teachers"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(arguments: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_files_of(page: Path, folder: Path) -> None:
    """The YAML and JSON blocks of a page are files named in their first lines."""
    for language in ("yaml", "json"):
        for block in blocks(page, language):
            name = block.split("\n", 1)[0].lstrip("#/ ")
            body = block if language == "yaml" else block.split("\n", 1)[1]
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(body, encoding="utf-8")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_snippets_run(page: Path, tmp_path: Path) -> None:
    """A page is one namespace."""
    folder = folder_with_the_clone(tmp_path)
    write_files_of(page, folder)
    script = folder / "snippets.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    output = run([sys.executable, str(script)], folder)
    if page.name == "README.md":
        assert "answer #### 9 " in output  # 7 + 2 - 1 + 1


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_shell_snippets_run(page: Path, tmp_path: Path) -> None:
    folder = folder_with_the_clone(tmp_path)
    write_files_of(page, folder)
    for block in blocks(page, "sh"):
        run(["bash", "-euo", "pipefail", "-c", block], folder)


def test_the_experiment_on_operations_is_whole(tmp_path: Path) -> None:
    page = ROOT / "docs" / "operations.md"
    write_files_of(page, tmp_path)  # in any folder, without the clone
    settings = load_config(DistillConfig, tmp_path / "own.yaml")
    assert settings.benchmarks["own"].test.protocol == settings.trajectories.problems.protocol
    section = DistillConfig.model_fields["benchmarks"].annotation.__args__[1]
    required = {name for name, field in section.model_fields.items() if field.is_required()}
    assert required == {"test", "reference"}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for _, words in commands() if words[0] == "make"}
    assert named
    assert named <= targets


def test_flows_have_the_options_and_settings_that_the_pages_give_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    shown = [
        words for _, words in commands() if words[:2] == ["python", "-m"] and words[2].startswith("flows.")
    ]
    assert len(shown) > 5
    for words in shown:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words
        options = words[3:]
        if words[2] == "flows.worker":  # has the options of `prefect worker start`
            assert set(options[::2]) <= {"--pool", "--type", "--limit", "--name"}, words
            continue
        config = options[options.index("--config") + 1]
        overrides = options[options.index("--set") + 1 :] if "--set" in options else []
        if config not in NOT_HERE:
            model = TeacherConfig if words[2] == "flows.teacher" else DistillConfig
            load_config(model, config, overrides)


def test_the_command_line_takes_the_options_that_the_pages_give_it() -> None:
    shown = [words[1:] for _, words in commands() if words[0] == "dparallel"]
    assert {words[0] for words in shown} >= {"compare", "eval"}
    for words in shown:
        build_parser().parse_args(words)  # exits where an option is unknown
    named = {value for words in shown for flag, value in pairwise(words) if flag == "--protocol"}
    assert named <= {file.stem for file in (ROOT / "configs" / "protocols").glob("*.yaml")}


def test_the_tables_of_rules_are_those_of_their_declarations() -> None:
    page = rule_tables.PAGE.read_text(encoding="utf-8")
    assert page == rule_tables.with_tables(page), "write them with: python -m tests.rule_tables"


def test_every_protocol_is_on_the_page_of_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "All protocols are at version 1." in page
    for file in (ROOT / "configs" / "protocols").glob("*.yaml"):
        protocol = load_config(ProtocolConfig, file)
        benchmark, _, ending = file.stem.partition("_")
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{benchmark}` |")]
        for part in (protocol.data[0].path, protocol.file.names[0], protocol.licence):
            assert f"| {part} |" in row, file
        metrics = [metric for scorer in scorers_of(protocol) for metric in scorer.metrics]
        assert all(f"`{metric}`" in row for metric in metrics), file
        assert f"\n| `_{ending}` |" in page
        assert protocol.version == 1, file


def test_benchmark_commands_name_modules() -> None:
    modules = {words[2] for _, words in commands() if words[:2] == ["python", "-m"]}
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_deployments_of_the_pages_exist() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    known = {(each["entrypoint"].split(":")[1], each["name"]) for each in deployments}
    named = {words[3] for _, words in commands() if words[:3] == ["prefect", "deployment", "run"]}
    assert named
    assert {tuple(name.split("/")) for name in named} <= known


def test_prompts_for_the_embedded_teacher_are_problems_that_it_solves() -> None:
    """At the default decoding, with the lengths that the pages give."""
    texts = [page.read_text(encoding="utf-8") for page in (*PAGES, *(ROOT / "docs").glob("*.md"))]
    names = "|".join(NAMES)
    prompts = {found for text in texts for found in re.findall(rf"[\"`]((?:{names}) [^\"`\n]*\?)[\"`]", text)}
    assert len(prompts) > 3
    model, tokenizer = (load(ROOT / "teachers" / "tiny") for load in (load_model, load_tokenizer))
    decoding = DecodingConfig(gen_length=36, block_length=12)
    of_ledger = {prompt for prompt in prompts if re.match(r"\w+ \d a ", prompt)}
    given = sorted(prompts - of_ledger)
    for prompt, completion in zip(given, complete(model, tokenizer, given, decoding), strict=True):
        assert answer_is_right(coins.TASK.parse_prompt(prompt), completion.text), prompt
    model, tokenizer = (load(ROOT / "teachers" / "ledger") for load in (load_model, load_tokenizer))
    decoding = DecodingConfig(gen_length=60, block_length=60, rule="contiguous", threshold=0.6)
    assert of_ledger
    for prompt in of_ledger:
        [completion] = complete(model, tokenizer, [prompt], decoding)
        assert answer_is_right(ledger.TASK.parse_prompt(prompt), completion.text), prompt
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for words in (NAMES, coins.ITEMS, coins.GAINS, coins.LOSSES):
        assert " ".join(f"`{word}`" for word in words) in page


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"

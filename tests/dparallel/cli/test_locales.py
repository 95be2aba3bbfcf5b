"""In locales other than UTF-8, files and pipes are UTF-8, and terminals get what they can show."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dparallel.cli.main import main

TEXT = "Réponds ß → 東京"
ARGUMENT = "Tom possède 3 €"  # given on the command line, as bytes of UTF-8 or of the locale
SHAPE = ["--gen-length", "8", "--block-length", "8"]
# Two commands and a config in one process, because starting one takes seconds. Its stdout is a pipe.
SCRIPT = """
import json, sys
from dparallel.cli.main import main
from dparallel.config.files import load_config
from dparallel.config.problems import ProtocolConfig
codes = [main(sys.argv[3:] + ["--prompts", "in.jsonl", "--out", "out.jsonl", "--trace", "trace.html"])]
codes.append(main(sys.argv[3:] + ["--prompt", sys.argv[2], "--trace", "one.html"]))
codes.append(main(["plan", "wrong.yaml"]))
system = load_config(ProtocolConfig, sys.argv[1]).system
json.dump({"codes": codes, "system": system}, open("report.json", "w", encoding="ascii"))
"""


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory) -> dict[str, str]:
    """The environment of a German locale with ISO-8859-1."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("needs localedef, to build a locale in ISO-8859-1")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    if subprocess.run(command, capture_output=True).returncode > 1:  # 1: with warnings
        pytest.skip("localedef has no sources of de_DE")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "latin_1"])
def test_files_and_pipes_are_utf_8_in_any_locale(tiny_checkpoint, tmp_path, request, locale):
    environment = {"LC_ALL": "C"} if locale == "C" else request.getfixturevalue("latin_1")
    argument = ARGUMENT.encode() if locale == "C" else ARGUMENT.replace("€", "£").encode("latin-1")
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"prompt": TEXT}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (tmp_path / "config.yaml").write_text(f"\ufeffsystem: '{TEXT}'\nchat: true\n", encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text(f"{TEXT.split()[0]}: 1\n", encoding="utf-8")
    model = ["generate", "--model", str(tiny_checkpoint), *SHAPE]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, "config.yaml", argument, *model],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **environment},
        capture_output=True,
    )
    assert b"Traceback" not in ran.stderr, ran.stderr.decode()
    report = json.loads((tmp_path / "report.json").read_text(encoding="ascii"))
    assert report == {"codes": [0, 0, 2], "system": TEXT}
    assert "Réponds" in ran.stderr.decode(), "the message about wrong.yaml, through a pipe"
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["prompt"] == TEXT
    prompts = [_prompt_in(tmp_path / name) for name in ("trace.html", "one.html")]
    assert prompts == [TEXT, ARGUMENT if locale == "C" else ARGUMENT.replace("€", "£")]


RESTARTED = """
import os, sys
from dparallel.stages.streams import restart_in_utf8_mode
restart_in_utf8_mode("program")
print(ascii(sys.argv[1:]), [os.path.exists(name) for name in sys.argv[1:]])
"""


@pytest.mark.slow
def test_arguments_survive_the_restart_of_a_flow(latin_1, tmp_path):
    """Names of files are mostly in UTF-8, whatever the locale; texts are in either encoding."""
    (tmp_path / "program.py").write_text(RESTARTED, encoding="utf-8")
    (tmp_path / "Größe.yaml").touch()
    paths = os.pathsep.join([str(Path(__file__).parents[3]), str(tmp_path)])
    ran = subprocess.run(
        [sys.executable, "-m", "program", "Größe.yaml".encode(), "Größe".encode("latin-1")],
        cwd=tmp_path,
        env={**os.environ, **latin_1, "PYTHONUTF8": "0", "PYTHONPATH": paths},
        capture_output=True,
    )
    assert ran.stdout.decode("ascii") == f"{['Größe.yaml', 'Größe']!a} [True, False]\n", ran.stderr


def _prompt_in(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    assert "←" in text
    data = text.split('<script type="application/json" id="trace">')[1].split("</script>")[0]
    return json.loads(data)["rows"][0]["prompt"]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"R\\xe9ponds \\u2192"), ("latin-1", b"R\xe9ponds \\u2192")]
)
def test_a_terminal_gets_escapes_for_what_it_lacks(monkeypatch, encoding, shown):
    terminal = Terminal(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(SystemExit):
        main(["--version"])
    print("Réponds →", end="", flush=True)
    assert terminal.buffer.getvalue().endswith(shown)

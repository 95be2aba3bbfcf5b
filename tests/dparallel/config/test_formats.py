"""YAML 1.2 and JSON files, and one-line errors for invalid ones."""

import json

import pytest

from dparallel.config.base import ConfigError
from dparallel.config.experiment import TrajectoriesConfig
from dparallel.config.files import load_config, parse_json, parse_yaml


def yaml_of(text: str):
    return parse_yaml(text, "it")


def test_yaml_is_read_as_its_current_version_says() -> None:
    read = yaml_of(
        "{a: 0150, b: 1:30, c: 5e8, d: 1e-5, e: yes, f: 2024-01-01, g: 0o17, h: ~, i: no, j: 1_000}"
    )
    first = {"a": 150, "b": "1:30", "c": 5e8, "d": 1e-5, "e": "yes"}
    assert read == first | {"f": "2024-01-01", "g": 15, "h": None, "i": "no", "j": 1000}
    assert [type(read[key]) for key in "cd"] == [float, float]


def test_merge_keys_and_aliases() -> None:
    text = "base: &base {gen_length: 36, steps: 36}\nfast:\n  <<: *base\n  steps: 9\nsame: *base\n"
    read = yaml_of(text)
    assert read["fast"] == {"gen_length": 36, "steps": 9}
    assert read["same"] == read["base"] == {"gen_length": 36, "steps": 36}
    several = yaml_of("a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc: {<<: [*a, *b], y: 3}")
    assert several["c"] == {"x": 1, "z": 2, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r'found duplicate key "a" .*\(line 2, column 1\)'),
        ("{a: {b: 1, b: 1}}", 'found duplicate key "b"'),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag .*line 1"),
        ("a: !x y", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("? {a: 1}\n: 2", "found unhashable key"),
        ("? [1, 2]\n: 2", "holds what JSON cannot"),
        ("a: !!set {x, y}", "holds what JSON cannot"),
        ("a: &a [*a]", "holds what JSON cannot .*Circular"),
        ("a: &a {b: *a}", "holds what JSON cannot .*Circular"),
        ("a: *b", "found undefined alias 'b'"),
        ("a:\t- b", "not valid YAML"),
        ("\ta: b", "cannot start any token"),
        ("a: \x07", "special characters are not allowed"),
        ('a: "\\ud83d"', "not valid YAML|holds what JSON cannot"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("[" * 1000, "not valid YAML: maximum recursion"),
        ("a: !!int x", "not valid YAML: invalid literal"),
        ("a: !!bool x", "not valid YAML"),
    ],
)
def test_what_is_no_plain_yaml_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        yaml_of(text)
    assert str(error.value).startswith("it: ")
    assert "\n" not in str(error.value)


def test_json_is_read_as_json() -> None:
    text = '{"a": 2e8, "b": 1e-5,\t"c": "\\ud83d\\ude00", "d": true,\n\t"e": [null, 0]}'
    assert parse_json(text, "it") == {
        "a": 2e8,
        "b": 1e-5,
        "c": "\N{GRINNING FACE}",
        "d": True,
        "e": [None, 0],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "not valid JSON: key 'a' twice"),
        ('{"x": [{"a": 1, "a": 2}]}', "not valid JSON: key 'a' twice"),
        ('{"a": 0123}', "not valid JSON: .* delimiter: line 1 column 8"),
        ('{"a": NaN}', "not valid JSON: NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": "\\ud83d"}', "holds what JSON cannot .*surrogates"),
        ("{a: 1}", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_json(text, "it")
    assert str(error.value).startswith("it: ")
    assert "\n" not in str(error.value)


def test_an_included_json_file_is_json(tmp_path) -> None:
    """Tabs and 2e8 are valid in JSON; read as YAML they were an error and a text."""
    (tmp_path / "a.yaml").write_text(
        "{problems: {benchmark: coins, count: 1}, decoding: decoding.json}", encoding="utf-8"
    )
    (tmp_path / "decoding.json").write_text(
        '{\n\t"gen_length": 36,\n\t"block_length": 12e0\n}', encoding="utf-8"
    )
    config = load_config(TrajectoriesConfig, tmp_path / "a.yaml")
    assert (config.decoding.gen_length, config.decoding.block_length) == (36, 12)
    (tmp_path / "decoding.json").write_text('{"gen_length": 036}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"decoding\.json: not valid JSON"):
        load_config(TrajectoriesConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_files_are_utf8_with_or_without_a_mark(tmp_path, name: str) -> None:
    problems = {"benchmark": "dataset", "sources": [{"path": "a", "prompt": "Réponds à {q} ß"}]}
    text = json.dumps({"problems": problems, "decoding": {}}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(text, encoding)
        [source] = load_config(TrajectoriesConfig, tmp_path / name).problems.sources
        assert source.prompt == "Réponds à {q} ß"
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / name).write_text(text, encoding)
        with pytest.raises(ConfigError, match="not UTF-8 .*; save it as UTF-8"):
            load_config(TrajectoriesConfig, tmp_path / name)


def test_unreadable_files(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "a\nb.yaml"):
        with pytest.raises(ConfigError, match="no such config file"):
            load_config(TrajectoriesConfig, path)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match=r"loop\.yaml: "):
        load_config(TrajectoriesConfig, loop)
    (tmp_path / "a.yaml").touch(mode=0o000)
    with pytest.raises(ConfigError, match=r"a\.yaml: (cannot be read \(Permission denied\)|holds NoneType)"):
        load_config(TrajectoriesConfig, tmp_path / "a.yaml")  # the second one as root

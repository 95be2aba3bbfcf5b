import pytest

from dparallel.stages.arguments import Parser


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["eval", "--batchsize", "4"], "unknown option --batchsize; did you mean --batch-size? see"),
        (["eval", "--batchsize=4"], "unknown option --batchsize; did you mean --batch-size? see"),
        (["eval", "--btach-size", "4"], "unknown option --btach-size; did you mean --batch-size? see"),
        (["eval", "--form", "tree"], "unknown option --form; did you mean --format? see"),
        (
            ["eval", "--format", "jsn"],
            "argument --format: unknown value 'jsn'; did you mean 'json'? known: json, html; see",
        ),
        (["eval", "--quux"], "unknown option --quux; see"),
        (
            ["eval", "--model", "m", "more"],
            "unrecognized arguments: more (quote a text with spaces; a pattern such as runs/* must match one "
            "name); see",
        ),
        (["eval", "--batch-size", "x"], "argument --batch-size: invalid int value: 'x'; see"),
    ],
)
def test_mistakes_name_the_command(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="tool")
    command = parser.add_subparsers().add_parser("eval", allow_abbrev=False)
    command.add_argument("--batch-size", type=int)
    command.add_argument("--format", choices=["json", "html"])
    command.add_argument("--model", required=True)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given)
    assert capsys.readouterr().err == f"tool eval: error: {message} tool eval --help\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["evla"], "unknown command 'evla'; did you mean 'eval'? known: eval, list; see"),
        (["--versoin", "eval"], "unknown option --versoin; did you mean --version? see"),
        (["quux", "--versoin"], "unknown command 'quux'; known: eval, list; see"),
    ],
)
def test_mistyped_commands_are_mistakes_of_the_program(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="tool")
    parser.add_argument("--version", action="version", version="tool 1")
    commands = parser.add_subparsers()
    for name in ("eval", "list"):
        commands.add_parser(name)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given)
    assert capsys.readouterr().err == f"tool: error: {message} tool --help\n"


def test_texts_that_look_like_options_are_no_mistakes() -> None:
    parser = Parser(prog="tool")
    parser.add_argument("--text")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args(["--text=--odd", "--", "--quux"])
    assert (options.text, options.rest) == ("--odd", ["--quux"])
    assert parser.parse_args(["--text", "-- odd one"]).text == "-- odd one"

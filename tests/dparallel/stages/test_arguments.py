import pytest

from dparallel.stages.arguments import Parser


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["eval", "--batchsize", "4"], "unknown option --batchsize; did you mean --batch-size? see"),
        (["eval", "--batchsize=4"], "unknown option --batchsize; did you mean --batch-size? see"),
        (["eval", "--quux"], "unknown option --quux; see"),
        (["eval", "more"], "unrecognized arguments: more; see"),
        (["eval", "--batch-size", "x"], "argument --batch-size: invalid int value: 'x'; see"),
    ],
)
def test_mistakes_name_the_command(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="tool")
    command = parser.add_subparsers().add_parser("eval", allow_abbrev=False)
    command.add_argument("--batch-size", type=int)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given)
    assert capsys.readouterr().err == f"tool eval: error: {message} tool eval --help\n"

import contextlib
import io
import textwrap
from typing import Any

import pytest

from dparallel.problems.programs import LONGEST, program, statements
from tests.dparallel.problems.rows import rows

HUMANEVAL = rows("humaneval")
HEADER = """from typing import List


def helper(x):
    return x + 1


def f(x: List[int]) -> int:
    ''' Doc. '''
"""
SOLUTION = "    y = helper(x[0])\n    return y\n"
WHOLE = HEADER + SOLUTION
ALONE = "def f(x):\n    return x[0] + 1\n"


def run(source: str) -> dict[str, Any]:
    """Names of a program of these tests."""
    names: dict[str, Any] = {"__name__": "candidate"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(source, names)
    return names


@pytest.mark.parametrize(
    "response",
    [
        # fences
        f"```python\n{WHOLE}```",
        f"```\n{WHOLE}\n```\n",
        f"Here it is:\n\n```py\n{WHOLE}```\nThis works because ...",
        f"```Python3 \r\n{WHOLE}```",
        f"```python {ALONE}```",
        f"```python\n{WHOLE}",  # never closed
        f"```python\n{ALONE.rstrip()}```",
        f"```\n{WHOLE}````",
        f"{WHOLE}```\nAn explanation.\n```python\nf([1])\n```",  # opened by a prefill
        f"1. First:\n   ```python\n{textwrap.indent(ALONE, '   ')}   ```",
        # several fences
        f"```python\n{ALONE}```\nExample:\n```python\nprint(f([1]))\n```",
        f"```bash\npip install x\n```\n```python\n{ALONE}```",
        f"```python\n{ALONE}```\nor\n```python\ndef f(x):\n    return 7\n```",  # the first one counts
        "```python\ndef g(x):\n    return x + 1\n```\nthen\n```python\ndef f(x):\n    return g(x[0])\n```",
        "So:\n```\nf([1])\n```\n```\ndef f(x):\n    '''```\n    f([1])\n    ```'''\n    return x[0] + 1\n```",
        # continuations
        SOLUTION,
        "\n" + SOLUTION,
        SOLUTION.lstrip(),
        "y = helper(x[0])\nreturn y\n",
        "for y in x:\n    return y + 1\n",
        "for y in x:\n        return y + 1\n\nThis is it.",
        f"```python\n{SOLUTION}```",
        SOLUTION + "\n\ndef main():\n    print(f([int(input())]))\n\nmain()\n",
        SOLUTION + "\n\ndef f(x):\n    return 7 +",
        SOLUTION + "\nThis function adds one.\n",
        SOLUTION + "```\nThis function adds one.\n",
        # plain text
        WHOLE,
        f"Here is the function:\n\n{ALONE}\nIt adds one.",
        f"from here on, it's simple\n{ALONE}",
        # what would fail or wait
        f"{ALONE}\nprint(f(input()))",
        f"{ALONE}\nassert f([1]) == 17",
        f"x = int(input())\n{ALONE}f(x)",
        f"{ALONE}\nif __name__ == '__main__':\n    f = None",
        f"from __future__ import annotations\n{ALONE}",
        f"{ALONE}\nresult = [",  # truncated
        f"{ALONE}\ndef test():\n    assert f([1]) == '2",
        f'{ALONE}\n"""\nExamples',
        f"def f(x): ...\n\n\n{ALONE}",
        ALONE.replace("\n", "\r\n"),
        ALONE + "\0",
        ALONE + "\0print(1)",
        "\0" + ALONE,
        # marks of the byte order
        "\ufeff" + ALONE,
        f"\ufeff```python\n{ALONE}```",
        f"```python\n\ufeff{ALONE}```",
        # other fences, and blocks of Markdown without any
        f"~~~python\n{ALONE}~~~",
        f"````python\n{ALONE}````",
        f"```{{.python}}\n{ALONE}```",
        f'```python title="a.py"\n{ALONE}```',
        f"```PYTHON\n{ALONE}```",
        f"``` python\n{ALONE}```",
        f"\\```python\n{ALONE}\\```",
        f"<code>\n{ALONE}</code>",
        f"Here it is:\n\n{textwrap.indent(ALONE, '    ')}\nThat is all.",
        f"Here it is:\n\n{textwrap.indent(ALONE, chr(9))}\nThat is all.",
        f"- So:\n  ```python\n{textwrap.indent(ALONE, '  ')}  ```\n- done",
        # line ends and tabs
        f"```python\n{ALONE}```".replace("\n", "\r\n"),
        f"```python\n{ALONE}```".replace("\n", "\r"),
        ALONE.replace("    ", "\t"),
        "\f" + ALONE,
        # several functions, and other definitions
        f"```python\ndef g(x):\n    return 7\n\n{ALONE}```",
        f"```python\n{ALONE}\n\ndef g(x):\n    return f(x)\n\nprint(g([1]))\n```",
        "```python\nimport functools\n\n@functools.wraps(len)\n" + ALONE + "```",
        "```python\nf = lambda x: x[0] + 1\n```",
        "class S:\n    def f(self, x):\n        return x[0] + 1\nf = S().f\n",
        "ONE = 1\ndef f(x):\n    return x[0] + ONE\n",
        "```python\nprint 'Python 2'\n```\n```python\n" + ALONE + "```",
        ALONE + "<|endoftext|>",
        ALONE + "# \ud800",
    ],
)
def test_the_program_of_a_response(response: str) -> None:
    assert run(program(response, ["f"], header=HEADER))["f"]([1]) == 2


@pytest.mark.parametrize(
    "response",
    [
        "```python\ndef f(x):\n    return g(x)\n```\nwith\n```python\ndef g(x):\n    return x[0] + 1\n```",
        "```python\n" + ALONE.replace(" " * 4, "\u00a0" * 4) + "```",
        textwrap.indent(f"```python\n{ALONE}```", "> "),
    ],
)
def test_the_text_of_one_fence_must_be_a_program(response: str) -> None:
    """As in the published post-processing, which reads the first fence alone."""
    with pytest.raises((NameError, SyntaxError)):
        run(program(response, ["f"], header=HEADER))["f"]([1])


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   ",
        "I cannot do that.",
        "```python\n```",
        "def g(x):\n    return x",
        "def f(x):\n    pass",
        "def f(x",
        "1 +",
        "```",
    ],
)
def test_without_a_program_there_is_no_solution(response: str) -> None:
    for header in ("", HEADER):
        try:
            names = run(program(response, ["f"], header=header))
        except SyntaxError:
            continue
        assert "f" not in names or names["f"]([1]) is None


def test_a_program_defines_all_names_that_its_tests_use() -> None:
    node, tree = "class Node:\n    pass\n", "def f(node):\n    return 2\n"
    first = f"```\n{node}```\nwhich is used in\n```\n{tree}```"
    both = f"```\n{node}```\nAll:\n```\n{node}{tree}```"
    for response in (first, both, node + tree):
        assert {"Node", "f"} <= run(program(response, ["Node", "f"])).keys()
    assert "f" in run(program(tree, ["Node", "f"]))
    assert "Node" not in run(program(node + tree, ["f"]))
    assert "Node" in run(program(node + tree, ["f"], needed=["Node"]))


FORMS = [
    "{solution}",
    "```python\n{prompt}{solution}```",
    "Sure!\n```python\n{prompt}{solution}\n```\nTest:\n```python\nassert False\n```",
    "{prompt}{solution}\nprint(input())",
    "```python\n{solution}```",
]


@pytest.mark.parametrize("row", HUMANEVAL, ids=lambda row: row["task_id"])
@pytest.mark.parametrize("form", FORMS)
def test_reference_solutions_of_humaneval(row: dict[str, str], form: str) -> None:
    """Among them one with a helper in the prompt, one that returns a function's value without `return`."""
    response = form.format(prompt=row["prompt"], solution=row["canonical_solution"])
    solution = run(program(response, [row["entry_point"]], header=row["prompt"]))[row["entry_point"]]
    helpers = run(row["prompt"])  # of the prompt, which the tests use
    exec(row["test"], helpers)
    helpers["check"](solution)


@pytest.mark.parametrize("row", rows("mbpp"), ids=lambda row: str(row["task_id"]))
def test_reference_solutions_of_mbpp(row: dict[str, Any]) -> None:
    names = [
        name for name in run(row["code"]) if name in "".join([*row["test_list"], row["test_setup_code"]])
    ]
    for form in ("{}", "```python\n{}\n```", "{}\n```\nThat is it."):
        solution = run(program(form.format(row["code"]), names))
        exec("\n".join([row["test_setup_code"], *row["test_list"]]), solution)


def test_statements_end_where_a_program_ends() -> None:
    assert len(statements("a = 1\nb = 2\nand so on")) == 2
    assert len(statements("a = 1\ntry:\n    b = 2\n")) == 1
    assert len(statements("a = '\\d'\n")) == 1  # a warning is no error
    assert len(statements("so\na = 1 1")) == 1
    assert statements("so on\na = 1") == statements("") == statements("   a") == []


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        "def f(x):\n" * 2_000,
        "x = " + "1 + " * 20_000 + "1\n" + ALONE,
        "```" * 1_000,
        "x\n" * 2_000 + "'",
        "@" * 50_000 + "\n@" * 9_000,
        "\n" * LONGEST * 2,
    ],
    ids=["brackets", "nested", "sum", "fences", "lines", "decorators", "empty"],
)
def test_hostile_texts_end_soon(text: str) -> None:
    assert isinstance(program(text, ["f"], header=HEADER), str)

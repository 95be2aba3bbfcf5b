import ast
import textwrap

import pytest

from dparallel.problems.pruning import defined, pruned


def kept(source: str, *roots: str) -> str:
    return ast.unparse(ast.Module(pruned(ast.parse(textwrap.dedent(source)).body, roots), []))


@pytest.mark.parametrize(
    ("needed", "left_out"),
    [
        ("import math\ndef f(x): return math.sqrt(x)", "import os\nprint(f(4))"),
        ("import os.path as p\ndef f(x): return p.join(x)", "import os"),
        ("def g(x): return x\ndef f(x): return g(x)", "def h(x): return f(x)"),
        ("def f(n): return g(n)\ndef g(n): return n and f(n - 1)", "f(3)"),
        ("class Node: pass\ndef f(): return Node()", "class Other(Node): pass"),
        ("class Base: pass\nclass f(Base): pass", "f().run()"),
        ("LIMIT: int = 3\ndef f(x=LIMIT): return x", "OTHER = f(2)"),
        (
            "cache = {}\ncache[0] = 1\ncache.update({1: 1})\ndef f(n): return cache[n]",
            "other = {}\nother[0] = 1",
        ),
        (
            "primes = []\nfor n in range(9):\n    primes.append(n)\ndef f(): return primes",
            "for m in f(): print(m)",
        ),
        ("total = 0\ntotal += 1\ndef f():\n    global total\n    total += 1", "assert f() == 1"),
        (
            "try:\n    import numpy as np\nexcept ImportError:\n    np = None\ndef f(): return np",
            "try:\n    f()\nfinally:\n    pass",
        ),
        (
            "from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n",
            "from functools import reduce",
        ),
        ("def f(n): return n\nf.calls = 0\nf = print or f", "g = f"),
        (
            "import sys\nsys.setrecursionlimit(10 ** 6)\ndef f(n): return n",
            "n = int(input())",
        ),
        ("import sys\nsys.set_int_max_str_digits(0)\ndef f(n): return str(n)", "n = 1"),
        ("from math import *\ndef f(x): return sqrt(x)", "from math import pi"),
        ("class Tree: pass\ndef f(t: Tree): return [g for g in t]", "g = 1"),
        ("x = 1\nclass f:\n    y = x\n    def g(self, z): return [z for z in self.y]", "y = z = self = 2"),
        ("table = {'g': 1}\ndef f(name): return eval(name)", "print(table)"),
        (
            "memo = {}\ndef fill():\n    for n in range(9):\n        memo[n] = n\nfill()\n"
            "def f(n): return memo[n]",
            "def main(): print(f(int(input())))\nmain()",
        ),
        (
            "table = None\ndef start():\n    global table\n    table = [1]\nstart()\ndef f(): return table",
            "def stop():\n    table = 2\nstop()",
        ),
        (
            "from heapq import heappush\nheap = []\nheappush(heap, 9)\ndef f(): return heap",
            "def check(g): assert g() == 1\ncheck(f)",
        ),
        (
            "class A: pass\nsetattr(A, 'v', 9)\ndef f(): return A.v",
            "class B: pass\nsetattr(B, 'v', 9)",
        ),
        (
            "from functools import singledispatch\n@singledispatch\ndef f(n): return 0\n"
            "@f.register(int)\ndef g(n): return n",
            "@singledispatch\ndef h(n): return 0\n@h.register(int)\ndef i(n): return n",
        ),
        (
            "known = {}\ndef keep(g):\n    known[g.__name__] = g\n    return g\n@keep\ndef g(): return 1\n"
            "def f(): return known['g']()",
            "def twice(g): return g\n@twice\ndef h(): return 2",
        ),
        ("if (n := 3) > 2:\n    def f(): return n", "with open('x') as file: pass"),
    ],
)
def test_what_a_name_needs_is_kept_and_nothing_else(needed: str, left_out: str) -> None:
    plain = ast.unparse(ast.parse(needed))
    assert kept(f"{needed}\n{left_out}", "f") == plain
    assert kept(f"{left_out}\n{needed}", "f") == plain


MEMO = "memo = {}"
FILLED = "def f(n): return memo[n]"
COUNT = "count = 0"
COUNTED = "def f(): return count"


@pytest.mark.parametrize(
    ("before", "statement", "after"),
    [
        ("memo = []", "[memo.append(i) for i in range(5)]", FILLED),
        ("memo = []", "list(map(memo.append, range(5)))", FILLED),
        ("memo = []", "list(map(lambda i: memo.append(i), range(5)))", FILLED),
        ("memo = []", "_ = [memo.extend([i]) for i in range(5)]", FILLED),
        ("memo = [3, 1]", "memo.sort()", FILLED),
        ("memo = [3, 1]", "memo += [2]", FILLED),
        ("memo = [3, 1]", "del memo[0]", FILLED),
        ("memo = [3, 1]", "last = memo.pop()", FILLED),
        ("memo = [3, 1]", "print(memo.pop())", FILLED),
        ("memo = [3, 1]", "if len(memo) > 1:\n    memo.pop()", FILLED),
        ("memo = [3, 1]", "while memo.pop() > 1:\n    pass", FILLED),
        (MEMO, "_ = memo.setdefault('a', 1)", FILLED),
        (MEMO, "first = memo.setdefault(0, f(0))", FILLED),
        (MEMO, "memo[0] = 1", FILLED),
        (MEMO, "memo |= {0: 1}", FILLED),
        (MEMO, "for memo[0] in range(3):\n    pass", FILLED),
        (MEMO, "with open('/dev/null') as file:\n    memo.update({0: 1})", FILLED),
        (MEMO, "try:\n    _ = memo.setdefault(0, 1)\nexcept KeyError:\n    pass", FILLED),
        (
            "from collections import deque\nmemo = {}",
            "deque(memo.setdefault(i, i) for i in range(3))",
            FILLED,
        ),
        ("memo = {}\nother = memo", "_ = other.setdefault(0, 1)", FILLED),
        ("memo = {0: []}\nother = memo[0]", "other.append(1)", FILLED),
        ("memo = [[1], [2]]", "for row in memo:\n    row.append(0)", FILLED),
        ("memo = [[1], [2]]", "_ = [row.append(0) for row in memo]", FILLED),
        ("memo = {}\ndef fill():\n    memo[0] = 1", "done = fill()", FILLED),
        ("memo = {}\ndef fill(n):\n    memo[n] = 1", "_ = [fill(n) for n in range(3)]", FILLED),
        ("memo = {}\ndef add(n):\n    memo[n] = n\ndef fill():\n    add(1)", "fill()", FILLED),
        ("memo = {}\ndef change(table):\n    table[0] = 1", "changed = change(memo)", FILLED),
        (
            "memo = {}\nclass Adder:\n    def add(self):\n        memo[0] = 1",
            "adder = Adder()\nadder.add()",
            FILLED,
        ),
        ("memo = {}\nclass Made:\n    def __init__(self):\n        memo[0] = self", "made = Made()", FILLED),
        (
            "memo = {}\ndef named(name):\n    def kept(g):\n        memo[name] = g\n        return g\n"
            "    return kept",
            "@named(0)\ndef g(): return 1",
            FILLED,
        ),
        ("memo = {}", "class Own:\n    memo[0] = 1", FILLED),
        (
            "class Base:\n    known = []\n    def __init_subclass__(cls):\n        cls.known.append(cls)",
            "class Own(Base): pass",
            "def f(): return Base.known",
        ),
        ("class Base: pass", "class Own(Base): pass", "def f(): return Base.__subclasses__()"),
        (COUNT, "for n in range(3):\n    count += n", COUNTED),
        (
            f"{COUNT}\ndef step():\n    global count\n    count += 1",
            "for _ in range(3):\n    step()",
            COUNTED,
        ),
        (f"{COUNT}\ndef step():\n    global count\n    count += 1", "last = step()", COUNTED),
        ("count = None", "match [1, 2]:\n    case [count, *_]:\n        pass", COUNTED),
        ("import x", "x.y = 1", "def f(): return x.y"),
        (
            "from decimal import Decimal, getcontext",
            "getcontext().prec = 50",
            "def f(): return Decimal(1) / 3",
        ),
        (
            "import decimal",
            "decimal.getcontext().prec = 50",
            "def f():\n    import decimal\n    return decimal",
        ),
        ("from random import random, seed", "seed(0)", "def f(): return random()"),
        ("import random", "_ = random.seed(0)", "def f(): return random.random()"),
    ],
)
def test_what_may_change_a_needed_name_is_kept(before: str, statement: str, after: str) -> None:
    shown = kept(f"{before}\n{statement}\n{after}", "f")
    assert ast.unparse(ast.parse(statement)) in shown
    assert kept(f"{before}\n{statement}\ndef f(): return 1", "f") == "def f():\n    return 1"


@pytest.mark.parametrize(
    "example",
    [
        "print(f(3))",
        "result = f(2)",
        "assert f(2) == memo[2]",
        "print(memo)",
        "print(len(memo), memo.get(3))",
        "result = f(memo)",
        "for n in memo:\n    print(f(n))",
        "for n, m in memo.items():\n    assert f(n) == m",
        "result = helper(2)",
        "n = int(input())\nprint(helper(n))",
        "n = int(input())\nfound = change(memo, n)",
        "import sys\nfor line in sys.stdin:\n    found = memo[line]",
        "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()",
        "def main():\n    n = int(input())\n    memo.pop(n)\n    print(helper(n))\nresult = main()",
        "def test():\n    assert f(1) == 2\n    assert store(1) == 2\ntest()",
        "import unittest\nclass Test(unittest.TestCase):\n"
        "    def test(self): self.assertEqual(f(1), memo)\nunittest.main()",
        "if __name__ == '__main__':\n    memo.clear()",
        "import sys\nsys.exit(f(1))",
        "node = Node(1)\nprint(f(node))",
    ],
)
def test_examples_are_left_out_also_where_they_mention_what_is_needed(example: str) -> None:
    program = (
        "memo = {1: 1}\nclass Node:\n    def __init__(self, n): self.n = n\ndef helper(n): return memo[n]\n"
        "def store(n): memo[n] = n\ndef change(table, n): table[n] = n\n"
        "def f(n): return (helper(n), store(n), change(memo, n), Node(n))"
    )
    assert kept(f"{program}\n{example}", "f") == ast.unparse(ast.parse(program))


@pytest.mark.parametrize("test", ["__name__ == '__main__'", "'__main__' == __name__"])
def test_the_main_block_is_left_out_whatever_it_defines(test: str) -> None:
    assert (
        kept(f"def f(): return x\nx = 1\nif {test}:\n    x = int(input())", "f")
        == "def f():\n    return x\nx = 1"
    )


def test_imports_from_the_future_come_first() -> None:
    assert (
        kept("x = 1\nfrom __future__ import annotations\n", "x")
        == "from __future__ import annotations\nx = 1"
    )


def test_several_roots_and_unknown_ones() -> None:
    assert kept("a = 1\nb = 2\nc = 3", "a", "c", "d") == "a = 1\nc = 3"
    assert kept("a = 1") == ""


def test_names_that_statements_define() -> None:
    source = "import a.b, c as d\nfrom e import f\nx, (y, *z) = 1, (2,)\ndef g(h): i = 1\nclass j: k = 1\n"
    source += "l[0].m = 1"
    assert defined(ast.parse(source).body) == {"a", "d", "f", "x", "y", "z", "g", "j", "l"}

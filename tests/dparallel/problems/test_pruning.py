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

"""What passes and what fails, and what is said about it."""

import time
from pathlib import Path

import pytest

from dparallel.problems import patience
from dparallel.problems.sandbox import confinement, run, system
from dparallel.problems.sandbox.jobs import Job, Limits, Mode, Outcome, SandboxError
from dparallel.problems.sandbox.run import check_sandbox, run_all, run_tests
from tests.dparallel.problems.sandbox.hosts import BUBBLEWRAP, EITHER

ADD = "assert add(1, 2) == 3\nassert add('a', b='b') == 'ab'"
HUMANEVAL = Job(
    "def shift(s):\n    return s.upper()\ndef unshift(s):\n    return s.lower()",
    "def check(candidate):\n    for s in 'ab':\n        assert candidate(shift(s)) == s\ncheck(unshift)",
    trusted="def shift(s):\n    return s.upper()\ndef unshift(s):\n    '''Undo shift.'''\n",
    entry_points=("unshift",),
)
NODES = """
class Node:
    def __init__(self, data):
        self.data, self.left = data, None
def depth(node):
    return 0 if node is None else 1 + depth(node.left)
def walk(node):
    while node:
        yield node.data
        node = node.left
"""
NODE_TESTS = "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2\nassert list(walk(root)) == [1, 2]"


@EITHER
def test_honest_programs_pass(mode: Mode) -> None:
    jobs = [
        Job("def add(a, b): return a + b", ADD),
        HUMANEVAL,
        Job(NODES, NODE_TESTS + "\nassert root.left.data == 2 and root == root and root.left != root"),
        Job(
            NODES, "root = Node(1)\nroot.left = root\nassert root.left == root and root.left.left is not None"
        ),
        Job("import re\ndef find(s): return re.search('b+', s)", "assert find('abb').group() == 'bb'"),
        Job("def sum(*numbers): return 6", "assert sum(10, 15) == 6", entry_points=("sum",)),
        Job("def root(x): return x ** .5", "assert math.isclose(root(2.0), 1.41421356, rel_tol=1e-6)"),
        Job("def half(x): return x / 0", "try:\n    half(1)\nexcept ZeroDivisionError:\n    pass"),
        Job("print('x' * 1000)\ndef f(): print('y' * 1000); return input", "assert f()"),
    ]
    outcomes = run_all(jobs, mode)
    assert [outcome.passed for outcome in outcomes] == [True] * len(jobs), outcomes
    assert {outcome.mode for outcome in outcomes} == {mode}
    assert all(("weaker" in outcome.note) == (mode == "unshare") for outcome in outcomes)


@BUBBLEWRAP
def test_the_first_thing_that_went_wrong_is_named() -> None:
    candidates = {
        "def add(a, b): return a - b": "wrong at `assert add(1, 2) == 3`",
        "def add(a, b): pass": "wrong at `assert add(1, 2) == 3`",
        "def add(a, b): return a + c": "the candidate raised NameError: name 'c' is not defined at `assert",
        "def add(a): return a": "the candidate raised TypeError: add() takes 1 positional",
        "def sub(a, b): return a + b": "the candidate raised NameError: name 'add' is not defined",
        "def add(a, b) return a": "the candidate raised SyntaxError: expected ':'",
        "": "the candidate raised NameError: name 'add' is not defined",
        "def add(a, b): return sorted": "wrong at",
        "raise SystemExit": "the candidate raised SystemExit:",
        "def add(a, b): exit(0)": "the candidate raised NameError: name 'exit'",
        "class E(BaseException): pass\ndef add(a, b): raise E": "the candidate raised BaseException: E:",
        "def add(a, b): assert False, 'mine'": "the candidate raised AssertionError: mine at",
    }
    outcomes = run_all([Job(candidate, ADD) for candidate in candidates], workers=4)
    assert not any(outcome.passed for outcome in outcomes)
    for outcome, (candidate, note) in zip(outcomes, candidates.items(), strict=True):
        assert outcome.note.startswith(note), candidate


@BUBBLEWRAP
def test_neither_loops_nor_waits_are_endless() -> None:
    endless = {
        "def add(a, b):\n    while True: pass": "the candidate ended: it used its 1 s of CPU time",
        "import time\ndef add(a, b): time.sleep(60)": "no verdict after 1 s",
    }
    limits = {"the": Limits(seconds=1, wall=30), "no": Limits(wall=1)}
    jobs = [Job(candidate, ADD, limits=limits[note.split()[0]]) for candidate, note in endless.items()]
    assert [outcome.note for outcome in run_all(jobs)] == [*endless.values()]


@BUBBLEWRAP
def test_helpers_of_the_prompt_are_the_prompts_own() -> None:
    cheat = HUMANEVAL.candidate.replace("s.upper()", "s").replace("s.lower()", "s")
    outcome = run_tests(Job(cheat, HUMANEVAL.tests, HUMANEVAL.trusted, HUMANEVAL.entry_points))
    assert (outcome.passed, outcome.note) == (False, "wrong at `assert candidate(shift(s)) == s`")


@BUBBLEWRAP
def test_tests_that_cannot_run_are_named() -> None:
    broken = run_tests(Job("def f(): pass", "assert f( == 1"))
    assert broken.note.startswith("the tests cannot be run: SyntaxError")
    passing = run_tests(Job("def f(g): return g(1)", "assert f(lambda x: x) == 1"))
    assert "the tests pass a function to the candidate: only plain data can be passed" in passing.note


@BUBBLEWRAP
def test_verdicts_do_not_depend_on_the_order_of_sets() -> None:
    job = Job("def order(): return [*{'a', 'b', 'c', 'd', 'e'}]", "raise ValueError(order())")
    assert len({outcome.note for outcome in run_all([job] * 3)}) == 1


def test_what_a_host_lacks_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    confinement._bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        SandboxError, match="bwrap is not on this machine: install it .*apt-get install bubblewrap"
    ):
        check_sandbox()
    with pytest.raises(SandboxError, match="sandbox='docker': known modes are bubblewrap, unshare"):
        check_sandbox("docker")  # type: ignore[arg-type]


def test_a_sandbox_that_does_not_start_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n", "utf-8")
    bwrap.chmod(0o755)
    confinement._bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(
        SandboxError, match="does not start .*No permissions.*kernel.unprivileged_userns_clone"
    ):
        run_tests(Job("def f(): pass", "f()"))
    confinement._bubblewrap.cache_clear()


def test_a_python_in_the_private_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "interpreter", lambda: "/tmp/venv/bin/python")
    with pytest.raises(SandboxError, match="^/tmp/venv/bin/python cannot be used .* another folder"):
        system.mounts.__wrapped__()


PROGRAMS = {
    "threads": """
import threading
def f():
    found = []
    threads = [threading.Thread(target=found.append, args=(n,)) for n in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return sorted(found) == [0, 1, 2, 3]
""",
    "a pool of threads": """
from concurrent.futures import ThreadPoolExecutor
def f():
    with ThreadPoolExecutor(4) as pool: return sum(pool.map(abs, [-1, 2])) == 3
""",
    "temporary files": """
import tempfile
def f():
    with tempfile.TemporaryDirectory() as folder, open(folder + '/x', 'w+') as file:
        file.write('ab')
        file.seek(0)
        return file.read() == 'ab'
""",
    "coroutines": """
import asyncio
async def g(): return 1
def f(): return asyncio.run(g()) == 1
""",
    "recursion": """
import sys
sys.setrecursionlimit(5000)
def g(n): return n and g(n - 1) + 1
def f(): return g(3000) == 3000
""",
    "libraries that look for programs": """
import ctypes.util, platform, uuid
def f():
    ctypes.util.find_library('m')
    return platform.system() == 'Linux' and uuid.getnode() > 0
""",
    "processes that are refused": """
import os, subprocess
def f():
    for start in (os.fork, lambda: subprocess.run(['true'])):
        try: start()
        except PermissionError: continue
        return False
    return os.system('true') != 0
""",
}


@BUBBLEWRAP
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_programs_do(name: str) -> None:
    outcome = run_tests(Job(PROGRAMS[name], "assert f()"))
    assert outcome.passed, outcome


@BUBBLEWRAP
def test_a_busy_machine_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if both processes had waited for a CPU all the time."""
    monkeypatch.setattr(patience, "MOST", 1)
    monkeypatch.setattr(patience, "_threads", lambda processes: [(1, (0.0, time.monotonic()))])
    outcome = run_tests(Job("import time\ndef f(): time.sleep(60)", "f()", limits=Limits(wall=0.2)))
    assert outcome.passed is None
    assert "this machine was too busy to run it in 2 s" in outcome.note


@BUBBLEWRAP
def test_a_candidate_that_was_killed_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system kills processes when the machine has no memory left."""
    killed = Job("import os\ndef f(): os.kill(os.getpid(), 9)", "f()")
    honest = Job("def f(): return 1", "assert f() == 1")
    tries, tried = list[bool](), run._tried

    def counted(job: Job, mode: Mode) -> tuple[Outcome, bool]:
        outcome, again = tried(job if tries else killed, mode)
        tries.append(again)
        return outcome, again

    monkeypatch.setattr(run, "_tried", counted)
    assert run_tests(honest).passed
    assert tries == [True, False]
    outcome = run_tests(killed)
    assert (outcome.passed, outcome.note) == (False, "the candidate ended: it was killed")
    assert tries == [True, False, True, True]


def test_root_needs_a_user_to_become(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confinement._mapped("0 0 4294967295\n") == set(confinement.UNPRIVILEGED)
    assert confinement._mapped("0 1000 1\n1 100000 61300\n") == set(range(61200, 61301))
    monkeypatch.setattr(confinement, "_mapped", lambda text: set())
    with pytest.raises(
        SandboxError, match="must not run as root, and of the users 61200 .*or as a user other"
    ):
        confinement.unprivileged()


def test_entry_points_are_names_and_no_letters() -> None:
    with pytest.raises(SandboxError, match="entry_points='add': give a tuple of names"):
        Job("", "", entry_points="add")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "field", ["seconds", "wall", "memory", "disk", "entries", "threads", "files", "message"]
)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_that_cannot_be_kept_are_refused(field: str, value: float) -> None:
    with pytest.raises(SandboxError, match=f"limits.{field}="):
        Limits(**{field: value})

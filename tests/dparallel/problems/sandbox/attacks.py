"""Hostile candidates. Each has tests that pass if the attack succeeds, and the reason for which it fails."""

from typing import NamedTuple

WRONG = "wrong at"
KILLED = "the candidate ended: it was killed"
GONE = "the candidate ended its process or closed its pipe"
ABSENT = "the candidate raised FileNotFoundError"
REFUSED = "the candidate raised PermissionError"
KNOWS = "assert f(2) == 4"


class Attack(NamedTuple):
    """A candidate that must fail.

    Attributes:
        note: regular expression for the beginning of the note.
        wall: seconds given to it.
    """

    candidate: str
    tests: str = KNOWS
    note: str = WRONG
    wall: float = 30.0


# A false verdict: the function is wrong, and the test must not pass.

VERDICT = {
    "equal to everything": Attack(
        "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Yes()"
    ),
    "a number equal to everything": Attack(
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def f(x): return Yes(3)"
    ),
    "a list equal to everything": Attack(
        "class Yes(list):\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "assert f(2) == [4] or [4] == f(2)",
    ),
    "arithmetic that always fits": Attack(
        "class Near:\n    def __sub__(self, other): return 0\n    __rsub__ = __sub__\n"
        "    def __abs__(self): return 0\n    def __lt__(self, other): return True\ndef f(x): return Near()",
        "assert abs(f(2) - 4) < 1e-6",
        "the tests raised TypeError: unsupported operand",
    ),
    "contains everything": Attack(
        "class All:\n    def __contains__(self, item): return True\ndef f(x): return All()",
        "assert 4 in f(2)",
        "the candidate raised TypeError: 'All' object is not iterable",
    ),
    "not a number": Attack("def f(x): return float('nan')", "x = f(2)\nassert x == x and abs(x - 4) < 1"),
    "a lie about its class": Attack(
        "class Lie:\n    __class__ = property(lambda self: int)\n    def __int__(self): return 4\n"
        "    __index__ = __int__\n    def __eq__(self, other): return True\ndef f(x): return Lie()"
    ),
    "an object that unpickles to code": Attack(
        "class Bomb:\n    def __reduce__(self): return (exec, ('raise SystemExit(0)',))\n"
        "def f(x): return Bomb()"
    ),
    "patched builtins": Attack(
        "import builtins\nbuiltins.AssertionError = builtins.StopIteration\n"
        "for name in ('len', 'abs', 'sorted', 'all', 'isinstance', 'exec', 'compile'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\ndef f(x): return 5",
        note="the candidate sent no encoded value",
    ),
    "patched codec": Attack(
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.endswith('codec'):\n"
        "        module.encode = lambda value, refer: b't'\n"
        "        sys.modules[name.replace('codec', 'candidate')].encode = module.encode\ndef f(x): return 5",
        note="the candidate sent a reply that is none",
    ),
    "patched tests": Attack(
        "import sys\nclass Passing(dict):\n    def __getattr__(self, name): return lambda *a, **k: None\n"
        "for name in ('tests', 'unittest', 'pytest', 'judge'): sys.modules[name] = Passing()\n"
        "check = lambda candidate: None\ndef f(x): return 5",
        "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)",
    ),
    "exit at once": Attack("import os\nos._exit(0)", note=GONE),
    "exit when called": Attack("import os\ndef f(x): os._exit(0)", note=GONE),
    "exit by exception": Attack("def f(x): raise SystemExit(0)", note="the candidate raised SystemExit: 0"),
    "exit while loading": Attack("raise SystemExit(0)", note="the candidate raised SystemExit: 0"),
    "interrupt": Attack("def f(x): raise KeyboardInterrupt", note="the candidate raised KeyboardInterrupt"),
    "exit hooks": Attack("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5"),
    "an exception that ends iteration": Attack(
        "def f(x): raise StopIteration",
        "assert all(map(lambda pair: f(pair[0]) == pair[1], [(2, 4)]))",
        "the candidate raised StopIteration: ",
    ),
    "exceptions of many parts": Attack(
        "def f(x): raise ExceptionGroup('g', [UnicodeDecodeError('utf-8', b'', 0, 1, 'r')])",
        note="the candidate raised ExceptionGroup: g",
    ),
    "broken exception": Attack(
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise E",
        note="the candidate raised Exception: E: ",
    ),
    "exceptions that tests expect do not hide the end": Attack(
        "import os\ndef f(x): os._exit(0)", "try:\n    f(2)\nexcept BaseException:\n    pass", GONE
    ),
    "printed verdict": Attack(
        "import sys\nfor out in (sys.stdout, sys.stderr, sys.__stdout__):\n"
        "    print('passed ' + '0' * 32, file=out, flush=True)\ndef f(x): return 5"
    ),
    "verdict on every descriptor": Attack(
        "import os\nfor number in range(256):\n    try: os.write(number, b'passed ' + b'0' * 32)\n"
        "    except OSError: pass\ndef f(x): return 5",
        note=r"the candidate sent a message of \d+ bytes: at most",
    ),
    "reply on every descriptor": Attack(
        "import os\nreply = b'u2:ti1:5'\nfor number in range(256):\n"
        "    try: os.write(number, len(reply).to_bytes(8, 'big') + reply)\n"
        "    except OSError: pass\ndef f(x): return 4"
    ),
    "a thread that writes on every descriptor": Attack(
        "import os, threading\ndef spray():\n    for number in [*range(3, 64)] * 100:\n"
        "        try: os.write(number, b'passed ' + b'0' * 32)\n        except OSError: pass\n"
        "def f(x):\n    thread = threading.Thread(target=spray)\n    thread.start()\n    thread.join()\n"
        "    return 5",
        note="the candidate sent a message of",
    ),
    "closed descriptors": Attack("import os\nos.closerange(0, 256)\ndef f(x): return 5", note=GONE),
    "a pipe that is read by the candidate": Attack(
        "import os, select\ndef f(x):\n"
        "    ready = [n for n in range(3, 64) if _open(n) and select.select([n], [], [], 0)[0]]\n"
        "    return 4 if any(b'passed' in os.read(n, 4096) for n in ready) else 5\n"
        "def _open(number):\n    try: os.fstat(number)\n    except OSError: return False\n    return True"
    ),
    "frames and objects": Attack(
        "import gc, sys\nneedle = 'f(2) =' + '= 4'\ndef f(x):\n    found, frame = [], sys._getframe()\n"
        "    while frame:\n        found += [*frame.f_locals.values(), *frame.f_globals.values()]\n"
        "        frame = frame.f_back\n    found += gc.get_objects()\n"
        "    texts = [t for t in found if isinstance(t, (str, bytes))]\n"
        "    texts += [v for o in found if type(o) in (dict, list, tuple) for v in\n"
        "              (o.values() if type(o) is dict else o) if isinstance(v, (str, bytes))]\n"
        "    texts = [t if isinstance(t, str) else t.decode('latin-1') for t in texts]\n"
        "    return 4 if any(needle in t and t != needle for t in texts) else 5"
    ),
    "classes of the judge": Attack(
        "import gc, sys\nnames = {'Channel', 'Remote', 'CandidateError', 'Popen'}\ndef f():\n"
        "    found, left = set(), [object]\n    while left:\n        kind = left.pop()\n"
        "        if kind not in found:\n            found.add(kind)\n"
        "            left += type.__subclasses__(kind)\n"
        "    classes = [kind.__name__ for kind in found if kind.__name__ in names]\n"
        "    modules = [name for name in sys.modules if name.endswith('judge')]\n"
        "    return classes + modules + [o for o in gc.get_objects() if type(o).__name__ in names]",
        "assert f()",
    ),
    "a function of the judge that its classes lead to": Attack(
        "def f(x):\n    for kind in object.__subclasses__():\n"
        "        space = getattr(getattr(kind, '__init__', None), '__globals__', {})\n"
        "        for name in ('judge', 'PASSED', 'token', 'channel', 'tests'):\n"
        "            if name in space: return 4\n    return 5"
    ),
    "tests on standard input": Attack("import sys\ndef f(x): return 4 if sys.stdin.read() else 5"),
    "other descriptors": Attack(
        "import os\ndef f():\n    found = []\n    for number in range(1024):\n        try: os.fstat(number)\n"
        "        except OSError: continue\n        found.append(number)\n    return len(found)",
        "assert f() != 5",  # input, output, errors, requests and replies
    ),
    "changed arguments": Attack(
        "def f(x):\n    x.append(4)\n    return x", "given = [2]\nassert f(given) == given"
    ),
}

# Looking out

READING = {
    "users of the host": Attack("def f(): return open('/etc/passwd').read()", "assert f()", ABSENT),
    "the project": Attack("def f(): return open('{project}').read()", "assert f()", ABSENT),
    "packages and the sandbox's code": Attack(
        "import os\nnames = {'dparallel', 'lockdown.py', 'torch', 'pip'}\n"
        "def f(): return [w for w, d, n in os.walk('/') if names & {*d, *n}]",
        "assert f()",
    ),
    "home": Attack(
        "import os\ndef f(): return set(os.listdir('{home}')) - {parents}", "assert f()", "{home_note}"
    ),
    "processes": Attack("import os\ndef f(): return os.listdir('/proc')", "assert f()", ABSENT),
    "its own memory map": Attack("def f(): return open('/proc/self/environ').read()", "assert f()", ABSENT),
    "the environment": Attack(
        "import os\ndef f(): return os.environ['SECRET']", "assert f()", "the candidate raised KeyError"
    ),
    "all of the environment": Attack(
        "import os\ndef f(): return set(os.environ) - {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'}", "assert f()"
    ),
    "name of the host": Attack(
        "import socket\ndef f(): return socket.gethostname()", "assert f() == '{host}'"
    ),
    "network": Attack(
        "import socket\ndef f(): return socket.create_connection(('127.0.0.1', {port}), 2) is not None",
        "assert f()",
        "the candidate raised (ConnectionRefusedError|OSError)",
    ),
    "sockets without a network": Attack(
        "import socket\ndef f(): return socket.socket(socket.AF_UNIX).connect('\\0{abstract}') is None",
        "assert f()",
        "the candidate raised ConnectionRefusedError",
    ),
    "sockets of the virtual machine": Attack("import socket\ndef f(): socket.socket(40)", "f()", REFUSED),
    "names of hosts": Attack(
        "import socket\ndef f(): return socket.getaddrinfo('localhost.localdomain', 80)",
        "assert f()",
        "the candidate raised OSError: gaierror",
    ),
    "other programs": Attack(
        "import subprocess\ndef f(): return subprocess.run(['/bin/sh', '-c', 'id']).returncode",
        "f()",
        REFUSED,
    ),
}

# Reaching out

CALL = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
WRITING = {
    "any folder but one": Attack(
        "import os\ndef f(): return [w for w, _, _ in os.walk('/') if os.access(w, os.W_OK) and w != '/tmp']",
        "assert f()",
    ),
    "the standard library": Attack(
        "import os\ndef f(): open(os.__file__, 'a')", "f()", "the candidate raised (PermissionError|OSError)"
    ),
    "root": Attack("def f(): open('/new', 'w')", "f()", "the candidate raised (PermissionError|OSError)"),
    "user 0": Attack(
        "import os\ndef f(): os.setuid(0)", "f()", "the candidate raised (PermissionError|OSError)"
    ),
    "being root": Attack("import os\ndef f(): return [*os.getresuid(), *os.getgroups()]", "assert 0 in f()"),
    "killing all": Attack(
        "import os\ndef f(x):\n    for number in {-1, *range(1, 400)} - {os.getpid()}:\n"
        "        try: os.kill(number, 9)\n        except OSError: pass\n"
        "    return 5"
    ),
    "killing its group": Attack("import os\ndef f(x): os.killpg(0, 9)", note=KILLED),
    "tracing": Attack(
        CALL + "def f(): return [n for n in range(1, 200) if libc.ptrace(16, n, 0, 0) == 0]", "assert f()"
    ),
    "memory of others": Attack(
        CALL + "def f(): return libc.process_vm_readv(1, None, 0, None, 0, 0), ctypes.get_errno()",
        "assert f() != (-1, 1)",
    ),
    "a new user namespace": Attack(
        CALL + "def f(): return libc.unshare(0x10000000), ctypes.get_errno()", "assert f() != (-1, 1)"
    ),
    "a child in a new user namespace": Attack(
        CALL + "def f():\n    child = libc.syscall({clone}, 0x10000011, 0, 0, 0, 0)\n"
        "    return os._exit(0) if child == 0 else (child, ctypes.get_errno())",
        "assert f() != (-1, 1)",
    ),
    "a child": Attack("import os\ndef f(): return os._exit(0) if os.fork() == 0 else 1", "f()", REFUSED),
    "a child that shares its memory": Attack(
        CALL + "def f():\n    child = libc.syscall({clone}, 0x4111, 0, 0, 0, 0)\n"
        "    return os._exit(0) if child == 0 else (child, ctypes.get_errno())",
        "assert f() != (-1, 1)",
    ),
    "a child by the newer call": Attack(
        CALL + "def f():\n    given = (ctypes.c_uint64 * 11)()\n    given[4] = 17\n"
        "    child = libc.syscall(435, given, 88)\n"
        "    return os._exit(0) if child == 0 else (child, ctypes.get_errno())",
        "assert f() != (-1, 38)",
    ),
    "a process pool": Attack(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "def f(): return ProcessPoolExecutor(1).submit(abs, -1).result()",
        "f()",
        "the candidate raised (FileNotFoundError|PermissionError|OSError|ImportError|NotImplementedError)",
    ),
    "mounting": Attack(
        CALL + "def f(): return libc.mount(b'x', b'/tmp', b'tmpfs', 0, b''), ctypes.get_errno()",
        "assert f() != (-1, 1)",
    ),
    "remounting": Attack(
        CALL + "def f(): return libc.mount(None, b'/', None, 0x1020, None), ctypes.get_errno()",
        "assert f() != (-1, 1)",
    ),
}

# Using up. Bounded, also where no limit would hold: at most twice the limit is tried.

FILLING = {
    "memory": Attack("def f(): return len(bytearray(300 << 20))", "f()", "the candidate raised MemoryError"),
    "memory in pieces": Attack(
        "def f(): return sum(len(x) for x in [bytearray(1 << 20) for _ in range(300)])",
        "f()",
        "the candidate raised MemoryError",
    ),
    "shared memory": Attack(
        "import mmap\ndef f(): return len(mmap.mmap(-1, 300 << 20))", "f()", "the candidate raised OSError"
    ),
    "memory of file attributes": Attack(
        "import os\ndef f():\n    open('/tmp/x', 'w').close()\n"
        "    os.setxattr('/tmp/x', 'user.x', bytes(1 << 15))",
        "f()",
        REFUSED,
    ),
    "memory in a file": Attack("import os\ndef f(): return os.memfd_create('x')", "f()", REFUSED),
    "memory of System V": Attack(
        CALL + "def f(): return libc.shmget(0, 1 << 20, 0o1600), ctypes.get_errno()", "assert f() != (-1, 1)"
    ),
    "more memory by asking": Attack(
        "import resource\ndef f(): resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "f()",
        "the candidate raised ValueError: not allowed to raise maximum limit",
    ),
    "a large file": Attack(
        "def f():\n    with open('/tmp/x', 'wb') as file: file.write(bytes(16 << 20))\n    return 1",
        "assert f()",
        "the candidate raised OSError.*(File too large|No space left)",
    ),
    "large files": Attack(
        "def f():\n    for number in range(4):\n        with open(f'/tmp/{number}', 'wb') as file:\n"
        "            for _ in range(4): file.write(bytes(1 << 20))",
        "f()",
        "the candidate raised OSError.*No space left",
    ),
    "empty files": Attack(
        "import os\ndef f():\n    for number in range(400): os.close(os.open(f'/tmp/{number}', os.O_CREAT))",
        "f()",
        "the candidate raised OSError.*No space left",
    ),
    "folders, and links of long names": Attack(
        "import os\ndef f():\n    for number in range(200):\n"
        "        os.mkdir(f'/tmp/d{number}')\n        os.symlink('x' * 100, f'/tmp/l{number}')",
        "f()",
        "the candidate raised OSError.*No space left",
    ),
    "a large program in its place": Attack(
        "import os, sys\ndef f(): os.execv(sys.executable, ['x', '-S', '-c', 'bytearray(300 << 20)'])",
        "f()",
        GONE,
    ),
    "open files": Attack(
        "def f(): return len([open('/dev/null') for _ in range(200)])",
        "f()",
        "the candidate raised OSError.*Too many open files",
    ),
    "a large result": Attack(
        "def f(): return 'x' * (32 << 20)", "f()", "the candidate raised ValueError: the result takes"
    ),
    "an announced large reply": Attack(
        "import os\ndef f():\n    for number in range(3, 64):\n"
        "        try: os.write(number, b'\\0\\0\\xff' + bytes(5))\n        except OSError: pass",
        "f()",
        "the candidate sent a message of",
    ),
    "deep recursion": Attack(
        "def f(x): return f(x + 1)", note="the candidate raised RecursionError: maximum recursion depth"
    ),
    "unlimited recursion": Attack(
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return max([x], key=f)", note=GONE
    ),
    "a deep result": Attack(
        "def f():\n    deep = []\n    for _ in range(10**5): deep = [deep]\n    return deep",
        "f()",
        "the candidate raised Exception: ProtocolError: a value is nested deeper",
    ),
    "a result that contains itself": Attack(
        "def f():\n    me = []\n    me.append(me)\n    return me",
        "f()",
        "the candidate raised Exception: Protocol",
    ),
    "endless output": Attack(
        "def f(x):\n    while True: print('x' * 10**6)", note="no verdict after", wall=0.5
    ),
    "endless items": Attack(
        "def f(x):\n    while True: yield x", "for item in f(2): pass", "no verdict after", wall=0.5
    ),
    "waiting for a CPU for longer": Attack(
        CALL + "def f():\n    lowest = os.sched_param(0)\n"
        "    for change in (\n        lambda: os.nice(1),\n"
        "        lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),\n"
        "        lambda: os.sched_setscheduler(0, os.SCHED_IDLE, lowest),\n"
        "        lambda: os.sched_setparam(0, lowest),\n"
        "        lambda: os.sched_setaffinity(0, {0}),\n    ):\n"
        "        try: change()\n        except PermissionError: continue\n        return 'changed'\n"
        "    number = {'x86_64': 314, 'aarch64': 274}.get(os.uname().machine, 0)\n"
        "    wanted = (ctypes.c_uint32 * 12)(48, 5)  # struct sched_attr, SCHED_IDLE\n"
        "    return libc.syscall(number, 0, wanted, 0), ctypes.get_errno()",
        "assert f() != (-1, 1)",
    ),
    "stopping itself": Attack(
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)", note="no verdict after", wall=0.5
    ),
    "a thread that never ends": Attack(
        "import threading\nevent = threading.Event()\nthreading.Thread(target=event.wait).start()\n"
        "def f(x): return 5"
    ),
}

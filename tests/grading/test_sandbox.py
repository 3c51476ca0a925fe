"""The code sandbox: results of programs, and real escape attempts that affect only themselves."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cogumi.grading import sandbox
from cogumi.grading.sandbox import Limits, Program, run, run_all
from support.waiting import until

GOOD = "def f(x):\n    return x + 1\nassert f(1) == 2\nprint('done')"
NAMESPACES = "files" in run("pass").isolation
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="this machine forbids namespaces")


def without(monkeypatch, tmp_path, *statements):
    """The real sandbox without some of its layers, to test that the remaining layers suffice."""
    text = sandbox._CHILD.read_text()
    for statement, replacement in statements:
        assert statement in text
        text = text.replace(statement, replacement)
    child = tmp_path / "sandbox_child.py"
    child.write_text(text)
    monkeypatch.setattr(sandbox, "_CHILD", child)


@pytest.fixture
def no_hook(monkeypatch, tmp_path):
    without(
        monkeypatch,
        tmp_path,
        ("    add_audit_hook(may_write)\n", ""),
        ('    for name in ("ctypes"', "    for name in ('x'"),
    )


@pytest.fixture
def no_namespaces(monkeypatch, tmp_path):
    without(monkeypatch, tmp_path, ('layers = enter_namespaces(plan["limits"])', "layers = []"))


def test_program_that_completes_is_ok():
    outcome = run(GOOD)
    assert (outcome.ok, outcome.output, outcome.reason) == (True, "done\n", "")
    assert {"limits", "audit"} <= set(outcome.isolation)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1\nassert x == 2, 'no'", "AssertionError: no at: assert x == 2"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "exit status 0"),
        ("while True: pass", "1 s of CPU"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "main thread"),
        ("import time; time.sleep(60)", "longer than 1 s"),
        ("import os, time\nos.close(1); os.close(2)\ntime.sleep(60)", "longer than 1 s"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E: <exception str() failed>"),
        ("\0", "null bytes"),
        ("'\ud800'", "Unicode"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_program_that_does_not_complete_fails_with_a_reason(program, reason):
    outcome = run(program, Limits(wall_seconds=1) if "sleep" in program else None)
    assert not outcome.ok
    assert reason in outcome.reason


always_equal = "class E:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
FORGERIES = {
    "object equal to everything": (always_equal + "def f(x): return E()", "assert f(1) == 2"),
    "such an object in a list": (always_equal + "def f(x): return [E()]", "assert f(1) == [2]"),
    "such an object as a key": (
        always_equal + "    __hash__ = int.__hash__\ndef f(x): return {E(): 1}",
        "assert f(1) == {2: 1}",
    ),
    "number that says it is equal": (
        "class E(int):\n    __eq__ = lambda self, o: True\ndef f(x): return E(5)",
        "assert f(1) == 2",
    ),
    "class that hides its comparison": (
        "class M(type):\n    def __getattribute__(cls, name):\n"
        "        return int.__eq__ if name == '__eq__' else type.__getattribute__(cls, name)\n"
        "class E(metaclass=M):\n    def __eq__(self, other): return True\ndef f(x): return E()",
        "assert f(1) == 2",
    ),
    "patched comparison of a library": (
        "from fractions import Fraction\nFraction.__eq__ = lambda a, b: True\ndef f(x): return Fraction(1)",
        "assert f(1) == 2",
    ),
    "replaced comparison of the tests": (
        "def f(x):\n    for name in list(globals()):\n        if len(name) > 9: globals()[name] = lambda a, b: True\n"
        "    return 3",
        "assert f(1) == 2",
    ),
    "walk up the frames": (
        "import os, sys\nframe = sys._getframe()\nwhile frame:\n    for value in frame.f_locals.values():\n"
        "        if isinstance(value, bytes): os.write(1, value + b'\"\"')\n    frame = frame.f_back\nos._exit(0)",
        "",
    ),
    "frames of other threads": (
        "import os, sys\nfor frame in sys._current_frames().values():\n    print(frame.f_locals)",
        "",
    ),
    "replaced functions of the reporter": (
        "import json, os, sys\nwrite = os.write\nos.write = lambda fd, data: write(fd, data[:16] + b'\"\"')\n"
        "json.dumps = lambda value: '\"\"'\n"
        "for module in list(sys.modules.values()):\n    if hasattr(module, 'explain'): module.explain = lambda *a: ''\n"
        "assert False",
        "",
    ),
    "replaced hook for exceptions": ("import sys\nsys.unraisablehook = lambda *a: None\nassert False", ""),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_programs_cannot_forge_their_verdict(name):
    assert not run_all([Program(*FORGERIES[name])])[0].ok


USUAL = {
    "asyncio": ("import asyncio\nasync def g(): return 1\ndef f(): return asyncio.run(g())", "assert f() == 1"),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f():\n    with ThreadPoolExecutor(8) as pool:\n"
        "        return list(pool.map(abs, range(-20, 0)))",
        "assert f() == list(range(20, 0, -1))",
    ),
    "pickled class": ("import pickle\nclass A: pass", "assert isinstance(pickle.loads(pickle.dumps(A())), A)"),
    "source": ("import inspect\ndef f(): return 1", "assert 'return 1' in inspect.getsource(f)"),
    "byte order mark": ("\ufeffdef f(): return 1", "assert f() == 1"),
    "script part": ("def f(): return 1\nif __name__ == '__main__':\n    print(int(input()))", "assert f() == 1"),
    "own class with a comparison": (
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x",
        "assert P(1) == P(1)\nassert P(1) != P(2)\nassert [P(1)] == [P(1)]",
    ),
    "subclasses of plain types": (
        "from collections import defaultdict, namedtuple\nA = namedtuple('A', 'x')\ndef f():\n"
        "    d = defaultdict(int)\n    d['a'] += 1\n    return d, A(1)",
        "assert f() == ({'a': 1}, (1,))",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(9000)\ndef f(n): return n and 1 + f(n - 1)", "assert f(5000) == 5000"
    ),
    "failing destructor": ("class A:\n    def __del__(self): raise ValueError\nA()", "assert 1 == 1.0"),
    "later annotations": ("from __future__ import annotations\ndef f(x: Unknown): return x", "assert f(1) == 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_usual_programs_pass(name):
    assert run_all([Program(*USUAL[name])])[0].reason == ""


@pytest.mark.skipif(not Path("/usr/share/zoneinfo").is_dir(), reason="this machine has no time zones")
def test_time_zones_can_be_read():
    code = "import datetime, zoneinfo\nassert datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo('Asia/Tokyo'))"
    assert run(code).reason == ""


def test_results_keep_their_order_and_programs_are_isolated():
    spoiler = "import builtins, math\nbuiltins.len = None\nmath.sqrt = None\nopen('left', 'w').write('x')"
    witness = "import math, os\nassert len([1]) == math.sqrt(1)\nassert os.listdir('.') == []"
    outcomes = run_all([Program(code) for code in [spoiler, witness, "assert False", GOOD] * 10])
    assert [o.ok for o in outcomes] == [outcomes[0].ok, NAMESPACES, False, True] * 10
    assert run_all([]) == []


def test_equal_programs_give_equal_results():
    program = "import random\nprint(random.random(), set('abcdefgh'), hash('x'))"
    assert len({o.output for o in run_all([Program(program)] * 40)}) == 1


def test_only_the_end_of_long_output_is_kept():
    outcome = run("print('x' * 1_000_000)\nprint('end')", Limits(output_bytes=100))
    assert outcome.ok
    assert len(outcome.output) <= 100
    assert outcome.output.endswith("end\n")


def test_crashed_sandbox_process_fails_only_one_program(monkeypatch, tmp_path):
    without(
        monkeypatch,
        tmp_path,
        ("    mark = secrets", "    if 'DIE' in program[0]: os._exit(9)\n    mark = secrets"),
    )
    outcomes = run_all([Program(GOOD), Program("DIE"), Program(GOOD)])
    assert [o.ok for o in outcomes] == [True, False, True]
    assert "sandbox process died" in outcomes[1].reason


FORK_BOMB = "import os\nwhile True:\n    os.fork()"
THREAD_BOMB = "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()"
MEMORY = "x = []\nwhile True:\n    x.append(bytearray(10_000_000))"
DISK = "i = 0\nwhile True:\n    i += 1\n    open(f'f{i}', 'wb').write(bytes(100_000))"
BIG_FILE = "f = open('f', 'wb')\nwhile True:\n    f.write(bytes(100_000))\n    f.flush()"
CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)"
KILL_PARENT = "import os\nos.kill(os.getppid(), 9)\nos.kill(os.getppid(), 2)\nassert False"
KILL_ALL = "import os, signal\nos.kill(PID, signal.SIGKILL)"
KILL_PIDFD = "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGKILL)"
READ_SECRET = "print(open('SECRET').read())"
READ_HOME = "import os\nprint(os.listdir(os.path.expanduser('~') if 'HOME' in os.environ else 'HOME'))"
DELETE_SECRET = "import os\nos.remove('SECRET')"
SHELL = "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo hi'])"
NATIVE = "import ctypes\nctypes.CDLL(None).fork()"

ESCAPES = {
    name: value
    for name, value in globals().items()
    if name.isupper() and isinstance(value, str) and name not in ("GOOD",)
}


HARMLESS = ("NATIVE", "READ_HOME")
"""What may reach its end without the hook: a refused fork is a mere return value, an empty home can be listed."""


@pytest.fixture
def secret():
    """A world-writable file in the home folder, and a listener on a loopback port."""
    path = Path.home() / f".cogumi-secret-{os.getpid()}"
    path.write_text("top secret")
    path.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield path, server
    path.unlink()


def escape(name, secret):
    path, server = secret
    program = ESCAPES[name].replace("SECRET", str(path)).replace("HOME'))", f"{path.parent}'))")
    program = program.replace("PORT", str(server.getsockname()[1])).replace("PID", str(os.getpid()))
    bad, good = run_all([Program(program), Program(GOOD)], Limits(wall_seconds=5))
    assert good.ok, good.reason  # the same sandbox process continues
    assert path.read_text() == "top secret"
    assert "secret" not in bad.output
    with pytest.raises(TimeoutError):
        server.accept()
    return bad


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_fail(name, secret):
    bad = escape(name, secret)
    assert not bad.ok, bad.output


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_fail_without_namespaces(name, secret, no_namespaces):
    bad = escape(name, secret)
    assert not bad.ok, bad.output
    assert bad.isolation == ("user", "limits", "audit")


@needs_namespaces
@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_fail_without_the_hook(name, secret, no_hook):
    bad = escape(name, secret)
    assert not bad.ok or name in HARMLESS, bad.output


@needs_namespaces
def test_a_bomb_does_not_stop_the_programs_of_another_sandbox(no_hook):
    bomb = threading.Thread(target=run_all, args=([Program(FORK_BOMB)] * 4,))
    bomb.start()
    outcomes = []
    while bomb.is_alive() or len(outcomes) < 20:
        outcomes += run_all([Program(GOOD)] * 4)
    bomb.join()
    assert {outcome.reason for outcome in outcomes} == {""}


@needs_namespaces
def test_programs_cannot_see_the_host():
    program = """
import os
assert os.environ == {}
assert os.getpid() < 10
assert os.getuid() != 0
for path in ("/etc", "/proc", "/sys", "/dev", "/tmp", "/bin", "/var"):
    assert not os.path.exists(path), path
"""
    assert run(program).reason == ""


def test_no_process_or_folder_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run_all([Program(FORK_BOMB), Program(DISK), Program(GOOD)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sandbox_ends_when_its_caller_is_killed():
    """A program that sleeps ends when the caller is killed with SIGKILL."""
    source = "from cogumi.grading.sandbox import run\nrun('import time; time.sleep(60)')"
    caller = subprocess.Popen([sys.executable, "-c", source])
    until(lambda: len(descendants(caller.pid)) >= 3 - (not NAMESPACES))
    mine = descendants(caller.pid)
    caller.kill()
    caller.wait()
    until(lambda: not alive(mine))


def descendants(pid):
    found, waiting = set(), [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            children = {int(child) for child in task.read_text().split()}
            found |= children
            waiting += children
    return found


def alive(pids):
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return [path for path in states if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"]


def test_calls_from_several_threads_are_independent():
    results = {}

    def work(i):
        results[i] = [o.output for o in run_all([Program(f"print({i}, {k})") for k in range(5)])]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [f"{i} {k}\n" for k in range(5)] for i in range(3)}

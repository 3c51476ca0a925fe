"""The code sandbox: results of programs, and real escape attempts that affect only themselves."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cogumi.grading import sandbox
from cogumi.grading.sandbox import Limits, run, run_all
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
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "1 s of CPU"),
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


def test_results_keep_their_order_and_programs_are_isolated():
    spoiler = "import builtins, math\nbuiltins.len = None\nmath.sqrt = None\nopen('left', 'w').write('x')"
    witness = "import math, os\nassert len([1]) == math.sqrt(1)\nassert os.listdir('.') == []"
    outcomes = run_all([spoiler, witness, "assert False", GOOD] * 10)
    assert [o.ok for o in outcomes] == [outcomes[0].ok, NAMESPACES, False, True] * 10
    assert run_all([]) == []


def test_equal_programs_give_equal_results():
    program = "import random\nprint(random.random(), set('abcdefgh'), hash('x'))"
    assert len({o.output for o in run_all([program] * 40)}) == 1


def test_only_the_end_of_long_output_is_kept():
    outcome = run("print('x' * 1_000_000)\nprint('end')", Limits(output_bytes=100))
    assert outcome.ok
    assert len(outcome.output) <= 100
    assert outcome.output.endswith("end\n")


def test_crashed_sandbox_process_fails_only_one_program(monkeypatch, tmp_path):
    without(
        monkeypatch,
        tmp_path,
        ("    mark = secrets", "    if 'DIE' in program: os._exit(9)\n    mark = secrets"),
    )
    outcomes = run_all([GOOD, "DIE", GOOD])
    assert [o.ok for o in outcomes] == [True, False, True]
    assert "sandbox process died" in outcomes[1].reason


FORK_BOMB = "import os\nwhile True:\n    os.fork()"
FORK_BOMB_UNHOOKED = "import threading\nthreading.Thread(target=print).start()"
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
    bad, good = run_all([program, GOOD], Limits(wall_seconds=5))
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
    run_all([FORK_BOMB, DISK, GOOD])
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
        results[i] = [o.output for o in run_all([f"print({i}, {k})" for k in range(5)])]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [f"{i} {k}\n" for k in range(5)] for i in range(3)}

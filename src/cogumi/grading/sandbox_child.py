"""The sandbox's child process: a script run by `grading.sandbox`, standard library only, never imported.

It reads {"programs", "limits"} from standard input, each program as [code, tests], writes one line with the active
isolation layers and then one line per program. `sandbox_program` runs the program. Layers, from the outside in:

network    Linux namespaces, if allowed: no network device,
processes  other processes are invisible,
files      only the Python library (read-only) and a scratch folder in memory, empty for each program
user       if started as root, programs run as a user without rights; otherwise without any capability
limits     always: CPU time, memory, file size, open files, wall time, processes and threads of the user
audit      always: an audit hook rejects sockets, processes, signals, native code and files outside the allowed folders

Without namespaces only the hook protects sockets and files, and programs cannot write any file.
"""

import bisect  # noqa: F401
import collections  # noqa: F401
import contextlib
import copy  # noqa: F401
import ctypes
import datetime  # noqa: F401
import decimal  # noqa: F401
import fractions  # noqa: F401
import functools  # noqa: F401
import heapq  # noqa: F401
import importlib.util
import itertools  # noqa: F401
import json
import math  # noqa: F401
import operator  # noqa: F401
import os
import random
import re  # noqa: F401
import resource
import secrets
import select
import signal
import statistics  # noqa: F401
import string  # noqa: F401
import sys
import sysconfig
import time
import typing  # noqa: F401
from typing import Any

# The unused imports are for the programs: loaded once, they are shared by all forked children.

USER = 30_000 + os.getpid() % 30_000
"""User of the programs of this process, if it was started as root. Its number of processes is limited, and no other
sandbox has this user, so that a program that starts many cannot stop the programs of another one.
"""
SCRATCH = "/scratch"
LIBRARIES = (
    *{sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/lib", "/lib64", "/usr/lib"},
    "/usr/share/zoneinfo",
)

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
PROCESSES = 256
"""Processes and threads of `USER`, so that a bomb ends."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "gc.", "pty.", "signal.pthread_kill", "os.fork", "os.exec",
             "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.chmod", "os.chown", "os.link",
             "os.symlink", "sys._current_frames", "sys._current_exceptions")  # fmt: skip
UNAUDITED_SIGNALS = ("pidfd_send_signal",)
"""The only way to send a signal without an audit event."""
UNAUDITED_TRACING = ("_settraceallthreads", "_setprofileallthreads")
"""Ways to see the frames of other threads without an audit event."""
AF_UNIX = 1
"""The family of the socket pair with which asyncio wakes up its loop; it can be made but not connected."""
READS_PATH = ("os.listdir", "os.scandir", "os.chdir")
WRITES_PATH = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime")

_libc = ctypes.CDLL(None, use_errno=True)
_spec = importlib.util.spec_from_file_location("sandbox_program", sys.argv[1])
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)  # by its path, since its folder is not on the path
_spec.loader.exec_module(_module)
run_program = _module.run_program


def kernel(function: str, *arguments: Any) -> None:
    """Call a C function that returns 0 on success; raise OSError otherwise."""
    if getattr(_libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2) with text arguments."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    kernel("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def enter_namespaces(limits: dict[str, Any]) -> list[str]:
    """Enter the namespaces that the kernel allows; returns the active layers ("processes" applies to children)."""
    if sys.platform != "linux":
        return []
    user, group = os.geteuid(), os.getegid()
    try:
        kernel("unshare", NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NET | (NEW_USER if user else 0))
    except OSError:
        return []
    layers = ["network", "processes"]
    with contextlib.suppress(OSError):
        if user:
            for name, line in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(line)
        enter_own_root(os.getcwd())
        mount_scratch(limits)
        layers.append("files")
    return layers


def mount_scratch(limits: dict[str, Any]) -> None:
    """Mount a new, empty in-memory file system at the scratch folder."""
    options = f"size={8 * limits['file_bytes']},nr_inodes=256,mode=777"
    mount("none", SCRATCH, "tmpfs", NO_SUID | NO_DEV | NO_EXEC, options)


def enter_own_root(root: str) -> None:
    """Make `root`, an empty folder, a file system with only the Python library, and chroot into it."""
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("none", root, "tmpfs", NO_SUID | NO_DEV, "size=1m,mode=755")
    for folder in filter(os.path.isdir, LIBRARIES):
        inside = root + folder
        os.makedirs(inside, exist_ok=True)
        mount(folder, inside, None, BIND)
        # A user namespace must keep the restrictions of the outer mount, so its flags are repeated.
        kept = os.statvfs(folder).f_flag & (NO_SUID | NO_DEV | NO_EXEC)
        mount("none", inside, None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEV | kept)
    os.mkdir(root + SCRATCH)
    mount("none", root, None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEV)
    os.chroot(root)
    os.chdir("/")


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends; must be repeated after a fork or a change of user."""
    if sys.platform == "linux":
        kernel("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def drop_privileges() -> None:
    """Irrevocably change from root to `USER`, or drop every capability of a user namespace."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    elif sys.platform == "linux":
        version_and_pid, no_capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        kernel("capset", version_and_pid, no_capabilities)
    if sys.platform == "linux":
        kernel("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def set_limits(limits: dict[str, Any], may_write: bool) -> None:
    """Set the resource limits of one program; it cannot raise them."""
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"] if may_write else 0),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError):  # macOS has no memory limit
            resource.setrlimit(kind, (value, value))


def add_audit_hook(may_write: bool) -> None:
    """Block, for the rest of this process, all operations that a purely computing program does not need."""
    realpath, decode, under = os.path.realpath, os.fsdecode, tuple(f"{folder}/" for folder in LIBRARIES)

    def permitted(path: Any, writing: bool) -> bool:
        if isinstance(path, int):
            return True
        real = realpath(decode(path if path is not None else ".")) + "/"
        return (may_write and real.startswith(SCRATCH + "/")) or (not writing and real.startswith(under))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.__new__" and arguments[1] == AF_UNIX:
            return
        if event.startswith(FORBIDDEN) or (event == "import" and arguments[0] in ("ctypes", "_ctypes")):
            raise PermissionError(f"the sandbox forbids {event}")
        if event == "open":
            allowed = permitted(arguments[0], bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        elif event in READS_PATH or event in WRITES_PATH:
            paths = arguments[: 2 if event == "os.rename" else 1]
            allowed = all(permitted(path, event in WRITES_PATH) for path in paths)
        else:
            return
        if not allowed:
            raise PermissionError(f"the sandbox forbids {event} of {arguments[0]}")

    sys.addaudithook(hook)


def run_inside(program: tuple[str, str], limits: dict[str, Any], write: int, mark: bytes, layers: list[str]) -> None:
    """In the child: isolate, run the program, and write `mark` and the error (or "") after its output."""
    os.setpgid(0, 0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.closerange(3, 1024)
    may_write = "files" in layers
    if may_write:
        os.chdir(SCRATCH)
    drop_privileges()
    die_with_parent()
    set_limits(limits, may_write)
    os.environ.clear()
    random.seed(0)
    for name in ("ctypes", "_ctypes", "ctypes._endian"):
        sys.modules.pop(name, None)
    for module, names in ((signal, UNAUDITED_SIGNALS), (sys, UNAUDITED_TRACING)):
        for name in filter(vars(module).__contains__, names):
            delattr(module, name)
    add_audit_hook(may_write)
    # The program may replace what modules hold, so the functions that report its verdict are taken before.
    write_out, encode, printed = os.write, json.dumps, sys.stdout
    reason = run_program(*program)
    with contextlib.suppress(ValueError, OSError):
        printed.flush()
    write_out(1, mark + encode(reason).encode())


def drain(read: int, deadline: float, limit: int) -> tuple[bytes, bool]:
    """Read a pipe until it closes; returns its last `limit` bytes, and whether it closed before `deadline`."""
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([read], [], [], left)[0]:
            chunk = os.read(read, 1 << 16)
            if not chunk:
                return data, True
            data = (data + chunk)[-limit:]
    return data, False


def wait(pid: int, deadline: float) -> int | None:
    """Exit status of a child, or None if it was killed at `deadline`."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def kill_rest(pid: int, layers: list[str]) -> None:
    """End the processes that program `pid` left, if it could start any: they count against the next one's limit."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if "processes" in layers:  # this process is the namespace's first, the parent of all orphans
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def why_ended(status: int | None, limits: dict[str, Any]) -> str:
    """The reason for a program that ended without its mark."""
    if status is None:
        return f"took longer than {limits['wall_seconds']:g} s"
    if not os.WIFSIGNALED(status):
        return f"left before its end with exit status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return f"used more than {limits['cpu_seconds']} s of CPU time"
    return f"died of {signal.Signals(number).name}"


def run_one(program: tuple[str, str], limits: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """Fork a child for one program and judge how it ended."""
    mark = secrets.token_bytes(16)  # a program cannot guess it, and an early exit skips it
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run_inside(program, limits, write, mark, layers)
        finally:
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + limits["wall_seconds"]
    data, closed = drain(read, deadline, limits["output_bytes"])
    os.close(read)
    status = wait(pid, deadline if closed else 0.0)
    kill_rest(pid, layers)
    if "files" in layers and os.listdir(SCRATCH):  # replaced only if used: unmounting takes milliseconds
        kernel("umount2", SCRATCH.encode(), DETACH)
        mount_scratch(limits)
    output, marked, judgement = data.partition(mark)
    reason = json.loads(judgement) if marked else why_ended(status, limits)
    return {"ok": marked != b"" and reason == "", "output": output.decode(errors="replace"), "reason": reason}


def main() -> None:
    """Read the plan, isolate this process, run every program in turn."""
    plan = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # The init process of a PID namespace ignores signals from inside for which it has no handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.geteuid() == 0:
        os.seteuid(USER)  # fails early with a clear error if root may not change its user
        os.seteuid(0)
    layers = enter_namespaces(plan["limits"])
    die_with_parent()
    if "processes" in layers:
        if pid := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        die_with_parent()
    os.write(1, json.dumps([*layers, "user", "limits", "audit"]).encode() + b"\n")
    results = os.dup(1)
    for program in plan["programs"]:
        line = json.dumps(run_one(program, plan["limits"], layers)) + "\n"
        with open(results, "w", closefd=False) as file:
            file.write(line)


if __name__ == "__main__":
    main()

"""Running untrusted Python programs (SPEC B4): a few processes, one forked child per program.

`grading.sandbox_child` is the script that runs inside and documents each layer of isolation. A program succeeds if it
and its tests run to their end without an exception; `sys.exit` or `os._exit` is a failure. It runs as a module named
`solution`, so that `if __name__ == "__main__"` does not run. `Outcome.isolation` lists the active layers; limits and
the audit hook are always active. Known limitation: the result is reported by the interpreter that runs the program, so
a program that reads that interpreter's memory from outside of Python could forge its own success; it cannot reach
another program or the machine that way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from cogumi.core.errors import CogumiError

_CHILD, _PROGRAM = (Path(__file__).with_name(name) for name in ("sandbox_child.py", "sandbox_program.py"))
_PROGRAMS_PER_PROCESS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Resources of one program. CPU time is the main limit, so that results do not depend on machine load."""

    cpu_seconds: int = 1
    wall_seconds: float = 60.0
    memory_bytes: int = 256 << 20
    file_bytes: int = 1 << 20
    files: int = 64
    output_bytes: int = 16 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a program: `output` is the end of its output, `reason` the error if not `ok`."""

    ok: bool
    output: str
    reason: str
    isolation: tuple[str, ...]


class Program(NamedTuple):
    """The code of an answer, and tests that run after it in the same module; their `==` does not trust the answer."""

    code: str
    tests: str = ""


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run one program without tests; `run_all` is much faster for many."""
    return run_all([Program(program)], limits)[0]


def run_all(programs: Sequence[Program], limits: Limits | None = None) -> list[Outcome]:
    """Run programs, each in its own child process, and return their outcomes in order."""
    limits = limits or Limits()
    # Two processes per core: one works while the other waits for its child.
    workers = max(1, min(2 * (os.cpu_count() or 1), len(programs) // 16))
    size = min(_PROGRAMS_PER_PROCESS, max(1, -(-len(programs) // workers)))
    groups = [programs[start : start + size] for start in range(0, len(programs), size)]
    with ThreadPoolExecutor(workers) as pool:
        return [outcome for group in pool.map(lambda g: _run_group(g, limits), groups) for outcome in group]


def _run_group(programs: Sequence[Program], limits: Limits) -> list[Outcome]:
    """Outcomes of one group. If the process dies, the running program fails and a new process runs the rest."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(programs):
        reported = _run_process(programs[len(outcomes) :], limits)
        outcomes += reported
        if not reported or len(outcomes) < len(programs):
            outcomes.append(Outcome(False, "", "the sandbox process died while running it", ()))
    return outcomes


def _run_process(programs: Sequence[Program], limits: Limits) -> list[Outcome]:
    """Outcomes of the programs that one sandbox process, started in an empty folder, completed."""
    plan = {"programs": list(programs), "limits": asdict(limits)}
    # Like isolated mode (-I) but without -E: a fixed hash seed makes set order, and so every outcome, reproducible.
    command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(_CHILD), str(_PROGRAM)]
    with tempfile.TemporaryDirectory(prefix="cogumi-sandbox-") as empty:
        process = subprocess.Popen(
            command,
            cwd=empty,
            env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with process:
            try:
                allowed = 30 + len(programs) * (limits.wall_seconds + 1)
                results, errors = process.communicate(json.dumps(plan).encode(), timeout=allowed)
            except subprocess.TimeoutExpired:
                process.kill()
                results, errors = process.communicate()
    lines = results.split(b"\n")[:-1]
    if not lines:
        message = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise CogumiError(f"the code sandbox does not start ({message[0]}): run code checks on Linux or macOS")
    isolation = tuple(json.loads(lines[0]))
    return [Outcome(isolation=isolation, **json.loads(line)) for line in lines[1:]]

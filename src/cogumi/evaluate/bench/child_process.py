"""One engine or cascade in a process of its own, so that its memory can be told from everybody else's.

`python -m cogumi.evaluate.bench.child_process engine OPTIONS` with `Job` as JSON prints a `Told` as JSON, `cascade`
with `Visit` a `Visited`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cogumi.cascade.opening import open_cascade
from cogumi.core.errors import RequestError
from cogumi.core.types import Message, Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply


@dataclass(frozen=True, slots=True)
class Job:
    """Open an engine and answer `prompts`, all at a time, with `tokens` tokens each."""

    model: str
    threads: int
    prompts: list[list[int]]
    tokens: int
    slots: int = 8
    context: int = 512
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """Seconds from the process's first line to an open engine and to its first token, and resident bytes.

    `idle_bytes` is measured with the engine open and nothing asked, `loaded_bytes` after all answers.
    """

    open_seconds: float
    first_token_seconds: float
    idle_bytes: int
    loaded_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Visit:
    """Open a bundle as a cascade for one request at a time, and have it answer `question` with `tokens` tokens."""

    bundle: str
    threads: int
    question: str
    tokens: int
    context: int
    repack: bool


@dataclass(frozen=True, slots=True)
class Visited:
    """Seconds to an open cascade and to its answer, and bytes of memory after it.

    Of the `resident_bytes`, only the `anonymous_bytes` are the process's own: the rest are pages of files, which the
    system may drop and read again. `peak_bytes` is the most that was ever resident.
    """

    open_seconds: float
    answer_seconds: float
    resident_bytes: int
    anonymous_bytes: int
    peak_bytes: int
    tier: str
    tokens: int


def run(job: Job) -> Told:
    """Run a job in a new process; `RequestError` with the last line it said if it failed."""
    return Told(**_spawned("engine", asdict(job)))


def visit(job: Visit) -> Visited:
    """Ask a bundle in a new process; `RequestError` with the last line it said if it failed."""
    return Visited(**_spawned("cascade", asdict(job)))


def _spawned(what: str, job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, what, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RequestError(f"the measuring process failed: {last[0].partition('Error: ')[2] or last[0]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _measure(job: Job) -> Told:
    process = psutil.Process()
    began = process.create_time()
    engine = LlamaEngine(
        Path(job.model), slots=job.slots, context=job.context, threads=job.threads, cache=job.cache, lookup=False
    )
    with closing(engine):
        opened = time.time() - began
        idle = process.memory_info().rss
        running = [engine.generate(Request(prompt=tuple(ids), max_tokens=job.tokens)) for ids in job.prompts]
        next(running[0])
        first = time.time() - began
        for events in running:
            final_reply(events)
        return Told(opened, first, idle, process.memory_info().rss, engine.cache_bytes)


def _visit(job: Visit) -> Visited:
    process = psutil.Process()
    began = process.create_time()
    opening = open_cascade(Path(job.bundle), slots=1, context=job.context, threads=job.threads, repack=job.repack)
    with closing(opening) as cascade:
        opened = time.time() - began
        asked = Request(messages=(Message("user", job.question),), max_tokens=job.tokens)
        reply = final_reply(cascade.generate(asked))
        answered = time.time() - began - opened
        memory = process.memory_info()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        anonymous = memory.rss - memory.shared
        return Visited(opened, answered, memory.rss, anonymous, peak, reply.tier, reply.usage.completion_tokens)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    print(json.dumps(asdict(_measure(Job(**given)) if sys.argv[1] == "engine" else _visit(Visit(**given)))))

"""Run one engine or cascade in a child process, to measure its memory separately.

`python -m cogumi.evaluate.bench.child_process engine OPTIONS` takes an `EngineJob` as JSON and prints an `EngineResult`
as JSON; `cascade` takes a `CascadeJob` and prints a `CascadeResult`.
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
class EngineJob:
    """Open an engine and answer all `prompts` concurrently, with `tokens` tokens each."""

    model: str
    threads: int
    prompts: list[list[int]]
    tokens: int
    slots: int = 8
    context: int = 512
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Seconds from the start of the process to an open engine and to its first token, and resident bytes.

    `idle_bytes` is measured with the engine open before any request, `loaded_bytes` after all answers.
    """

    open_seconds: float
    first_token_seconds: float
    idle_bytes: int
    loaded_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class CascadeJob:
    """Open a bundle as a cascade for one request at a time, and answer `question` with at most `tokens` tokens."""

    bundle: str
    threads: int
    question: str
    tokens: int
    context: int
    repack: bool


@dataclass(frozen=True, slots=True)
class CascadeResult:
    """Seconds to an open cascade and to its answer, and bytes of memory after the answer.

    Of the `resident_bytes`, only the `anonymous_bytes` belong to the process: the rest are pages of mapped files, which
    the system may drop and read again. `peak_bytes` is the largest resident size so far.
    """

    open_seconds: float
    answer_seconds: float
    resident_bytes: int
    anonymous_bytes: int
    peak_bytes: int
    tier: str
    tokens: int


def run_engine(job: EngineJob) -> EngineResult:
    """Run an engine in a new process; `RequestError` with the last line of its error output if it fails."""
    return EngineResult(**_spawned("engine", asdict(job)))


def run_cascade(job: CascadeJob) -> CascadeResult:
    """Run a cascade in a new process; `RequestError` with the last line of its error output if it fails."""
    return CascadeResult(**_spawned("cascade", asdict(job)))


def _spawned(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, kind, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no error output"]
        raise RequestError(f"the measuring process failed: {last[0].partition('Error: ')[2] or last[0]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _engine(job: EngineJob) -> EngineResult:
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
        return EngineResult(opened, first, idle, process.memory_info().rss, engine.cache_bytes)


def _cascade(job: CascadeJob) -> CascadeResult:
    process = psutil.Process()
    began = process.create_time()
    opening = open_cascade(Path(job.bundle), slots=1, context=job.context, threads=job.threads, repack=job.repack)
    with closing(opening) as cascade:
        opened = time.time() - began
        request = Request(messages=(Message("user", job.question),), max_tokens=job.tokens)
        reply = final_reply(cascade.generate(request))
        answered = time.time() - began - opened
        memory = process.memory_info()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        anonymous = memory.rss - memory.shared
        return CascadeResult(opened, answered, memory.rss, anonymous, peak, reply.tier, reply.usage.completion_tokens)


def _main(kind: str, options: str) -> None:
    job = json.loads(options)
    result = _engine(EngineJob(**job)) if kind == "engine" else _cascade(CascadeJob(**job))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    _main(*sys.argv[1:3])

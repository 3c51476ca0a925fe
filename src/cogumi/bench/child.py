"""One engine in a process of its own, so that its memory can be told from everybody else's.

`python -m cogumi.bench.child OPTIONS` with `Job` as JSON prints a `Told` as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cogumi.errors import RequestError
from cogumi.runtime.engine import final_reply
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.types import Request


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


def run(job: Job) -> Told:
    """Run a job in a new process; `RequestError` with the last line it said if it failed."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RequestError(f"the measuring process failed: {last[0].partition('Error: ')[2] or last[0]}")
    return Told(**json.loads(done.stdout))


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


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(Job(**json.loads(sys.argv[1]))))))

"""Row `busy`: requests beside programs that keep the processors busy, against without (SPEC H4)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial

from cogumi.core.types import Reply, Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.evaluate.bench.paired import Pairs, Row, Setup, alternate, answer, decode_rate

LOOPS = 2
"""Least number of busy loops; with more threads, as many as threads."""
LEAST = 0.4
"""Least share of the quiet speed. One loop per processor leaves half of it."""
PROMPT, TOKENS, REQUESTS = 128, 32, 2
CONTEXT = PROMPT + TOKENS
"""Tokens of a prompt and of its answer, and requests per measurement."""
_LOOP = """
import sys, threading

def compute():
    while True:
        sum(range(10_000))

threading.Thread(target=compute, daemon=True).start()
print(flush=True)
sys.stdin.read()
"""
"""Prints a line and computes until its standard input is closed, at the latest by the end of its parent."""


def busy(setup: Setup) -> Row:
    """Tokens per second of answers beside busy loops, against without; for reading their prompts in the conditions.

    Every measurement opens an engine, which finds its number of threads while the machine is quiet; then the loops
    start. So the time until the engine notices them is part of the figures.
    """
    loops = max(LOOPS, setup.threads)
    reading = Pairs([], [])

    def rate(beside: int, prompts: list[float]) -> float:
        with closing(LlamaEngine(setup.model, slots=1, context=CONTEXT, threads=setup.threads, lookup=False)) as engine:

            def ask() -> Reply:
                return answer(engine, Request(prompt=setup.passage(PROMPT), max_tokens=TOKENS))

            ask()
            with busy_loops(beside):
                replies = [ask() for _ in range(REQUESTS)]
        prompts.append(REQUESTS * PROMPT / sum(reply.signals["first_token_seconds"] for reply in replies))
        return REQUESTS / sum(1 / decode_rate(reply) for reply in replies)

    pairs = alternate(partial(rate, loops, reading.ours), partial(rate, 0, reading.theirs), setup.tick)
    row = pairs.row("busy", "tokens/s", least=LEAST, loops=loops, prompt_tokens=PROMPT, tokens=TOKENS)
    prompts = reading.row("busy", "tokens/s", least=LEAST)
    more = {
        "met": row.conditions["met"] and prompts.conditions["met"],
        "prompt_ratio": round(reading.ratio, 3),
        "prompt_spread": prompts.conditions["spread"],
    }
    return replace(row, conditions=row.conditions | more)


@contextmanager
def busy_loops(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many child processes that compute without pause, all of them from the beginning of the block to its end."""
    with ExitStack() as running:
        loops = []
        for _ in range(count):
            command, pipe = [sys.executable, "-c", _LOOP], subprocess.PIPE
            loop = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            running.enter_context(loop)  # closes its input and waits for its end
            running.callback(loop.kill)
            loops.append(loop)
        for loop in loops:
            assert loop.stdout
            loop.stdout.readline()
        yield loops

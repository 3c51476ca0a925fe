"""Rows about memory: bytes per token of context in each cache type, and memory of an engine (SPEC D8)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Any

from cogumi.core.types import Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.evaluate.bench.cache_quality import perplexity
from cogumi.evaluate.bench.child_process import EngineJob, run_engine
from cogumi.evaluate.bench.paired import Row, Setup, alternate, answer, decode_rate

SMALL, LARGE = 256, 2304
"""Two context lengths; the difference in memory is due to the cache alone."""
SLOTS, FILLED = 8, 128
LENGTH, ANSWER = 512, 64
"""Context length for speed and perplexity, and number of timed tokens at its end."""


def kv_cache(setup: Setup, type: str, goal: float) -> Row:
    """Resident bytes per token of context in a cache of `type`, against f16; also its speed and perplexity.

    Every context is opened in a new process; llama.cpp clears its cache, so that all of it is resident.
    """
    prompt = list(setup.passage(FILLED))
    job = EngineJob(str(setup.model), setup.threads, [prompt], 2, slots=SLOTS, context=SMALL)

    def per_token(cache: str) -> float:
        small, large = (run_engine(replace(job, cache=cache, context=n)) for n in (SMALL, LARGE))
        return (large.loaded_bytes - small.loaded_bytes) / (SLOTS * (LARGE - SMALL))

    pairs = alternate(lambda: per_token(type), lambda: per_token("f16"), setup.tick, 2)
    conditions: dict[str, Any] = {"slots": SLOTS, "contexts": [SMALL, LARGE]}
    with (
        closing(LlamaEngine(setup.model, slots=2, context=LENGTH, threads=setup.threads, cache=type)) as engine,
        closing(LlamaEngine(setup.model, slots=2, context=LENGTH, threads=setup.threads, cache="f16")) as plain,
    ):
        conditions["computed_bytes_per_token"] = [engine.cache_bytes, plain.cache_bytes]

        def rate(which: LlamaEngine) -> float:
            return decode_rate(answer(which, Request(prompt=setup.passage(LENGTH - ANSWER), max_tokens=ANSWER)))

        speed = alternate(lambda: rate(engine), lambda: rate(plain), setup.tick, 2)
        conditions["decode_speed"] = round(speed.ratio, 3)
    if setup.text is not None:
        before, after = (perplexity(setup.model, setup.text, cache, LENGTH) for cache in ("f16", type))
        conditions["perplexity"] = {"f16": round(before, 4), type: round(after, 4)}
        conditions["perplexity_change"] = round(after / before - 1, 5)
    return pairs.row(f"kv_{type}", "B/token", most=goal, **conditions)


def start(setup: Setup) -> Row:
    """Seconds from the start of a process to the first token, and resident memory idle and with all slots used."""
    prompts = [list(setup.passage(16)) for _ in range(SLOTS)]
    job = EngineJob(str(setup.model), setup.threads, prompts, 16, slots=SLOTS)
    results = [run_engine(job) for _ in range(3)]
    first, opened = median(r.first_token_seconds for r in results), median(r.open_seconds for r in results)
    size = setup.model.stat().st_size
    return Row(
        "start",
        first / opened,
        first,
        opened,
        "s",
        {
            "value": "process start to first token",
            "baseline": "process start to open engine",
            "idle_bytes": results[0].idle_bytes,
            "loaded_bytes": results[0].loaded_bytes,
            "file_bytes": size,
        },
    )

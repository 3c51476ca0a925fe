"""Rows about adapters: what a switch costs when the adapter is warm, and when it has yet to be loaded (SPEC E8)."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

from cogumi.bench.measure import Row, Setup, alternate, answer
from cogumi.bench.shapes import make_adapter
from cogumi.bench.speed import PROMPT, first_token
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.types import Request

SIZE = 50_000_000
"""Bytes of an adapter; a twelfth of a small model."""


def adapter_warm(setup: Setup) -> Row:
    """Requests to base and adapter by turns, against the same requests sorted: what switching adds to a step.

    What the adapter's own products add to its steps is no cost of switching; it stands in the conditions.
    """
    tokens, each = 16, 4
    path = _adapter(setup)
    engine = LlamaEngine(setup.model, threads=setup.threads, adapters={"modifier": path})
    with closing(engine):

        def rate(names: list[str | None]) -> float:
            requests = [Request(prompt=setup.passage(PROMPT), max_tokens=tokens, adapter=name) for name in names]
            began = time.perf_counter()
            total = sum(len(answer(engine, request).tokens) for request in requests)
            return total / (time.perf_counter() - began)

        base: list[str | None] = [None] * each
        modified: list[str | None] = ["modifier"] * each
        switching = [name for pair in zip(base, modified, strict=True) for name in pair]
        rate(switching)
        pairs = alternate(lambda: rate(switching), lambda: rate(base + modified), setup.tick)
        own = alternate(lambda: rate(modified), lambda: rate(base), setup.tick)
    row = pairs.row("adapter_warm", "tokens/s")
    told = {
        "goal": "about 1",
        "met": row.conditions["spread"][1] >= 1,
        "adapter_bytes": path.stat().st_size,
        "against": "the same requests, those to the base first",
        "adapter_against_base": round(own.ratio, 3),
    }
    return replace(row, conditions=row.conditions | told)


def adapter_cold(setup: Setup) -> Row:
    """Time to load an adapter and answer with its first token, against the base's first token."""
    path = _adapter(setup)
    names = iter(range(1000))
    with closing(LlamaEngine(setup.model, slots=2, threads=setup.threads)) as engine:

        def cold() -> float:
            name = f"modifier{next(names)}"
            began = time.perf_counter()
            engine.add_adapter(name, path)
            first_token(engine, Request(prompt=setup.passage(PROMPT), max_tokens=1, adapter=name))
            return (time.perf_counter() - began) * 1000

        def warm() -> float:
            return first_token(engine, Request(prompt=setup.passage(PROMPT), max_tokens=1)) * 1000

        warm(), cold()
        pairs = alternate(cold, warm, setup.tick)
    extra = [a - b for a, b in zip(pairs.ours, pairs.theirs, strict=True)]
    return pairs.row(
        "adapter_cold",
        "ms",
        goal="< +200 ms",
        met=median(extra) < 200,
        extra_ms=round(median(extra), 1),
        extra_ms_spread=[round(min(extra), 1), round(max(extra), 1)],
        adapter_bytes=path.stat().st_size,
    )


def _adapter(setup: Setup) -> Path:
    return make_adapter(setup.folder, setup.made(), min(SIZE, setup.model.stat().st_size // 12))

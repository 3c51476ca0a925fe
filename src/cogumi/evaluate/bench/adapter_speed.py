"""Rows about adapters: cost of switching to a loaded adapter and of loading one (SPEC E8), and of adapting a head to a
request's examples (SPEC C9).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from cogumi.core.types import Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.llama.output_head import Head, LowRank
from cogumi.evaluate.bench.paired import ROUNDS, Row, Setup, alternate, answer
from cogumi.evaluate.bench.speed import PROMPT, first_token
from cogumi.evaluate.bench.synthetic_models import make_adapter

HEADS = ((1024, 128), (32_768, 2048), (131_072, 2048))
"""Vocabulary and width of the heads to time."""
EXAMPLES, LENGTH, ANSWER, STEPS, RANK = 3, 40, 15, 3, 8
"""Number of examples, tokens of each and of its answer, steps of gradient descent, rank."""
SIZE = 50_000_000
"""Bytes of an adapter; for small models a twelfth of the model."""


def adapter_warm(setup: Setup) -> Row:
    """Alternating requests to base and adapter, against the same requests sorted: the cost of switching.

    The cost of the adapter's own matrix products is reported separately, in the conditions.
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
    conditions = {
        "goal": "about 1",
        "met": row.conditions["spread"][1] >= 1,
        "adapter_bytes": path.stat().st_size,
        "against": "the same requests, those to the base first",
        "adapter_against_base": round(own.ratio, 3),
    }
    return replace(row, conditions=row.conditions | conditions)


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


def head_adaptation(setup: Setup) -> Row:
    """Milliseconds to adapt a head of this model's size to three short examples, against reading the examples."""
    with closing(LlamaEngine(setup.model, threads=setup.threads)) as engine:
        own = _adapting(engine.tokenizer.size, engine.embed(["a"]).shape[1])

        def read() -> float:
            began = time.perf_counter()
            for _ in range(EXAMPLES):
                engine.read(Request(prompt=setup.passage(LENGTH)))
            return (time.perf_counter() - began) * 1000

        own(), read()
        pairs = alternate(own, read, setup.tick)
    times = {}
    for vocabulary, width in HEADS:
        adapt = _adapting(vocabulary, width)
        times[f"{vocabulary} x {width}"] = round(median(adapt() for _ in range(ROUNDS)), 2)
    vocabulary, width = HEADS[0]
    return pairs.row(
        "head_adaptation",
        "ms",
        goal=f"< 20 ms at {vocabulary} x {width}",
        met=times[f"{vocabulary} x {width}"] < 20,
        milliseconds=times,
        answer_tokens=EXAMPLES * ANSWER,
        steps=STEPS,
        rank=RANK,
    )


def _adapting(vocabulary: int, width: int) -> Callable[[], float]:
    """A function that adapts a head of that size to random states and returns the milliseconds it took."""
    draw, n = np.random.default_rng(0), EXAMPLES * ANSWER

    def drawn(*shape: int) -> NDArray[np.float32]:
        return draw.normal(0, 0.05, shape).astype(np.float32)

    head = Head(LowRank(drawn(RANK, width), drawn(vocabulary, RANK), 1.0), lr=5e-3, steps=STEPS)
    support = drawn(n, width), draw.integers(0, vocabulary, n), drawn(n, vocabulary)

    def adapt() -> float:
        began = time.perf_counter()
        head.adapt(*support)
        return (time.perf_counter() - began) * 1000

    return adapt


def _adapter(setup: Setup) -> Path:
    return make_adapter(setup.folder, setup.synthetic_shape(), min(SIZE, setup.model.stat().st_size // 12))

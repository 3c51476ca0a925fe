"""Soak test with many clients, adapters, lengths, cancellations and drafts: every answer must equal that of the same
request running alone.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeAlias

import psutil

from cogumi.core.types import Reply, Request, Token
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Event
from cogumi.evaluate.bench.adapter_speed import SIZE
from cogumi.evaluate.bench.paired import Row, Setup, answer
from cogumi.evaluate.bench.synthetic_models import make_adapter, make_draft, make_model

REQUESTS, CLIENTS, SLOTS, CONTEXT = 200, 16, 8, 256
CANCELLED = 0.25
"""Share of the requests that the client cancels."""
WARM = 3.5
"""Temperature of sampled requests, at which the chain's next token has a probability of about one half."""
GROWTH = 16_000_000
"""Permitted growth of resident memory in bytes after the first round: allows for fragmentation, but not for a leak."""

Bits: TypeAlias = tuple[tuple[int, float, float, float], ...]
"""Every token of an answer with its signals, which depend on the logits to the last bit."""


def soak(setup: Setup) -> Row:
    """Rounds of `REQUESTS` requests from `CLIENTS` threads until `minutes` have passed, at Q8_0.

    `value` is the number of completed answers that equal those of the same requests alone, bit for bit; `baseline` that
    of all completed ones. All slots must be free at the end, and resident memory must not grow after the first round.
    """
    shape = setup.synthetic_shape()
    model = make_model(setup.folder, shape, "q8_0")
    adapter = make_adapter(setup.folder, shape, min(SIZE, model.stat().st_size // 12))
    engine = LlamaEngine(
        model,
        slots=SLOTS,
        context=CONTEXT,
        threads=setup.threads,
        draft=make_draft(setup.folder, shape, 0.75, "q8_0"),  # sampled drafts depend on its distribution too
        adapters={"one": adapter, "two": adapter},
    )
    requests = [_request(setup, random.Random(i)) for i in range(REQUESTS)]
    counts: Counter[str] = Counter()
    memory: list[int] = []
    with closing(engine), ThreadPoolExecutor(CLIENTS) as clients:
        alone: list[Bits] = []
        for request in requests:
            alone.append(_bits(answer(engine, request)))
            setup.tick(len(alone) / REQUESTS / 2)
        began, over = time.monotonic(), setup.minutes * 60
        while (spent := time.monotonic() - began) < over or not memory:
            setup.tick(0.5 + 0.5 * min(spent / over, 1.0) if over else 0.5)
            counts.update(_round(engine, clients, requests, alone, len(memory)))
            memory.append(psutil.Process().memory_info().rss)
        seconds = time.monotonic() - began
        free = _free_slots(engine)
    done = counts["equal"] + counts["different"]
    growth = memory[-1] - memory[0]
    return Row(
        "soak",
        counts["equal"] / done,
        counts["equal"],
        done,
        "completed answers",
        {
            "goal": "all equal",
            "met": counts["equal"] == done and free == SLOTS and growth < GROWTH,
            "rounds": len(memory),
            "cancelled": counts["cancelled"],
            "slots_free": f"{free} of {SLOTS}",
            "resident_bytes": memory[-1],
            "grown_since_first_round": growth,
            "minutes": round(seconds / 60, 2),
            "requests_per_second": round(counts.total() / seconds, 2),
        },
    )


def _request(setup: Setup, rng: random.Random) -> Request:
    """A request of random length, adapter, sampling and drafting."""
    return Request(
        prompt=setup.passage(rng.randint(1, CONTEXT // 2)),
        max_tokens=rng.randint(1, CONTEXT // 4),
        temperature=WARM if rng.random() < 0.3 else 0.0,
        seed=rng.randrange(1000),
        adapter=rng.choice([None, "one", "two"]),
        speculate=rng.choice([None, True, False]),
    )


def _round(
    engine: LlamaEngine, clients: ThreadPoolExecutor, requests: Sequence[Request], alone: Sequence[Bits], seed: int
) -> list[str]:
    """Run all requests in a new order and cancel some of them; the outcome of each."""
    rng = random.Random(seed)
    order = rng.sample(range(len(requests)), len(requests))
    stops = [rng.randint(0, 8) if rng.random() < CANCELLED else None for _ in order]

    def client(i: int, stop: int | None) -> str:
        events = engine.generate(requests[i])
        found: list[Event] = []
        for event in events:
            if stop is not None and len(found) >= stop:
                events.close()  # type: ignore[attr-defined]
                return "cancelled"
            found.append(event)
        reply = found[-1]
        assert isinstance(reply, Reply)
        return "equal" if _bits(reply) == alone[i] else "different"

    return list(clients.map(client, order, stops))


def _bits(reply: Reply) -> Bits:
    return tuple(_signals(token) for token in reply.tokens)


def _signals(token: Token) -> tuple[int, float, float, float]:
    return token.id, token.logprob, token.entropy, token.margin


def _free_slots(engine: LlamaEngine) -> int:
    """Number of free slots, after waiting up to five seconds for those of cancelled requests."""
    until = time.monotonic() + 5
    while engine.free_slots < SLOTS and time.monotonic() < until:
        time.sleep(0.05)
    return engine.free_slots

"""Rows about speed: one request against a bare llama.cpp loop, many against llama.cpp's server, drafts against none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version

from cogumi.core.types import Request
from cogumi.engine.llama.binding.greedy import greedy_loop
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.llama.speculative.latency_measurement import GPU, LAPTOP_8_CORES
from cogumi.engine.llama.speculative.latency_measurement import estimate_speedups as paper
from cogumi.engine.protocol import Engine, final_reply
from cogumi.evaluate.bench.llama_server import LlamaServer
from cogumi.evaluate.bench.paired import Row, Setup, alternate, answer, decode_rate
from cogumi.evaluate.bench.synthetic_models import make_draft

PROMPT = 16
"""Tokens of a short prompt."""
COPIED, EDIT_EVERY = 300, 16
"""Tokens of the passage that the answer copies, and distance between edited tokens."""
CACHE = "f16"
"""Type of the key-value cache in comparisons with other software: their default."""
QUIET = 0.3
"""Seconds between the turns of two engines, in which the threads of the first stop spinning."""


def single_stream(setup: Setup) -> Row:
    """One request through the engine with default settings, against a bare llama.cpp loop on the same file."""
    tokens, context = 96, 512
    model = Model(setup.model)

    def bare() -> float:
        ids = setup.passage(PROMPT)
        return (tokens - 1) / greedy_loop(model, ids, tokens, length=context, threads=setup.threads)[1]

    with closing(LlamaEngine(setup.model, context=context, threads=setup.threads, cache=CACHE)) as engine:

        def ours() -> float:
            return decode_rate(answer(engine, Request(prompt=setup.passage(PROMPT), max_tokens=tokens)))

        ours(), bare()
        pairs = alternate(ours, bare, setup.tick)
    return pairs.row(
        "single_stream",
        "tokens/s",
        least=0.97,
        tokens=tokens,
        cache=CACHE,
        against="a bare llama_decode loop",
    )


def concurrency(setup: Setup, users: int) -> Row:
    """Concurrent requests of all users: total tokens per second, against llama.cpp's server in another process."""
    tokens, context, rounds = 64, 256, 9
    with (
        closing(LlamaEngine(setup.model, slots=users, context=context, threads=setup.threads, cache=CACHE)) as engine,
        closing(LlamaServer(setup.model, slots=users, context=context, threads=setup.threads)) as server,
    ):
        idle: list[float] = []  # share of a processor used by one side during the other's turn

        def ours() -> float:
            requests = [Request(prompt=setup.passage(PROMPT), max_tokens=tokens) for _ in range(users)]
            time.sleep(QUIET)
            busy, began = server.processor_seconds(), time.perf_counter()
            running = [engine.generate(request) for request in requests]
            total = sum(len(final_reply(events).tokens) for events in running)
            seconds = time.perf_counter() - began
            idle.append((server.processor_seconds() - busy) / seconds)
            return total / seconds

        def theirs() -> float:
            prompts = [setup.passage(PROMPT) for _ in range(users)]
            time.sleep(QUIET)
            busy, began = time.process_time(), time.perf_counter()
            total = sum(map(len, server.complete(prompts, [tokens] * users)))
            seconds = time.perf_counter() - began
            idle.append((time.process_time() - busy) / seconds)
            return total / seconds

        ours(), theirs()
        pairs = alternate(ours, theirs, setup.tick, rounds)
    return pairs.row(
        f"concurrency_{users}",
        "tokens/s",
        least=1.0,
        users=users,
        tokens=tokens,
        cache=CACHE,
        against=f"llama.cpp's server, xllamacpp {version('xllamacpp')}",
        idle_processors=round(max(idle), 3),
    )


def speculation(setup: Setup, accept: float) -> Row:
    """Adaptive drafting against none, with a draft of a known acceptance rate; also with drafting forced on."""
    tokens = 64
    draft = make_draft(setup.folder, setup.synthetic_shape(), accept)
    with closing(LlamaEngine(setup.model, threads=setup.threads, draft=draft, lookup=False)) as engine:

        def rate(speculate: bool | None) -> float:
            request = Request(prompt=setup.passage(PROMPT), max_tokens=tokens, speculate=speculate)
            found = answer(engine, request)
            kept.append((found.usage.accepted, found.usage.drafted) if speculate else (0, 0))
            return decode_rate(found)

        kept: list[tuple[int, int]] = []
        rate(False)
        pairs = alternate(lambda: rate(None), lambda: rate(False), setup.tick, 9)
        forced = alternate(lambda: rate(True), lambda: rate(False), setup.tick, 2)
    assert engine.latency
    return pairs.row(
        f"speculation_{accept:g}",
        "tokens/s",
        least=0.97,
        forced=round(forced.ratio, 3),
        draft_bytes=draft.stat().st_size,
        draft_ms=_ms(engine.latency.draft),
        verify_ms=[_ms(seconds) for seconds in engine.latency.verify],
        kept_of_drafted=_kept(kept),
    )


def ngram(setup: Setup) -> Row:
    """Adaptive n-gram lookup in the prompt against none, on an answer that copies an edited passage."""
    tokens = 96
    setup.synthetic_shape()

    def prompt() -> tuple[int, ...]:
        """An edited passage, other words, and a word of the passage, after which the answer continues the passage."""
        passage = setup.passage(COPIED)
        other = setup.passage(COPIED // EDIT_EVERY + 1)
        edited = [other[i // EDIT_EVERY] if i % EDIT_EVERY == 0 else word for i, word in enumerate(passage)]
        return (*edited, *other, passage[EDIT_EVERY // 2])

    with closing(LlamaEngine(setup.model, threads=setup.threads, lookup=True)) as engine:

        def rate(speculate: bool | None) -> float:
            reply = answer(engine, Request(prompt=prompt(), max_tokens=tokens, speculate=speculate))
            kept.append((reply.usage.accepted, reply.usage.drafted))
            return decode_rate(reply)

        kept: list[tuple[int, int]] = []
        pairs = alternate(lambda: rate(None), lambda: rate(False), setup.tick)
    return pairs.row(
        "ngram",
        "tokens/s",
        least=1.2,
        copied=f"{COPIED} tokens, every {EDIT_EVERY}th of them edited",
        kept_of_drafted=_kept(kept),
    )


def prefill_ahead(setup: Setup) -> Row:
    """Time to the first token of a long prompt of which 95% was prefilled, against reading all of it."""
    length, rounds = 1000, 3
    with closing(LlamaEngine(setup.model, slots=2, context=length + 8, threads=setup.threads)) as engine:

        def cold() -> float:
            return first_token(engine, Request(prompt=setup.passage(length), max_tokens=1))

        def ahead() -> float:
            prompt = setup.passage(length)
            engine.prefill("typing", Request(prompt=prompt[: length * 95 // 100])).result()
            return first_token(engine, Request(prompt=prompt, max_tokens=1, session="typing"))

        answer(engine, Request(prompt=setup.passage(PROMPT), max_tokens=2))
        pairs = alternate(ahead, cold, setup.tick, rounds)
    return pairs.row("prefill_ahead", "s", most=0.25, prompt_tokens=length, typed_ahead=0.95)


def first_token(engine: Engine, request: Request) -> float:
    """Seconds from the request to the first token."""
    return answer(engine, request).signals["first_token_seconds"]


def on_paper(_: Setup, accept: Sequence[float]) -> Row:
    """The draft lengths that the controller would choose on other machines, from assumed latencies."""
    machines = {"laptop with 8 cores": LAPTOP_8_CORES, "graphics card": GPU}
    found = {name: paper(costs, accept) for name, costs in machines.items()}
    best = max(row.speedup for rows in found.values() for row in rows)
    rows = {n: [{"accept": r.acceptance, "k": r.k, "speedup": round(r.speedup, 3)} for r in found[n]] for n in found}
    return Row("on_paper", best, best, 1.0, "x", {"assumed": True, "machines": rows})


def _kept(counts: Sequence[tuple[int, int]]) -> float:
    """Share of drafted tokens that were accepted, from (accepted, drafted) of each answer."""
    return round(sum(kept for kept, _ in counts) / max(sum(drafted for _, drafted in counts), 1), 3)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)

"""Row `price`: the speed of a bundle's answers against llama.cpp's server on the same file (SPEC H4).

Asked are questions that the base answers alone, where the server generates what the cascade generates. The questions
are the held-out ones in the folder `data` beside the bundle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from cogumi.cascade.cascade import Cascade
from cogumi.cascade.execute import with_system
from cogumi.cascade.opening import open_cascade
from cogumi.core.errors import RequestError
from cogumi.core.types import Request
from cogumi.data.examples import SPLITS, read_examples, split_path
from cogumi.engine.protocol import replies
from cogumi.evaluate.bench.llama_server import LlamaServer
from cogumi.evaluate.bench.paired import Pairs, Row, Setup, alternate
from cogumi.evaluate.bench.speed import CACHE, QUIET
from cogumi.evaluate.report_baselines import base_alone, timed

STREAMS, CONTEXT, TOKENS = 8, 1024, 64
"""Answers at a time, also in one measurement of one after the other; context and longest answer in tokens."""
SURVEYED = 200
"""Questions that are asked to find those that the base answers alone."""
LEAST = 0.95
"""Least speed, of the server's."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its prompt and the number of tokens of its answer."""

    request: Request
    prompt: Sequence[int]
    tokens: int


def price(setup: Setup) -> Row:
    """Tokens per second of one answer after the other, from each request to its last token.

    In the conditions: tokens per second of `STREAMS` answers at a time, and seconds to the first token.
    """
    if setup.bundle is None:
        raise RequestError("this row needs a bundle: --model runs/smollm2/bundle")
    size: dict[str, Any] = {"slots": STREAMS, "context": CONTEXT, "threads": setup.threads}
    with (
        closing(open_cascade(setup.bundle, cache=CACHE, **size)) as cascade,
        closing(LlamaServer(setup.model, **size)) as server,
    ):
        questions = answered_by_base(cascade, setup.bundle)
        first = Pairs([], [])

        def cascade_one(asked: Asked) -> tuple[float, float]:
            return timed(cascade, asked.request)

        def server_one(asked: Asked) -> tuple[float, float]:
            return server.timed(asked.prompt, asked.tokens)

        def cascade_all(some: Sequence[Asked]) -> None:
            list(replies(cascade, [asked.request for asked in some], STREAMS))

        def server_all(some: Sequence[Asked]) -> None:
            server.complete([asked.prompt for asked in some], [asked.tokens for asked in some])

        ours = _one_by_one(questions, cascade_one, first.ours)
        theirs = _one_by_one(questions, server_one, first.theirs)
        alone = alternate(ours, theirs, lambda share: setup.tick(share / 2))
        ours, theirs = _at_once(questions, cascade_all), _at_once(questions, server_all)
        together = alternate(ours, theirs, lambda share: setup.tick((1 + share) / 2))
    row = alone.row("price", "tokens/s", least=LEAST, questions=len(questions), cache=CACHE)
    others = {f"{STREAMS}_streams": together, "first_token_seconds": first}
    more = {name: _summary(pairs) for name, pairs in others.items()}
    against = {"against": f"llama.cpp's server, xllamacpp {version('xllamacpp')}"}
    return replace(row, conditions=row.conditions | more | against)


def answered_by_base(cascade: Cascade, bundle: Path) -> list[Asked]:
    """Held-out questions that the base alone answers in its default mode, with at least two tokens.

    `RequestError` if there are fewer than `STREAMS` among the first `SURVEYED`.
    """
    path = split_path(bundle.parent / "data", SPLITS[-1])
    if not path.is_file():
        raise RequestError(f"the questions are missing: {path}; name a bundle in the folder of its build")
    requests = [Request(messages=e.messages, max_tokens=TOKENS) for e in read_examples(path)[:SURVEYED]]
    found = []
    for request, reply in zip(requests, replies(cascade, requests, STREAMS), strict=True):
        if base_alone(reply) and len(reply.tokens) > 1:
            prompt = cascade.tokenizer.render(with_system(request, cascade.services.system))
            found.append(Asked(request, prompt, len(reply.tokens)))
    if len(found) < STREAMS:
        raise RequestError(f"the base alone answered {len(found)} of {len(requests)} questions; {STREAMS} are needed")
    return found


def _one_by_one(
    questions: Sequence[Asked], answer: Callable[[Asked], tuple[float, float]], firsts: list[float]
) -> Callable[[], float]:
    """A function that asks the next questions one by one: tokens per second; `firsts` gets the mean time to the first
    token. `answer` returns the seconds to the first token and to the end.
    """
    turns = cycle(questions)

    def measure() -> float:
        some = list(islice(turns, STREAMS))
        time.sleep(QUIET)
        times = [answer(asked) for asked in some]
        firsts.append(sum(first for first, _ in times) / len(times))
        return sum(asked.tokens for asked in some) / sum(whole for _, whole in times)

    return measure


def _at_once(questions: Sequence[Asked], answer: Callable[[Sequence[Asked]], None]) -> Callable[[], float]:
    """A function that asks the next questions at once: tokens per second in all."""
    turns = cycle(questions)

    def measure() -> float:
        some = list(islice(turns, STREAMS))
        time.sleep(QUIET)
        began = time.perf_counter()
        answer(some)
        return sum(asked.tokens for asked in some) / (time.perf_counter() - began)

    return measure


def _summary(pairs: Pairs) -> dict[str, Any]:
    row = pairs.row("", "")
    return {
        "ratio": round(pairs.ratio, 3),
        "spread": row.conditions["spread"],
        "cascade": row.value,
        "server": row.baseline,
    }

"""Self-consistency: several sampled answers to one request, and what most of them say (SPEC F13)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np

from cogumi.confidence.signals import answer_signals, perplexity
from cogumi.confidence.vote import final_answer, tally
from cogumi.core.errors import RequestError
from cogumi.core.types import Reply, Request, Usage
from cogumi.engine.protocol import Engine, Event, missing_reply

T = TypeVar("T")
FEWEST, MOST = 3, 10
"""How many paths may vote."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How further answers to a request are drawn."""

    temperature: float = 0.8
    top_p: float = 0.9
    frequency_penalty: float = 1.2

    def requests(self, request: Request, count: int, first: int = 0) -> list[Request]:
        """The request `count` times; if it has a seed, each gets its own from that seed and its number from `first`."""
        seeds = [None if request.seed is None else _seed(request.seed, first + i) for i in range(count)]
        drawn = replace(
            request, temperature=self.temperature, top_p=self.top_p, frequency_penalty=self.frequency_penalty
        )
        return [replace(drawn, seed=seed) for seed in seeds]


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


SAMPLING = Sampling()


@dataclass(frozen=True, slots=True)
class Vote:
    """What the paths came to: `winner` and its `text` are None if no two of them agree.

    `agreement` is the share of all paths that say the same as the winner; `usage` sums all `replies`.
    """

    winner: Reply | None
    agreement: float
    replies: tuple[Reply, ...]
    usage: Usage

    @property
    def text(self) -> str | None:
        """The winner's."""
        return self.winner.text if self.winner else None


def vote(
    engine: Engine,
    request: Request,
    *,
    paths: int = 5,
    sampling: Sampling = SAMPLING,
) -> Generator[None, None, Vote]:
    """Ask all paths at once and count. Yields None while waiting; closing it cancels every path.

    Answers that were cut or cancelled, and empty ones, have no vote. Raises `RequestError` for fewer than 3 or more
    than 10 paths, and what the engine raises.
    """
    if not FEWEST <= paths <= MOST:
        raise RequestError(f"{paths} paths cannot vote; give {FEWEST} to {MOST}")
    found = yield from gather(engine, sampling.requests(request, paths))
    answers = [final_answer(reply.text) if reply.finish_reason == "stop" else None for reply in found]
    counted = tally(answers, [perplexity(answer_signals(r)) for r in found])
    winner = None if counted.winner is None else found[counted.winner]
    return Vote(winner, counted.agreement, tuple(found), spent(found))


def gather(engine: Engine, requests: Sequence[Request]) -> Generator[None, None, list[Reply]]:
    """The replies to all requests, which run side by side. Yields None while waiting; closing it cancels them."""
    with ExitStack() as opened:
        running = [
            opened.enter_context(closing(cast(Generator[Event, None, None], engine.generate(request))))
            for request in requests
        ]
        found = []
        for events in running:
            for event in events:
                if isinstance(event, Reply):
                    found.append(event)
                    break
                yield None
            else:
                raise missing_reply()
        return found


def spent(replies: Sequence[Reply]) -> Usage:
    """What all of them cost together."""
    return sum((reply.usage for reply in replies), Usage())


def finish(work: Generator[None, None, T]) -> T:
    """Run such a generator to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)

"""Self-consistency: a majority vote among sampled answers to one request (SPEC F13)."""

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
MIN_PATHS, MAX_PATHS = 3, 10
"""Limits of the number of sampled answers (paths)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of further answers to a request."""

    temperature: float = 0.8
    top_p: float = 0.9
    frequency_penalty: float = 1.2

    def requests(self, request: Request, count: int, first: int = 0) -> list[Request]:
        """`count` copies of the request; if it has a seed, copy i gets a seed derived from it and `first + i`."""
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
    """Result of a vote: `winner` and its `text` are None if no two paths agree.

    `agreement` is the share of all paths that agree with the winner; `usage` sums all `replies`.
    """

    winner: Reply | None
    agreement: float
    replies: tuple[Reply, ...]
    usage: Usage

    @property
    def text(self) -> str | None:
        """Text of the winner."""
        return self.winner.text if self.winner else None


def vote(
    engine: Engine,
    request: Request,
    *,
    paths: int = 5,
    sampling: Sampling = SAMPLING,
) -> Generator[None, None, Vote]:
    """Sample all paths in parallel and count votes. Yields None while waiting; closing the generator cancels all paths.

    Truncated, cancelled and empty answers have no vote. Raises `RequestError` for fewer than 3 or more than 10 paths,
    and the errors of the engine.
    """
    if not MIN_PATHS <= paths <= MAX_PATHS:
        raise RequestError(f"paths is {paths}; give {MIN_PATHS} to {MAX_PATHS}")
    found = yield from gather(engine, sampling.requests(request, paths))
    answers = [final_answer(reply.text) if reply.finish_reason == "stop" else None for reply in found]
    counted = tally(answers, [perplexity(answer_signals(r)) for r in found])
    winner = None if counted.winner is None else found[counted.winner]
    return Vote(winner, counted.agreement, tuple(found), total_usage(found))


def gather(engine: Engine, requests: Sequence[Request]) -> Generator[None, None, list[Reply]]:
    """Run requests in parallel and return their replies. Yields None while waiting; closing it cancels them."""
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


def total_usage(replies: Sequence[Reply]) -> Usage:
    """Sum of their usage."""
    return sum((reply.usage for reply in replies), Usage())


def finish(work: Generator[None, None, T]) -> T:
    """Run a generator to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)

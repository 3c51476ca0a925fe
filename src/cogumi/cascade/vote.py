"""Self-consistency: several sampled answers to one request, and what most of them say (SPEC F13)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from cogumi.errors import RequestError
from cogumi.route.signals import answer_signals, perplexity
from cogumi.route.vote import Embed, final_answer, grouped, tally
from cogumi.runtime.engine import Engine, Event
from cogumi.types import Reply, Request, Usage

T = TypeVar("T")
FEWEST, MOST = 3, 10


@dataclass(frozen=True, slots=True)
class Paths:
    """How many answers are sampled, and how. Raises `RequestError` for fewer than 3 or more than 10."""

    count: int = 5
    temperature: float = 0.8
    top_p: float = 0.9
    frequency_penalty: float = 1.2

    def __post_init__(self) -> None:
        if not FEWEST <= self.count <= MOST:
            raise RequestError(f"{self.count} paths cannot vote; give {FEWEST} to {MOST}")

    def requests(self, request: Request) -> list[Request]:
        """The request once per path; a request with a seed gives each path one of its own."""
        return [
            replace(
                request,
                temperature=self.temperature,
                top_p=self.top_p,
                frequency_penalty=self.frequency_penalty,
                seed=None if request.seed is None else request.seed * MOST + i,
            )
            for i in range(self.count)
        ]


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
    paths: Paths = Paths(),
    embed: Embed | None = None,
) -> Generator[None, None, Vote]:
    """Ask all paths at once and count. Yields None while waiting; closing it cancels every path.

    Answers that were cut or cancelled, and empty ones, have no vote. With `embed`, free texts that are near each other
    count as one answer. Raises what `engine.generate` raises.
    """
    found = yield from gather(engine, paths.requests(request))
    answers = [final_answer(reply.text) if reply.finish_reason == "stop" else None for reply in found]
    counted = tally(grouped(answers, embed) if embed else answers, [perplexity(answer_signals(r)) for r in found])
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
                raise RuntimeError("an engine ended a generation without a Reply: a defect in that engine")
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

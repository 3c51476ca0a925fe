"""The one protocol that chat, server, benchmark and evaluation know, and how to drive it for many requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogumi.core.types import Decision, Reading, Reply, Request, Revision, Score, Token

Event: TypeAlias = Token | Decision | Revision | Reply


class Tokenizer(Protocol):
    """Text to ids and back. `encode` maps special-token text to special ids only if `special` is set."""

    @property
    def size(self) -> int:
        """Number of ids."""

    @property
    def eos(self) -> int:
        """The id that ends an answer."""

    @property
    def settings(self) -> Mapping[str, str | None]:
        """`bos_token`, `eos_token` and `chat_template` as Hugging Face's `tokenizer_config.json` has them."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; nothing is added in front or behind."""

    def piece(self, token: int) -> bytes:
        """The bytes an id stands for; empty for special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request: its chat messages through the template, or its raw prompt."""


class Engine(Protocol):
    """Anything that answers requests. Safe to call from several threads.

    `generate` submits at the call; iterating collects, and the last event is always a `Reply`. Closing the iterator
    early cancels the request and frees its place. Errors that can be known beforehand (`ContextError`, bad sampling
    values, an unknown adapter) are raised by the call itself, before any work.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that answers."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give as `adapter`."""

    def check(self, request: Request) -> None:
        """Raise what `generate` would refuse before any work."""

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request, event by event."""

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` (its end-of-answer token included) after the request's prompt."""

    def read(self, request: Request) -> Reading:
        """Read the prompt only: its score and hidden states."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row per text: the mean hidden state of the text's tokens."""

    def close(self) -> None:
        """Free everything; waiting requests end as cancelled."""


def missing_reply() -> RuntimeError:
    """The error for a generation that ended without its `Reply`, which no engine may do."""
    return RuntimeError("an engine ended a generation without a Reply: a defect in that engine")


def final_reply(events: Iterator[Event]) -> Reply:
    """Drain a generation and return its `Reply`."""
    last = deque(events, maxlen=1)
    reply = last[0] if last else None
    if not isinstance(reply, Reply):
        raise missing_reply()
    return reply


def replies(engine: Engine, requests: Iterable[Request], window: int = 64) -> Iterator[Reply]:
    """Answer many requests in order, keeping up to `window` of them in flight so that the engine can batch."""
    waiting: deque[Iterator[Event]] = deque()
    for request in requests:
        waiting.append(engine.generate(request))
        if len(waiting) >= window:
            yield final_reply(waiting.popleft())
    while waiting:
        yield final_reply(waiting.popleft())

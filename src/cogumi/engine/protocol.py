"""The one protocol that chat, server, benchmark and evaluation know, and how to drive it for many requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
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


class Capability(StrEnum):
    """What an engine may be able to do besides answering. Values are words for messages: "the base has no ..."."""

    SCORES = "scores of given texts"
    """`score`, `read` and `Request.echo`: log-probabilities of texts that it did not generate."""
    HIDDEN_STATES = "hidden states"
    """`Reading.last` and `mean`, and `Request.hidden`."""
    WHOLE_DISTRIBUTIONS = "whole distributions"
    """Every `Token` tells log-probability, entropy and margin of the model's whole distribution, the end token too."""
    EMBEDDINGS = "embeddings"
    GRAMMARS = "grammars"
    """`Request.grammar`."""
    JSON_SCHEMAS = "JSON schemas"
    """`Request.json_schema`."""
    SPECULATION = "speculation"
    """It drafts tokens and verifies them; the engine is a `SpeculatingEngine`."""
    PREFILL = "prefill"
    """It reads a prompt before it is asked; the engine is a `PrefillingEngine`."""
    HEAD_ADAPTATION = "a head to adapt"
    """`Request.adapt`."""
    RUNTIME_ADAPTERS = "adapters at run time"
    """`add_adapter` while requests run; the engine is an `ExtensibleEngine`."""


Capabilities: TypeAlias = frozenset[Capability]


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

    @property
    def capabilities(self) -> Capabilities:
        """What it can do besides answering; asked for the rest, it raises `RequestError`."""

    def check(self, request: Request) -> None:
        """Raise what `generate` would refuse before any work."""

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request, event by event."""

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` after the request's prompt, and whether it is the greedy answer.

        After messages the end-of-answer token is part of the answer; a raw prompt is merely continued.
        """

    def read(self, request: Request) -> Reading:
        """Read the prompt only: its score and hidden states."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row per text: the mean hidden state of the text's tokens."""

    def close(self) -> None:
        """Free everything; waiting requests end as cancelled."""


class SpeculatingEngine(Engine, Protocol):
    """An engine with `Capability.SPECULATION`."""

    @property
    def drafting_speedup(self) -> float:
        """How many times faster a lone request is expected to be answered with drafts, at best; 1 if not at all."""


class PrefillingEngine(Engine, Protocol):
    """An engine with `Capability.PREFILL`."""

    def prefill(self, session: str, text: str | Request) -> Future[int]:
        """Read a prompt into the cache before it is sent; the result is the number of tokens cached."""


class ExtensibleEngine(Engine, Protocol):
    """An engine with `Capability.RUNTIME_ADAPTERS`."""

    def add_adapter(self, name: str, path: Path) -> None:
        """Make an adapter file available as `name`, also while requests run."""


def lacking(engine: Engine, wanted: Capability) -> RequestError:
    """The error for a request that needs what an engine does not have."""
    has = ", ".join(sorted(engine.capabilities)) or "none"
    return RequestError(
        f"{type(engine).__name__} has no {wanted}; ask another engine (capabilities of this one: {has})"
    )


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

"""The engine protocol used by chat, server, benchmark and evaluation, and helpers to run many requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    def ends(self) -> Collection[int]:
        """All ids that end generation, `eos` among them."""

    @property
    def settings(self) -> Mapping[str, str | None]:
        """`bos_token`, `eos_token` and `chat_template` as in Hugging Face's `tokenizer_config.json`."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without added special tokens."""

    def piece(self, token: int) -> bytes:
        """The bytes of an id; empty for special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request: its messages in the chat template, or its raw prompt with special tokens."""


class Capability(StrEnum):
    """Optional features of an engine. Values are phrases for messages such as "the base has no ..."."""

    SCORES = "scores of given texts"
    """`score`, `read` and `Request.echo`: log-probabilities of given texts."""
    HIDDEN_STATES = "hidden states"
    """`Reading.last` and `mean`, and `Request.hidden`."""
    WHOLE_DISTRIBUTIONS = "whole distributions"
    """Every `Token`, including the end token, has log-probability, entropy and margin of the whole distribution."""
    EMBEDDINGS = "embeddings"
    GRAMMARS = "grammars"
    """`Request.grammar`."""
    JSON_SCHEMAS = "JSON schemas"
    """`Request.json_schema`."""
    SPECULATION = "speculation"
    """Drafts tokens and verifies them; the engine is a `SpeculatingEngine`."""
    PREFILL = "prefill"
    """Reads a prompt before its request; the engine is a `PrefillingEngine`."""
    HEAD_ADAPTATION = "a head to adapt"
    """`Request.adapt`."""
    RUNTIME_ADAPTERS = "adapters at run time"
    """`add_adapter` while requests run; the engine is an `ExtensibleEngine`."""


Capabilities: TypeAlias = frozenset[Capability]


class Engine(Protocol):
    """Anything that answers requests. Thread-safe.

    `generate` submits the request; iterating over the result yields its events, always with a `Reply` at the end.
    Closing the iterator early cancels the request and frees its slot. Invalid requests (`ContextError`, bad sampling
    values, an unknown adapter) raise an error from the call itself, before any work.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that answers."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Valid values of a request's `adapter`."""

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None if only a remote server knows."""

    @property
    def capabilities(self) -> Capabilities:
        """Optional features of the engine; use of another feature raises `RequestError`."""

    def check(self, request: Request) -> None:
        """Validate a request: raise the errors that `generate` raises before any work."""

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request as a stream of events."""

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` after the request's prompt, and whether it is the greedy answer.

        After messages, the end-of-answer token is part of the answer; after a raw prompt it is not.
        """

    def read(self, request: Request) -> Reading:
        """Score and hidden states of the last message, given the turns before it, without generation.

        Of a raw prompt all ids but the first are scored. Earlier turns and the system prompt may come from the cache.
        """

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row per text: the mean hidden state of the text's tokens."""

    def close(self) -> None:
        """Free all resources; pending requests end as cancelled."""


class SpeculatingEngine(Engine, Protocol):
    """An engine with `Capability.SPECULATION`."""

    @property
    def drafting_speedup(self) -> float:
        """Best expected speed-up of a single request by drafting; 1 if drafting does not help."""


class PrefillingEngine(Engine, Protocol):
    """An engine with `Capability.PREFILL`."""

    def prefill(self, session: str, text: str | Request) -> Future[int]:
        """Read a prompt into the cache before its request; the result is the number of cached tokens."""


class ExtensibleEngine(Engine, Protocol):
    """An engine with `Capability.RUNTIME_ADAPTERS`."""

    def add_adapter(self, name: str, path: Path) -> None:
        """Make an adapter file available as `name`, also while requests run."""


def lacking(engine: Engine, wanted: Capability) -> RequestError:
    """The error for a request that needs a missing capability."""
    has = ", ".join(sorted(engine.capabilities)) or "none"
    return RequestError(
        f"{type(engine).__name__} has no {wanted}; ask another engine (capabilities of this one: {has})"
    )


def missing_reply() -> RuntimeError:
    """The error for a generation that ended without a `Reply`, which is a defect of the engine."""
    return RuntimeError("an engine ended a generation without a Reply: a defect in that engine")


def final_reply(events: Iterator[Event]) -> Reply:
    """Consume a generation and return its `Reply`."""
    last = deque(events, maxlen=1)
    reply = last[0] if last else None
    if not isinstance(reply, Reply):
        raise missing_reply()
    return reply


def replies(engine: Engine, requests: Iterable[Request], window: int = 64) -> Iterator[Reply]:
    """Answer requests in order, with up to `window` of them in flight so that the engine can batch them."""
    waiting: deque[Iterator[Event]] = deque()
    for request in requests:
        waiting.append(engine.generate(request))
        if len(waiting) >= window:
            yield final_reply(waiting.popleft())
    while waiting:
        yield final_reply(waiting.popleft())

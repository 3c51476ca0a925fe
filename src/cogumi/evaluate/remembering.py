"""An engine that answers a repeated request from memory: several measurements share the answers of a slow model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cogumi.bundle.unpack import BundleFiles
from cogumi.cascade.cascade import Cascade
from cogumi.cascade.engines import EngineOptions, Engines, llama_engines
from cogumi.cascade.opening import open_cascade
from cogumi.core.types import Message, Reading, Reply, Request
from cogumi.engine.protocol import Engine, Event

Key = tuple[tuple[Message, ...], tuple[tuple[str, str], ...], str | None, int | None]


class RememberingEngine:
    """`engine.protocol.Engine` around another engine; everything but repeated greedy requests is passed on.

    A reply with the hidden state also answers a request without it. Replayed events are the tokens and the `Reply`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._replies: dict[Key, Reply] = {}
        self._readings: dict[Key, Reading] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, request: Request) -> Iterator[Event]:
        """The remembered answer, or else the engine's."""
        key = _key(request)
        found = self._replies.get(key) if key else None
        if found and (found.hidden or not request.hidden):
            return _replayed((*found.tokens, found))
        events = self._engine.generate(request)
        return self._remembered(key, events) if key else events

    def _remembered(self, key: Key, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Reply) and event.finish_reason != "cancelled":
                self._replies[key] = event
            yield event

    def read(self, request: Request) -> Reading:
        """The remembered reading, or else the engine's."""
        key = _key(request)
        if key is None:
            return self._engine.read(request)
        if key not in self._readings:
            self._readings[key] = self._engine.read(request)
        return self._readings[key]


def _replayed(events: tuple[Event, ...]) -> Iterator[Event]:
    """A generator, which can be closed as an engine's can."""
    yield from events


def _key(request: Request) -> Key | None:
    """What a greedy answer depends on; None for a request whose answer may differ next time."""
    key = request.messages, request.examples, request.adapter, request.max_tokens
    messages, examples, adapter, most = key
    plain = Request(messages=messages, examples=examples, adapter=adapter, max_tokens=most)
    same = replace(request, speculate=None, hidden=False, id=None, user=None, session=None, mode=None, abstain=False)
    return key if same == plain else None


@contextmanager
def remembering_cascade(folder: Path, slots: int, context: int) -> Iterator[tuple[Cascade, Engine]]:
    """A bundle's cascade whose base remembers its answers, and the base without memory, for what is timed."""
    plain: list[Engine] = []

    def engines(files: BundleFiles, options: EngineOptions) -> Engines:
        base, draft = llama_engines(files, options)
        plain.append(base)
        return Engines(cast(Engine, RememberingEngine(base)), draft)

    with closing(open_cascade(folder, slots=slots, context=context, engines=engines)) as cascade:
        yield cascade, plain[0]

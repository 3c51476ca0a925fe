"""The engine behind the server: loaded in a thread while the application runs, and closed when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cogumi.cascade.memory.personal_offsets import PersonalRouting
from cogumi.core.types import Request
from cogumi.engine.protocol import Engine, Tokenizer
from cogumi.serve.problem import Problem

T = TypeVar("T")

MAX_REQUESTS = 128
"""Most simultaneous generations, one thread each; the engine decides how many of them run."""


CAPABILITIES = ("chat", "completion", "embeddings", "tools", "structured_outputs")
"""What every model of the list can be asked for."""


class ServedEngine(Engine, Protocol):
    """An engine that answers under several model names, as a cascade does."""

    @property
    def models(self) -> Mapping[str, str]:
        """Every name a client may ask for, with its kind: `cascade`, `mode`, `tier` or `modifier`."""

    @property
    def takes_feedback(self) -> bool:
        """Whether answers can be rated."""

    def resolve(self, model: str, request: Request) -> tuple[Engine, Request]:
        """The engine of a model name, and the request adapted to it."""

    def feedback(self, id: str, right: bool, user: str | None = None) -> None:
        """Record whether an answer was right."""

    def personal(self, user: str, on: bool | None = None) -> PersonalRouting:
        """Switch a user's personal routing (None: no change) and return its state."""

    def add_modifier(self, name: str, path: Path) -> None:
        """Add a modifier while requests run."""


class EngineHost:
    """The state shared by the routes: the loaded engine, and the worker threads.

    The application's lifespan opens the host. A mounted application gets no lifespan events, because ASGI servers send
    them only to the outermost application: the first request that needs the engine then opens the host, and the end of
    the event loop closes it.
    """

    threads: ThreadPoolExecutor
    """Pool for blocking work of requests; exists while the host is open."""

    def __init__(
        self,
        load: Callable[[], ServedEngine],
        on_ready: Callable[[ServedEngine], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._load, self._on_ready, self._on_failure = load, on_ready, on_failure
        self._loading: asyncio.Future[ServedEngine] | None = None
        self._holder: asyncio.Task[None] | None = None
        self._engine: ServedEngine | None = None
        self._failure: BaseException | None = None
        self._ending = False
        self.created = int(time.time())

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Load the engine; close it at the end. Nested calls have no effect."""
        if self._loading is not None:
            yield
            return
        self._failure = None
        self.threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="request")
        self._loading = asyncio.get_running_loop().run_in_executor(self.threads, self._load)
        self._loading.add_done_callback(self._loaded)
        try:
            yield
        finally:
            await asyncio.wait([self._loading])
            self._close()

    @property
    def engine(self) -> ServedEngine:
        """The loaded engine; raises `Problem` 503 until loading is finished, and once the server ends."""
        if self._ending:
            raise Problem(503, "the server is shutting down; ask again", code="closing", retry=1)
        if self._engine is not None:
            return self._engine
        if self._loading is None and self._holder is None:
            self._holder = asyncio.get_running_loop().create_task(self._hold())
        why = f"the bundle could not be opened: {self._failure}" if self._failure else "the bundle is still loading"
        raise Problem(503, why, code="not_ready", retry=0 if self._failure else 1)

    def serving(self, model: str) -> ServedEngine:
        """The engine, if it has the model name `model`; otherwise raises `Problem` 404 with the known names."""
        if model not in self.engine.models:
            what = f"the model {model!r} does not exist; choose one of: {', '.join(self.engine.models)}"
            raise Problem(404, what, code="model_not_found", param="model")
        return self.engine

    def resolved(self, model: str) -> Engine:
        """The engine of the model name `model`."""
        return self.serving(model).resolve(model, Request())[0]

    def tokenizer(self, model: str | None) -> Tokenizer:
        """The tokenizer of a model (None: of the base)."""
        return self.resolved(model).tokenizer if model else self.engine.tokenizer

    async def work(self, function: Callable[..., T], *args: object) -> T:
        """The result of a blocking function, which runs in a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    def model_object(self, name: str) -> dict[str, Any]:
        """One entry of the model list; `created` in Unix seconds, `max_model_len` in tokens, as vLLM has it."""
        known = {"id": name, "object": "model", "created": self.created, "owned_by": "cogumi"}
        able = [*CAPABILITIES, *(["feedback"] if self.engine.takes_feedback else [])]
        return known | {
            "max_model_len": self.engine.context,
            "kind": self.engine.models[name],
            "capabilities": able,
        }

    async def _hold(self) -> None:
        """Keep the host open until the event loop ends, which cancels this task."""
        try:
            async with self.open():
                await asyncio.Event().wait()
        finally:
            self._holder = None

    def refuse(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self._ending = True

    async def stop(self) -> None:
        """Close the engine; running requests end as cancelled."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)

    def _loaded(self, loading: asyncio.Future[ServedEngine]) -> None:
        if error := loading.exception():
            self._failure = error
            self._on_failure(error)
        else:
            self._engine = loading.result()
            self._on_ready(self._engine)

    def _close(self) -> None:
        """Close the engine; running requests end as cancelled."""
        engine, self._engine, self._loading = self._engine, None, None
        if engine is not None:
            engine.close()
        self.threads.shutdown(cancel_futures=True)

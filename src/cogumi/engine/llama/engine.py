"""The serving engine: llama.cpp with continuous batching, adapters, speculation (SPEC E1, E2, E3, E6, E7, E8)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.environment import beyond_memory, usable_threads
from cogumi.core.errors import BundleError, ContextError, RequestError
from cogumi.core.types import Reading, Request, Score
from cogumi.engine.admission import admit, check_length, continuation, prompt_ids, question_start
from cogumi.engine.events import Events
from cogumi.engine.few_shot import ADAPTER, check_examples, example_request
from cogumi.engine.generation import Generation
from cogumi.engine.json_schema import SchemaCompiler, SchemaGrammar
from cogumi.engine.llama.adapter_context import AdapterContext
from cogumi.engine.llama.adapters import Adapters, Source
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.binding.grammar import Grammar
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.context_pool import ContextPool
from cogumi.engine.llama.jobs import Adaptation, Measurement, Prefill, SupportExample
from cogumi.engine.llama.output_head import load_head
from cogumi.engine.llama.scheduler import Scheduler
from cogumi.engine.llama.speculative.bridge import Bridge
from cogumi.engine.llama.speculative.drafter import Drafter
from cogumi.engine.llama.speculative.drafting import Drafting, Speculator
from cogumi.engine.llama.speculative.latency_measurement import file_key, machine_key, pass_seconds, stored_latency
from cogumi.engine.llama.speculative.latency_model import MAX_DRAFT, LatencyCurve
from cogumi.engine.llama.speculative.speculation import Controller
from cogumi.engine.llama.thread_control import ThreadControl
from cogumi.engine.protocol import Capabilities, Capability, Event
from cogumi.engine.sampling import LogitsProcessor

SMALL_MODEL = 32_000_000
"""File size in bytes below which one thread is used: for short passes the synchronisation of threads dominates."""
BATCH = 128
"""Tokens per batch; longer prompts are processed in chunks. On CPUs larger batches are not faster, and delay others."""


CONTEXT = 4096
"""Default limit of the context: its cache takes memory for every slot."""
MAX_SUPPORT = 1 << 26
"""Maximum number of logits kept of a request's examples while its head is adapted (256 MiB)."""


class LlamaEngine:
    """`engine.protocol.Engine` over GGUF files.

    `slots` requests run at a time, each of up to `context` tokens (prompt and answer; None: as many as the model was
    trained for, at most `CONTEXT`), `queue` more may wait.
    `threads` None: `default_threads`. `cache` is the type of the KV cache: f16, q8_0 or q4_0; None: q8_0 if the model's
    heads allow it, else f16. Drafts come from prompt `lookup` and from a `draft` model, given as a file or as another
    engine (whose weights are shared), bridged if its vocabulary differs; a request that forces speculation gets
    `draft_tokens` per round, other requests the most profitable number. Idle adapters are freed, least recently used
    first, while all of them take more than `adapter_memory` bytes. A garbage-collected engine closes itself. `head`
    answers requests with examples after adapting to them, together with the adapter named `few_shot.ADAPTER` if given;
    it must have been trained on the base with that `base_sha256`, if known. `repack`: see `Model`. Raises `BundleError`
    if a file cannot be used.
    """

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 8,
        context: int | None = None,
        threads: int | None = None,
        draft: Path | LlamaEngine | None = None,
        draft_tokens: int = 5,
        lookup: bool = True,
        adapters: Mapping[str, Source] | None = None,
        queue: int = 10_000,
        cache: str | None = None,
        adapter_memory: int | None = None,
        head: Path | None = None,
        base_sha256: str | None = None,
        repack: bool = True,
    ) -> None:
        sizes = (slots, 1 if context is None else context, draft_tokens, queue, threads or 1)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise BundleError("slots, context, draft_tokens, queue and threads must be integers of at least 1")
        self._model = Model(model, repack=repack)
        if isinstance(draft, LlamaEngine):
            self._draft: Model | None = draft._model
        else:
            self._draft = Model(draft, repack=repack) if draft else None
        context = context or min(self._model.trained_context or CONTEXT, CONTEXT)
        sizes_of = {"width": self._model.width, "vocabulary": self._model.tokenizer.size}
        self._head = load_head(head, **sizes_of, base_sha256=base_sha256) if head else None
        self._context = context
        threads = threads or default_threads(model)
        batch = max(BATCH, slots * (max(MAX_DRAFT, draft_tokens) + 1))
        size: dict[str, Any] = {"sequences": slots, "length": context, "batch": batch}
        size["threads"] = ThreadControl(threads)
        self._cache = _cache_of(self._model, cache)
        if excess := beyond_memory(slots * context * self.cache_bytes + (self._model.bytes if repack else 0)):
            raise BundleError(
                f"{model} with {slots} requests of {context} tokens {excess}; take fewer, or shorter ones"
            )
        open_base = partial(Context, self._model, cache=self._cache, **size)
        drafting: Drafting | None = None
        if draft or lookup:
            open_drafter = _drafter_of(self._model, self._draft, cache, size) if self._draft else None
            controller = Controller(_latency(self._model, self._draft, threads, repack))
            drafting = Drafting(controller, draft_tokens, lookup, open_drafter)
        self._drafting, tokenizer = drafting, self._model.tokenizer
        self._schemas = SchemaCompiler(tokenizer)

        def open_context(adapter: Any) -> AdapterContext:  # no reference to the engine, so that it can be collected
            return AdapterContext(open_base(adapter=adapter), tokenizer, Speculator(drafting) if drafting else None)

        self._adapters = Adapters(self._model, adapters or {})
        self._pool = ContextPool(
            self._adapters, open_context, context_bytes=slots * context * self.cache_bytes, budget=adapter_memory
        )
        self._scheduler = Scheduler(self._pool, slots=slots, queue=queue)
        weakref.finalize(self, self._scheduler.stop).atexit = False
        self._prefills: dict[str, Prefill] = {}  # running prefill of each session
        self._prefill_lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the model's file."""
        return self._model.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give as `adapter`."""
        return tuple(name for name in self._adapters.names if name != ADAPTER)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._context

    @property
    def capabilities(self) -> Capabilities:
        """All capabilities; speculation only with drafting, head adaptation only with a head."""
        lacking = {Capability.SPECULATION: self._drafting is None, Capability.HEAD_ADAPTATION: self._head is None}
        return frozenset(capability for capability in Capability if not lacking.get(capability, False))

    @property
    def latency(self) -> LatencyCurve | None:
        """Current latency model of the base and the draft on this machine; None without drafting."""
        return self._drafting.controller.latency if self._drafting else None

    @property
    def drafting_speedup(self) -> float:
        """Best expected speed-up of a single request by drafting; 1 without drafting."""
        return self._drafting.controller.speedup() if self._drafting else 1.0

    @property
    def free_slots(self) -> int:
        """Number of requests that could start immediately."""
        return self._scheduler.free_slots

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token in the KV cache."""
        return self._model.cache_bytes(self._cache)

    def add_adapter(self, name: str, path: Path) -> None:
        """Make a LoRA file available as `name`, also while requests run.

        Raises `BundleError` for a file that is no adapter of this base, `RequestError` if one of that name is
        answering just now; else it is replaced.
        """
        self._scheduler.call(lambda: self._pool.add(name, Path(path)))

    def check(self, request: Request) -> None:
        """Validate a request; raises the same errors as `generate`, before any work."""
        self._admit(request)

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; see `Engine.generate`."""
        generation = self._admit(request)
        if request.session is not None:
            self._replace_prefill(request.session, None)
        adapter = ADAPTER if isinstance(generation, Adaptation) and ADAPTER in self._adapters.names else None
        self._scheduler.submit(request.adapter or adapter, generation)
        return Events(generation.events.get, lambda: self._scheduler.cancel(generation))  # keeps the engine open

    def prefill(self, session: str, text: str | Request) -> Future[int]:
        """Process a prompt into the KV cache before it is sent; the result is the number of tokens cached.

        `text` is the prompt typed so far. A later text or a request of the same session cancels a running prefill;
        their common prefix is not processed again.
        """
        request = text if isinstance(text, Request) else Request(prompt=text)
        prompt = self._prompt(request)
        check_length(len(prompt), self._context)
        job = Prefill(prompt)
        self._replace_prefill(session, None)
        self._scheduler.submit(request.adapter, job)
        self._replace_prefill(session, job)
        return job.result

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` after the request's prompt; see `Engine.score`."""
        prompt = self._prompt(request)
        ids = [*prompt, *continuation(request, answer, self.tokenizer)]
        measured = self._measure(request.adapter, [Measurement(ids, len(prompt))])[0]
        return Score(
            -sum(measured.logprobs), len(measured.logprobs), len(answer.encode("utf-8")), greedy=measured.greedy
        )

    def read(self, request: Request) -> Reading:
        """Score and hidden states of the question; see `Engine.read`."""
        ids = self._prompt(request)
        first = question_start(request, ids, self.tokenizer)
        measured = self._measure(request.adapter, [Measurement(ids, first, hidden=True, start=first - 1)])[0]
        surprise = tuple(-x for x in measured.logprobs)
        size = sum(len(self.tokenizer.piece(i)) for i in ids[first:])
        return Reading(
            Score(sum(surprise), len(surprise), size),
            surprise,
            tuple(measured.last.tolist()),
            tuple(measured.mean.tolist()),
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean hidden states (texts, width) of the base; an empty text is a row of zeros."""
        rows = np.zeros((len(texts), self._model.width), np.float32)
        ids = {i: self.tokenizer.encode(text) for i, text in enumerate(texts) if text}
        measured = self._measure(None, [Measurement(run, len(run), hidden=True) for run in ids.values()])
        for i, measurement in zip(ids, measured, strict=True):
            rows[i] = measurement.mean
        return rows

    def close(self) -> None:
        """End all requests and free the KV caches; the weights are freed with the engine object."""
        self._scheduler.close()

    def _admit(self, request: Request) -> Generation:
        check_examples(request)
        if not self._head or not request.examples or request.adapt is False:
            request, prompt = admit(request, self.tokenizer, self.adapters, self._context)
            return Generation(request, prompt, self._processor(request, prompt))
        if request.speculate or request.echo:
            raise RequestError("an adapted head neither speculates nor echoes; leave that out, or set adapt to False")
        plain = replace(request, examples=(), adapt=None)
        plain, prompt = admit(plain, self.tokenizer, self.adapters, self._context)
        return Adaptation(plain, prompt, self._processor(plain, prompt), self._head, self._support(request))

    def _support(self, request: Request) -> list[SupportExample]:
        """The tokenized examples of a request; `ContextError` if they are too long."""
        support = []
        for example in request.examples:
            question, answer = example_request(request, example)
            prompt = self._prompt(question)
            ids = [*prompt, *self.tokenizer.encode(answer), self.tokenizer.eos]
            support.append(SupportExample(ids, len(prompt)))
            check_length(len(ids), self._context)
        tokens, most = sum(len(example.targets) for example in support), MAX_SUPPORT // self.tokenizer.size
        if tokens > most:
            raise ContextError(
                f"the examples' answers have {tokens} tokens, but a head can be adapted to {most}; give shorter ones, "
                "or set adapt to False"
            )
        return support

    def _prompt(self, request: Request) -> list[int]:
        return prompt_ids(request, self.tokenizer, self.adapters)

    def _processor(self, request: Request, prompt: list[int]) -> LogitsProcessor | None:
        grammar: SchemaGrammar | Grammar | None = None
        if request.json_schema is not None:
            grammar = self._schemas.compile(request.json_schema)
        elif request.lark is not None:
            grammar = self._schemas.compile_lark(request.lark)
        elif request.grammar is not None:
            grammar = Grammar(self.tokenizer, request.grammar)
        return LogitsProcessor.of(request, prompt, self.tokenizer.ends, grammar)

    def _replace_prefill(self, session: str, job: Prefill | None) -> None:
        """Cancel the running prefill of a session and register a new one, if given."""
        with self._prefill_lock:
            previous = self._prefills.pop(session, None)
            self._prefills = {name: other for name, other in self._prefills.items() if not other.result.done()}
            if job:
                self._prefills[session] = job
        if previous:
            self._scheduler.cancel(previous)

    def _measure(self, adapter: str | None, jobs: Sequence[Measurement]) -> list[Measurement]:
        for job in jobs:
            check_length(len(job.ids), self._context)
        for job in jobs:
            self._scheduler.submit(adapter, job)
        return [job.result.result() for job in jobs]


def default_threads(model: Path) -> int:
    """All processors available to this process; one thread for a model below `SMALL_MODEL`."""
    return 1 if model.stat().st_size < SMALL_MODEL else usable_threads()


def _cache_of(model: Model, wanted: str | None) -> str:
    """The KV cache type to use (None: the default); `BundleError` if the model's heads do not allow it."""
    if wanted is None:
        return "q8_0" if model.supports_cache("q8_0") else "f16"
    if not model.supports_cache(wanted):
        raise BundleError(f"the heads of {model.path.name} do not fit {wanted} blocks; use cache f16")
    return wanted


def _drafter_of(base: Model, draft: Model, cache: str | None, size: Mapping[str, Any]) -> Callable[[], Drafter]:
    """A function that opens drafters for a draft model; `BundleError` if its vocabulary cannot be bridged."""
    same = draft.tokenizer.same_vocabulary(base.tokenizer)
    bridge = None if same else Bridge(base.tokenizer, draft.tokenizer)
    kept = _cache_of(draft, cache)
    return lambda: Drafter(Context(draft, cache=kept, **size), draft.tokenizer, bridge)


def _latency(model: Model, draft: Model | None, threads: int, repack: bool) -> LatencyCurve:
    """The latency curve of these models on this machine, measured once and stored."""

    def measure() -> LatencyCurve:
        verify = pass_seconds(model, MAX_DRAFT + 1, threads)
        return LatencyCurve(pass_seconds(draft, 1, threads)[0] if draft else 0.0, verify)

    key = machine_key() | {"threads": threads, "repack": repack}
    key |= {f"model {k}": v for k, v in file_key(model.path).items()}
    if draft:
        key |= {f"draft {k}": v for k, v in file_key(draft.path).items()}
    return stored_latency(measure, key)

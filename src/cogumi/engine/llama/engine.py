"""The engine that serves: llama.cpp under continuous batching, with adapters and speculation (SPEC E1-E3, E6-E8)."""

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

from cogumi.core.environment import usable_threads
from cogumi.core.errors import BundleError, ContextError, RequestError
from cogumi.core.types import Reading, Request, Score
from cogumi.engine.admission import admitted, check_length, continuation, prompt_of
from cogumi.engine.events import Events
from cogumi.engine.few_shot import ADAPTER, check_examples, worked
from cogumi.engine.generation import Generation
from cogumi.engine.llama.adapter_context import Lane
from cogumi.engine.llama.adapters import Adapters, Source
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.binding.grammar import Grammar, schema_grammar
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.context_pool import Lanes
from cogumi.engine.llama.jobs import Adaptation, Measurement, Prefill, Shot
from cogumi.engine.llama.output_head import load_head
from cogumi.engine.llama.scheduler import Scheduler
from cogumi.engine.llama.speculative.bridge import Bridge
from cogumi.engine.llama.speculative.drafter import Drafter
from cogumi.engine.llama.speculative.drafting import Drafting, Speculation
from cogumi.engine.llama.speculative.latency_measurement import file_key, machine_key, measured_costs, pass_seconds
from cogumi.engine.llama.speculative.latency_model import MOST, Costs
from cogumi.engine.llama.speculative.speculation import Controller
from cogumi.engine.protocol import Capabilities, Capability, Event
from cogumi.engine.sampling import Rules

SMALL_MODEL = 32_000_000
"""Bytes below which one thread is used: in passes so short, threads wait for each other longer than they work."""
BATCH = 128
"""Tokens per batch; a longer prompt is read in chunks. On CPUs larger ones are no faster, and hold up everybody."""


MAX_SUPPORT = 1 << 26
"""Most logits kept of a request's examples while its head is adapted (256 MiB)."""


class LlamaEngine:
    """`engine.protocol.Engine` over GGUF files.

    `slots` requests run at a time, each of up to `context` tokens (prompt and answer), `queue` more may wait.
    `threads` None: `default_threads`. `cache` is the type of the key-value cache: f16, q8_0 or q4_0; None: q8_0 where
    the model's heads allow, else f16. Drafts come from `lookup` in the text itself and from a `draft` model, that of a
    file or of another engine (whose weights are shared), bridged if its vocabulary differs; a request that insists
    gets `draft_tokens` per round, others what pays. Adapters that are not answering are freed, longest unused first,
    while all of them take more than `adapter_memory` bytes; those added later are written to the file `remember` and
    read from it at the next start. An engine that is dropped with nobody reading from it closes by itself. `head`
    answers requests with examples, adapted to them, together with the adapter named `shots.ADAPTER` if it is given; it
    must be of the base with that `base_sha256`, if that is known. `repack` is `Model`'s: faster, for up to twice the
    memory. Raises `BundleError` if a file cannot be used.
    """

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 8,
        context: int = 512,
        threads: int | None = None,
        draft: Path | LlamaEngine | None = None,
        draft_tokens: int = 5,
        lookup: bool = True,
        adapters: Mapping[str, Source] | None = None,
        queue: int = 10_000,
        cache: str | None = None,
        adapter_memory: int | None = None,
        remember: Path | None = None,
        head: Path | None = None,
        base_sha256: str | None = None,
        repack: bool = True,
    ) -> None:
        sizes = (slots, context, draft_tokens, queue, threads or 1)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise BundleError("slots, context, draft_tokens, queue and threads are whole numbers of at least 1")
        self._model = Model(model, repack=repack)
        if isinstance(draft, LlamaEngine):
            self._draft: Model | None = draft._model
        else:
            self._draft = Model(draft, repack=repack) if draft else None
        sizes_of = {"width": self._model.width, "vocabulary": self._model.tokenizer.size}
        self._head = load_head(head, **sizes_of, base_sha256=base_sha256) if head else None
        self._context = context
        threads = threads or default_threads(model)
        batch = max(BATCH, slots * (max(MOST, draft_tokens) + 1))
        size = {"sequences": slots, "length": context, "batch": batch, "threads": threads}
        self._cache = _cache_of(self._model, cache)
        open_context = partial(Context, self._model, cache=self._cache, **size)
        drafting: Drafting | None = None
        if draft or lookup:
            open_drafter = _drafter_of(self._model, self._draft, cache, size) if self._draft else None
            controller = Controller(_costs(self._model, self._draft, threads, repack))
            drafting = Drafting(controller, draft_tokens, lookup, open_drafter)
        self._drafting, tokenizer = drafting, self._model.tokenizer

        def open_lane(adapter: Any) -> Lane:  # holds no engine, so that weights go as soon as the engine does
            return Lane(open_context(adapter=adapter), tokenizer, Speculation(drafting) if drafting else None)

        self._adapters = Adapters(self._model, adapters or {}, remember)
        self._lanes = Lanes(
            self._adapters, open_lane, lane_bytes=slots * context * self.cache_bytes, budget=adapter_memory
        )
        self._scheduler = Scheduler(self._lanes, slots=slots, queue=queue)
        weakref.finalize(self, self._scheduler.stop).atexit = False
        self._ahead: dict[str, Prefill] = {}  # what is being read ahead for a session
        self._door = threading.Lock()  # guards it

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the model's file."""
        return self._model.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give as `adapter`."""
        return tuple(name for name in self._adapters.names if name != ADAPTER)

    @property
    def capabilities(self) -> Capabilities:
        """Everything; speculation if anything is ever drafted, head adaptation if there is a head."""
        lacking = {Capability.SPECULATION: self._drafting is None, Capability.HEAD_ADAPTATION: self._head is None}
        return frozenset(capability for capability in Capability if not lacking.get(capability, False))

    @property
    def costs(self) -> Costs | None:
        """What passes of the base and of the draft cost on this machine now; None if nothing is ever drafted."""
        return self._drafting.controller.costs if self._drafting else None

    @property
    def acceptance(self) -> float:
        """Running probability that a token drafted by the draft model is accepted."""
        return self._drafting.controller.rate("model") if self._drafting else 0.0

    @property
    def drafting_speedup(self) -> float:
        """How many times faster a lone request is expected to be answered with drafts, at best; 1 if not at all."""
        return self._drafting.controller.speedup() if self._drafting else 1.0

    @property
    def free_slots(self) -> int:
        """Requests that could start at once."""
        return self._scheduler.free_slots

    @property
    def cache_bytes(self) -> int:
        """Bytes that one token takes in the key-value cache."""
        return self._model.cache_bytes(self._cache)

    def add_adapter(self, name: str, path: Path) -> None:
        """Make a LoRA file available as `name`, also while requests run."""
        self._scheduler.call(lambda: self._lanes.add(name, Path(path)))

    def check(self, request: Request) -> None:
        """Raise what `generate` would refuse before any work."""
        self._admitted(request)

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; see `Engine.generate`."""
        generation = self._admitted(request)
        if request.session is not None:
            self._read_ahead(request.session, None)
        adapter = ADAPTER if isinstance(generation, Adaptation) and ADAPTER in self._adapters.names else None
        self._scheduler.submit(request.adapter or adapter, generation)
        return Events(generation.events.get, lambda: self._scheduler.cancel(generation))  # keeps the engine open

    def prefill(self, session: str, text: str | Request) -> Future[int]:
        """Read a prompt into the cache before it is sent; the result is the number of tokens cached.

        `text` is what there is of the prompt so far. A later text of the same session, or a request of it, takes the
        place of one that is still being read; what they have in common is not read again.
        """
        request = text if isinstance(text, Request) else Request(prompt=text)
        prompt = self._prompt(request)
        check_length(len(prompt), self._context)
        job = Prefill(prompt)
        self._read_ahead(session, None)
        self._scheduler.submit(request.adapter, job)
        self._read_ahead(session, job)
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
        """Score and hidden states of the prompt."""
        ids = self._prompt(request)
        measured = self._measure(request.adapter, [Measurement(ids, 1, hidden=True)])[0]
        surprise = tuple(-x for x in measured.logprobs)
        size = sum(len(self.tokenizer.piece(i)) for i in ids[1:])
        return Reading(
            Score(sum(surprise), len(surprise), size),
            surprise,
            tuple(measured.last.tolist()),
            tuple((measured.total / len(ids)).tolist()),
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean hidden states (texts, width) of the base; an empty text is a row of zeros."""
        rows = np.zeros((len(texts), self._model.width), np.float32)
        ids = {i: self.tokenizer.encode(text) for i, text in enumerate(texts) if text}
        measured = self._measure(None, [Measurement(run, len(run), hidden=True) for run in ids.values()])
        for i, measurement in zip(ids, measured, strict=True):
            rows[i] = measurement.total / len(measurement.ids)
        return rows

    def close(self) -> None:
        """End all requests and free the caches; the weights go with the engine itself."""
        self._scheduler.close()

    def _admitted(self, request: Request) -> Generation:
        check_examples(request)
        if not self._head or not request.examples or request.adapt is False:
            prompt = admitted(request, self.tokenizer, self.adapters, self._context)
            return Generation(request, prompt, self._rules(request))
        if request.speculate or request.echo:
            raise RequestError("an adapted head neither speculates nor echoes; leave that out, or set adapt to False")
        plain = replace(request, examples=(), adapt=None)
        prompt = admitted(plain, self.tokenizer, self.adapters, self._context)
        return Adaptation(plain, prompt, self._rules(plain), self._head, self._shots(request))

    def _shots(self, request: Request) -> list[Shot]:
        """The examples of a request as they are read; `ContextError` if they are too long."""
        shots = []
        for example in request.examples:
            asked, answer = worked(request, example)
            prompt = self._prompt(asked)
            shots.append(Shot([*prompt, *self.tokenizer.encode(answer), self.tokenizer.eos], len(prompt)))
            check_length(len(shots[-1].ids), self._context)
        tokens, most = sum(len(shot.targets) for shot in shots), MAX_SUPPORT // self.tokenizer.size
        if tokens > most:
            raise ContextError(
                f"the examples' answers have {tokens} tokens, but a head can be adapted to {most}; give shorter ones, "
                "or set adapt to False"
            )
        return shots

    def _prompt(self, request: Request) -> list[int]:
        return prompt_of(request, self.tokenizer, self.adapters)

    def _rules(self, request: Request) -> Rules | None:
        text = schema_grammar(request.json_schema) if request.json_schema is not None else request.grammar
        return Rules.of(request, Grammar(self.tokenizer, text) if text is not None else None)

    def _read_ahead(self, session: str, job: Prefill | None) -> None:
        """Let a job, or nothing, take the place of what is being read ahead for a session."""
        with self._door:
            before = self._ahead.pop(session, None)
            self._ahead = {name: known for name, known in self._ahead.items() if not known.result.done()}
            if job:
                self._ahead[session] = job
        if before:
            self._scheduler.cancel(before)

    def _measure(self, adapter: str | None, jobs: Sequence[Measurement]) -> list[Measurement]:
        for job in jobs:
            check_length(len(job.ids), self._context)
        for job in jobs:
            self._scheduler.submit(adapter, job)
        return [job.result.result() for job in jobs]


def default_threads(model: Path) -> int:
    """As many threads as this process may use; one for a model below `SMALL_MODEL`."""
    return 1 if model.stat().st_size < SMALL_MODEL else usable_threads()


def _cache_of(model: Model, wanted: str | None) -> str:
    """The cache type to use: the wanted one, or the default; `BundleError` if the model's heads do not allow it."""
    if wanted is None:
        return "q8_0" if model.can_hold("q8_0") else "f16"
    if not model.can_hold(wanted):
        raise BundleError(f"the heads of {model.path.name} cannot be cut into {wanted} blocks; use cache f16")
    return wanted


def _drafter_of(base: Model, draft: Model, cache: str | None, size: Mapping[str, int]) -> Callable[[], Drafter]:
    """Opens drafters for a draft model; `BundleError` if its vocabulary differs and cannot be bridged."""
    same = draft.tokenizer.same_vocabulary(base.tokenizer)
    bridge = None if same else Bridge(base.tokenizer, draft.tokenizer)
    kept = _cache_of(draft, cache)
    return lambda: Drafter(Context(draft, cache=kept, **size), draft.tokenizer, bridge)


def _costs(model: Model, draft: Model | None, threads: int, repack: bool) -> Costs:
    """The cost curve of this machine and these models, measured once and kept."""

    def measure() -> Costs:
        verify = pass_seconds(model, MOST + 1, threads)
        return Costs(pass_seconds(draft, 1, threads)[0] if draft else 0.0, verify)

    key = machine_key() | {"threads": threads, "repack": repack}
    key |= {f"model {k}": v for k, v in file_key(model.path).items()}
    if draft:
        key |= {f"draft {k}": v for k, v in file_key(draft.path).items()}
    return measured_costs(measure, key)

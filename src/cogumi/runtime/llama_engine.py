"""The engine that serves: llama.cpp under continuous batching, with adapters and speculation (SPEC E1, E2, E7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.environment import usable_threads
from cogumi.errors import BundleError, ContextError, RequestError
from cogumi.runtime.engine import Event
from cogumi.runtime.generation import Events, Generation
from cogumi.runtime.lane import Measurement
from cogumi.runtime.llama import Model, Tokenizer
from cogumi.runtime.sampling import check
from cogumi.runtime.scheduler import Scheduler
from cogumi.runtime.speculate import Costs, best_k
from cogumi.types import Reading, Request, Score

SMALL_MODEL = 32_000_000
"""Bytes below which one thread is used: in passes so short, threads wait for each other longer than they work."""


class LlamaEngine:
    """`runtime.engine.Engine` over GGUF files.

    `slots` requests run at a time, each of up to `context` tokens (prompt and answer), `queue` more may wait. `threads`
    None: as many as this process may use, one for a model below `SMALL_MODEL`.
    With a `draft`, which must share the vocabulary, up to `draft_tokens` are drafted per round. Raises
    `BundleError` if a file cannot be used.
    """

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 8,
        context: int = 512,
        threads: int | None = None,
        draft: Path | None = None,
        draft_tokens: int = 5,
        adapters: Mapping[str, Path] | None = None,
        queue: int = 10_000,
    ) -> None:
        self._model = Model(model)
        self._draft = Model(draft) if draft else None
        if self._draft and not self._draft.tokenizer.same_vocabulary(self._model.tokenizer):
            raise BundleError(f"draft {draft} has another vocabulary than {model}; use one of the same tokenizer")
        self._context = context
        self._draft_tokens = draft_tokens if draft else 0
        self._adapters: dict[str, Any] = {}
        self._scheduler = Scheduler(
            self._model,
            self._draft,
            self._adapters,
            slots=slots,
            length=context,
            threads=threads or (1 if model.stat().st_size < SMALL_MODEL else usable_threads()),
            draft_tokens=self._draft_tokens,
            queue=queue,
        )
        for name, path in (adapters or {}).items():
            self.add_adapter(name, path)
        self.costs: Costs | None = self._scheduler.measure_costs() if draft else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the model's file."""
        return self._model.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give as `adapter`."""
        return tuple(self._adapters)

    @property
    def acceptance(self) -> float:
        """Running probability that a drafted token is accepted."""
        return self._scheduler.acceptance.rate

    @property
    def free_slots(self) -> int:
        """Requests that could start at once."""
        return self._scheduler.free_slots

    def add_adapter(self, name: str, path: Path) -> None:
        """Make a LoRA file available as `name`, also while requests run."""
        self._adapters[name] = self._scheduler.call(lambda: self._model.load_adapter(path))

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; see `Engine.generate`."""
        check(request)
        prompt = self._prompt(request)
        if len(prompt) + request.max_tokens > self._context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, but the context holds "
                f"{self._context}; shorten the prompt or ask for fewer tokens"
            )
        generation = Generation(request, prompt, self._drafts(request))
        self._scheduler.submit(request.adapter, generation)
        return Events(generation, generation.events.get)

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` and its end token after the request's prompt."""
        prompt = self._prompt(request)
        ids = [*prompt, *self.tokenizer.encode(answer), self.tokenizer.eos]
        measured = self._measure(request.adapter, [Measurement(ids, len(prompt))])[0]
        return Score(-sum(measured.logprobs), len(measured.logprobs), len(answer.encode("utf-8")))

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

    def _prompt(self, request: Request) -> list[int]:
        if request.adapter is not None and request.adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none is loaded"
            raise RequestError(f"unknown adapter {request.adapter!r}; known: {known}")
        prompt = self.tokenizer.render(request)
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        return prompt

    def _drafts(self, request: Request) -> int:
        """Tokens to draft per round: as many as asked for, or as measured costs and acceptance say pay best."""
        if self._draft is None or request.speculate is False:
            return 0
        if request.speculate or self.costs is None:
            return self._draft_tokens
        return best_k(self.acceptance, self.costs.draft, self.costs.verify)

    def _measure(self, adapter: str | None, jobs: Sequence[Measurement]) -> list[Measurement]:
        for job in jobs:
            if len(job.ids) > self._context:
                raise ContextError(
                    f"the text has {len(job.ids)} tokens, but the context holds {self._context}; shorten it"
                )
        for job in jobs:
            self._scheduler.submit(adapter, job)
        return [job.result.result() for job in jobs]

"""Jobs of an adapter context besides generation: scoring (SPEC E7), prefill (SPEC E6), adapting a head (SPEC C9)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from cogumi.core.types import Request
from cogumi.engine.generation import Generation
from cogumi.engine.llama.output_head import Head
from cogumi.engine.sampling import LogitsProcessor, logprobs_of

Logits = NDArray[np.float32]


class Measurement:
    """Log-probabilities of `ids[first:]` given the ids before them, and optionally hidden states from `start` on.

    Positions before `first - 1` and `start` may come from the cache. `last` is the state of the last position, `mean`
    that of all from `start` on; it does not depend on how the positions were divided into passes. `greedy`: whether
    each of these ids is the most probable token at its position.
    """

    def __init__(self, ids: list[int], first: int, hidden: bool = False, start: int = 0) -> None:
        self.ids, self.first, self.hidden, self.start = ids, first, hidden, start
        self.cached = 0
        self.cancelled = False  # measurements cannot be cancelled
        self.logprobs: list[float] = []
        self.greedy = True
        self._states: list[NDArray[np.float32]] = []
        self.result: Future[Measurement] = Future()
        self.result.set_running_or_notify_cancel()  # only the engine ends it

    def take(self, logits: Logits, states: NDArray[np.float32] | None) -> None:
        """Add the outputs of the next `len(logits)` positions."""
        start, self.cached = self.cached, self.cached + len(logits)
        skip = max(self.first - 1 - start, 0)
        targets = np.array(self.ids[start + skip + 1 : self.cached + 1], np.int64)
        if len(targets):
            rows = logits[skip : skip + len(targets)]
            self.logprobs += logprobs_of(rows, targets).tolist()
            self.greedy = self.greedy and bool((rows.argmax(axis=1) == targets).all())
        if states is not None:
            self._states.append(states[max(self.start - start, 0) :].copy())

    @property
    def reusable(self) -> int:
        """Leading positions whose outputs are not needed."""
        return min(self.first - 1, self.start) if self.hidden else self.first - 1

    @property
    def last(self) -> NDArray[np.float32]:
        """The hidden state of the last position."""
        last: NDArray[np.float32] = self._states[-1][-1]
        return last

    @property
    def mean(self) -> NDArray[np.float32]:
        """The mean hidden state from `start` on."""
        mean: NDArray[np.float32] = np.concatenate(self._states).mean(axis=0)
        return mean

    def end(self, _reason: str = "stop") -> None:
        """Set the result."""
        self.result.set_result(self)

    def fail(self, error: Exception) -> None:
        """Set the error as the result."""
        self.result.set_exception(error)


class SupportExample:
    """An example of an `Adaptation`: collects logits and hidden states at the positions that predict `ids[first:]`."""

    hidden = True

    def __init__(self, ids: list[int], first: int) -> None:
        self.ids, self.first = ids, first
        self.cached = 0
        self.states: list[Logits] = []
        self.logits: list[Logits] = []

    @property
    def targets(self) -> list[int]:
        """The ids to predict: the answer."""
        return self.ids[self.first :]

    def take(self, logits: Logits, states: NDArray[np.float32] | None) -> None:
        """Add the outputs of the next `len(logits)` positions; keeps those that predict the answer."""
        assert states is not None  # requested by `hidden`
        kept = slice(max(self.first - 1 - self.cached, 0), max(len(self.ids) - 1 - self.cached, 0))
        self.cached += len(logits)
        self.logits.append(logits[kept].copy())
        self.states.append(states[kept].copy())


class Adaptation(Generation):
    """A generation by a head that is first adapted to `support`: after prefill, each engine step is one gradient step.

    So other jobs never wait for more than one gradient step. `low_rank` is the current head; it is discarded with the
    job.
    """

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        processor: LogitsProcessor | None,
        head: Head,
        support: Sequence[SupportExample],
    ) -> None:
        super().__init__(request, prompt, processor)
        self.prompt_tokens += sum(len(example.ids) for example in support)
        self.low_rank = head.start
        self._head, self._examples, self._left = head, support, head.steps
        self._support: tuple[Logits, NDArray[np.int64], Logits] | None = None

    @property
    def unread(self) -> SupportExample | None:
        """The next example to process."""
        return next((example for example in self._examples if example.cached < len(example.ids)), None)

    @property
    def ready(self) -> bool:
        """Whether the adaptation is complete and the answer can begin."""
        return not self._left

    def step(self) -> None:
        """One gradient step, after all examples have been processed."""
        if self._support is None:
            states = np.concatenate([part for example in self._examples for part in example.states])
            logits = np.concatenate([part for example in self._examples for part in example.logits])
            self._support = states, np.array([i for example in self._examples for i in example.targets]), logits
            self._examples = ()
        self.low_rank = self._head.step(self.low_rank, *self._support)
        self._left -= 1
        if self.ready:
            self._support = None


class Prefill:
    """A prompt to be processed into the KV cache before its request; the result is the number of tokens cached."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.cached = 0
        self.cancelled = False
        self.result: Future[int] = Future()
        self.result.set_running_or_notify_cancel()  # only the engine ends it

    def end(self, _reason: str = "stop") -> None:
        """Set the number of cached tokens as the result."""
        self.result.set_result(self.cached)

    def fail(self, error: Exception) -> None:
        """Set the error as the result."""
        self.result.set_exception(error)

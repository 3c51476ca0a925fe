"""What a lane does besides answering: measuring texts (SPEC E7), reading ahead (SPEC E6), adapting a head (SPEC C9)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from cogumi.core.types import Request
from cogumi.engine.generation import Generation
from cogumi.engine.llama.output_head import Head
from cogumi.engine.sampling import Rules, logprobs_of

Logits = NDArray[np.float32]


class Measurement:
    """Log-probabilities of `ids[first:]` given what stands before them, and hidden states if wanted.

    `greedy`: whether each of them is the likeliest token at its place.
    """

    def __init__(self, ids: list[int], first: int, hidden: bool = False) -> None:
        self.ids, self.first, self.hidden = ids, first, hidden
        self.cached = 0
        self.cancelled = False  # nobody can
        self.logprobs: list[float] = []
        self.greedy = True
        self.last = self.total = np.zeros(0, np.float32)
        self.result: Future[Measurement] = Future()
        self.result.set_running_or_notify_cancel()  # only the engine ends it

    def take(self, logits: Logits, states: NDArray[np.float32] | None) -> None:
        """Use the outputs of the next `len(logits)` positions."""
        start, self.cached = self.cached, self.cached + len(logits)
        skip = max(self.first - 1 - start, 0)
        targets = np.array(self.ids[start + skip + 1 : self.cached + 1], np.int64)
        if len(targets):
            rows = logits[skip : skip + len(targets)]
            self.logprobs += logprobs_of(rows, targets).tolist()
            self.greedy = self.greedy and bool((rows.argmax(axis=1) == targets).all())
        if states is not None:
            self.last = states[-1].copy()
            total = states.sum(axis=0)
            self.total = self.total + total if len(self.total) else total

    def end(self, _reason: str = "stop") -> None:
        """Hand over the result."""
        self.result.set_result(self)

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self.result.set_exception(error)


class Shot:
    """A worked example that is read for an `Adaptation`: what the model says where `ids[first:]` should follow."""

    hidden = True

    def __init__(self, ids: list[int], first: int) -> None:
        self.ids, self.first = ids, first
        self.cached = 0
        self.states: list[Logits] = []
        self.logits: list[Logits] = []

    @property
    def targets(self) -> list[int]:
        """What should follow."""
        return self.ids[self.first :]

    def take(self, logits: Logits, states: NDArray[np.float32] | None) -> None:
        """Keep the outputs of the next `len(logits)` positions, as far as part of the answer follows them."""
        assert states is not None  # they are wanted
        kept = slice(max(self.first - 1 - self.cached, 0), max(len(self.ids) - 1 - self.cached, 0))
        self.cached += len(logits)
        self.logits.append(logits[kept].copy())
        self.states.append(states[kept].copy())


class Adaptation(Generation):
    """An answer by a head that is first adapted to `shots`: they are read, then each turn makes one step of descent.

    So nobody waits for more than one step. `low_rank` is the head as far as it is adapted, and goes with the job.
    """

    def __init__(
        self, request: Request, prompt: list[int], rules: Rules | None, head: Head, shots: Sequence[Shot]
    ) -> None:
        super().__init__(request, prompt, rules)
        self.prompt_tokens += sum(len(shot.ids) for shot in shots)
        self.low_rank = head.start
        self._head, self._shots, self._left = head, shots, head.steps
        self._support: tuple[Logits, NDArray[np.int64], Logits] | None = None

    @property
    def unread(self) -> Shot | None:
        """The example to be read next."""
        return next((shot for shot in self._shots if shot.cached < len(shot.ids)), None)

    @property
    def ready(self) -> bool:
        """Whether the answer can begin."""
        return not self._left

    def step(self) -> None:
        """Once all examples are read: one step."""
        if self._support is None:
            states = np.concatenate([part for shot in self._shots for part in shot.states])
            logits = np.concatenate([part for shot in self._shots for part in shot.logits])
            self._support = states, np.array([i for shot in self._shots for i in shot.targets]), logits
            self._shots = ()
        self.low_rank = self._head.step(self.low_rank, *self._support)
        self._left -= 1
        if self.ready:
            self._support = None


class Prefill:
    """A prompt to be read into the cache before anybody asks; its result is the number of tokens cached."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.cached = 0
        self.cancelled = False
        self.result: Future[int] = Future()
        self.result.set_running_or_notify_cancel()  # only the engine ends it

    def end(self, _reason: str = "stop") -> None:
        """Say how far it came."""
        self.result.set_result(self.cached)

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self.result.set_exception(error)

"""What a lane does besides answering: measuring texts (SPEC E7) and reading ahead (SPEC E6)."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from cogumi.runtime.sampling import logprobs_of

Logits = NDArray[np.float32]


class Measurement:
    """Log-probabilities of `ids[first:]` given what stands before them, and hidden states if wanted."""

    def __init__(self, ids: list[int], first: int, hidden: bool = False) -> None:
        self.ids, self.first, self.hidden = ids, first, hidden
        self.cached = 0
        self.cancelled = False  # nobody can
        self.logprobs: list[float] = []
        self.last = self.total = np.zeros(0, np.float32)
        self.result: Future[Measurement] = Future()
        self.result.set_running_or_notify_cancel()  # only the engine ends it

    def take(self, logits: Logits, states: NDArray[np.float32] | None) -> None:
        """Use the outputs of the next `len(logits)` positions."""
        start, self.cached = self.cached, self.cached + len(logits)
        skip = max(self.first - 1 - start, 0)
        targets = np.array(self.ids[start + skip + 1 : self.cached + 1], np.int64)
        if len(targets):
            self.logprobs += logprobs_of(logits[skip : skip + len(targets)], targets).tolist()
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

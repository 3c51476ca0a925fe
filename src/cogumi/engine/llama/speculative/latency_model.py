"""Forward-pass latency model: a curve measured beforehand, updated from live timings (SPEC E2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

MAX_DRAFT = 15
"""Maximum number of drafted tokens per request and step."""
WINDOW, UPDATE_INTERVAL = 9, 32
"""Number of passes per size whose median is used, and of passes between two updates of the curve."""


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """Seconds of one drafted token (0 without a draft model), and of base passes over 1, 2, .. tokens.

    `verify` is made non-decreasing: a larger pass takes at least the time of a smaller one.
    """

    draft: float
    verify: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "verify", tuple(accumulate(self.verify, max)))

    @property
    def step(self) -> float:
        """Seconds of a base step without drafting."""
        return self.verify[0]

    def seconds(self, tokens: int) -> float:
        """Seconds of a base pass over `tokens` tokens; extrapolated with the slope of the upper half."""
        last = len(self.verify)
        if tokens <= last:
            return self.verify[tokens - 1]
        middle = last // 2
        slope = (self.verify[-1] - self.verify[middle - 1]) / (last - middle) if middle else self.step
        return self.verify[-1] + (tokens - last) * slope

    def drafting(self, requests: int) -> float:
        """Seconds of one draft step for a batch of requests; scales with the batch like the base's passes."""
        return self.draft * self.seconds(requests) / self.step if self.draft and requests else 0.0

    @property
    def reading(self) -> float:
        """Seconds per token of the draft's prefill."""
        most = len(self.verify)
        return self.drafting(most) / most

    def passes(self, drafted: Sequence[int]) -> float:
        """Seconds of the base passes of one batch, with the last token and the drafted tokens of each request.

        llama.cpp splits a batch into passes with equally many tokens of every remaining sequence: one pass per distinct
        number.
        """
        seconds, done = 0.0, -1
        for k in sorted(set(drafted)):
            seconds += self.seconds(sum(n >= k for n in drafted) * (k - done))
            done = k
        return seconds


class LatencyTracker:
    """A latency curve updated from live timings.

    Other load on the machine, during the measurement or now, and a growing context make the measured curve wrong. So
    its points are replaced by the times of the passes that the engine runs. The curve stays non-decreasing: in a
    conflict the most recently observed size takes precedence.
    """

    def __init__(self, measured: LatencyCurve) -> None:
        self._measured, self._current = measured, measured
        self._times: dict[int, deque[float]] = {}  # by size, most recently observed size last
        self._since_update = 0

    def observe(self, tokens: int, seconds: float) -> LatencyCurve:
        """Add the time of a pass over `tokens` tokens (0: a draft step); returns the current curve."""
        if tokens <= len(self._measured.verify):
            times = self._times.pop(tokens, None) or deque(maxlen=WINDOW)
            times.append(seconds)
            self._times[tokens] = times
            self._since_update += 1
        if self._since_update >= UPDATE_INTERVAL:
            self._since_update = 0
            self._current = self._update()
        return self._current

    def _update(self) -> LatencyCurve:
        observed = {tokens: median(times) for tokens, times in self._times.items()}
        draft = observed.pop(0, self._measured.draft)
        verify = list(self._measured.verify)
        for tokens, seconds in observed.items():
            verify[tokens - 1 :] = [max(seconds, known) for known in verify[tokens - 1 :]]
            verify[:tokens] = [min(seconds, known) for known in verify[:tokens]]
        return LatencyCurve(draft, tuple(verify))

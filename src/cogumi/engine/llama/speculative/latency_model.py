"""What passes cost: a curve measured beforehand, and what the clock says while the engine works (SPEC E2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

MOST = 15
"""Drafted tokens per request and turn, at most."""
RECENT, REVIEW = 9, 32
"""Passes of one size whose median counts, and passes between two looks at the curve."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of one drafted token (0 without a draft model), and of base passes over 1, 2, .. tokens.

    More tokens never cost less: where the clock says so, the larger pass gets the smaller one's time.
    """

    draft: float
    verify: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "verify", tuple(accumulate(self.verify, max)))

    @property
    def step(self) -> float:
        """Seconds of a plain base step."""
        return self.verify[0]

    def seconds(self, tokens: int) -> float:
        """Seconds of a base pass over so many tokens; beyond the last point with the slope of the upper half."""
        last = len(self.verify)
        if tokens <= last:
            return self.verify[tokens - 1]
        middle = last // 2
        slope = (self.verify[-1] - self.verify[middle - 1]) / (last - middle) if middle else self.step
        return self.verify[-1] + (tokens - last) * slope

    def drafting(self, requests: int) -> float:
        """Seconds of one draft step for so many requests at a time: it grows with them as the base's passes do."""
        return self.draft * self.seconds(requests) / self.step if self.draft and requests else 0.0

    @property
    def reading(self) -> float:
        """Seconds in which the draft reads one token of a long text."""
        most = len(self.verify)
        return self.drafting(most) / most

    def passes(self, drafted: Sequence[int]) -> float:
        """Seconds of the base passes of one batch, in which each request has its last token and so many drafted.

        llama.cpp takes equally many tokens of every sequence that has some left: one pass per different number.
        """
        seconds, done = 0.0, -1
        for k in sorted(set(drafted)):
            seconds += self.seconds(sum(n >= k for n in drafted) * (k - done))
            done = k
        return seconds


class Pace:
    """A curve that follows the clock.

    A machine that was busy when it was measured, or is now, and a context that grows make a curve wrong. So passes
    that the engine runs anyway take the place of its points. A larger pass never costs less than a smaller one: where
    that is violated, the later word is believed.
    """

    def __init__(self, before: Costs) -> None:
        self._before, self._now = before, before
        self._seen: dict[int, deque[float]] = {}  # by size, the one seen last at the end
        self._unread = 0

    def observe(self, tokens: int, seconds: float) -> Costs:
        """Add a pass over so many tokens (0: a step of the draft); returns the curve as it stands."""
        if tokens <= len(self._before.verify):
            times = self._seen.pop(tokens, None) or deque(maxlen=RECENT)
            times.append(seconds)
            self._seen[tokens] = times
            self._unread += 1
        if self._unread >= REVIEW:
            self._unread = 0
            self._now = self._review()
        return self._now

    def _review(self) -> Costs:
        seen = {tokens: median(times) for tokens, times in self._seen.items()}
        draft = seen.pop(0, self._before.draft)
        verify = list(self._before.verify)
        for tokens, seconds in seen.items():
            verify[tokens - 1 :] = [max(seconds, known) for known in verify[tokens - 1 :]]
            verify[:tokens] = [min(seconds, known) for known in verify[:tokens]]
        return Costs(draft, tuple(verify))

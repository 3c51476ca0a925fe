"""Chooses the number of threads of each pass while a model runs: pure (SPEC E1).

Threads of one pass wait for each other. If another program takes a processor away from one of them, all wait: with two
threads beside other work a token was measured to take up to seven times as long as with one. So passes with all threads
and with one thread are timed, and the faster number is used. Both are measured again from time to time, and soon after
a pass that took much longer than usual. Results do not depend on the number of threads.
"""

from __future__ import annotations

PROBE_EVERY, PROBE_SOON = 200, 4
"""Passes until the other number of threads is tried: usually, and at the start and after a slow pass."""
SLOW = 1.5
"""A pass that takes this many times the usual is slow."""
RECENT = 0.4
"""Weight of the newest pass in a running average."""


class ThreadControl:
    """Chooses between `most` threads and one; with `most` 1 there is no choice. Used by one thread at a time.

    Times are compared between passes of about equally many tokens (the same power of two).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._seconds: dict[tuple[int, int], float] = {}  # (power of two of the tokens, threads) -> running average
        self._best = most
        self._left = 1  # passes until the other number of threads is tried

    def choose(self) -> int:
        """The number of threads of the next pass."""
        if self.most == 1 or self._left > 0:
            return self._best
        return 1 if self._best == self.most else self.most

    def observe(self, threads: int, tokens: int, seconds: float) -> None:
        """Learn from a pass of `tokens` tokens."""
        if self.most == 1:
            return
        size = tokens.bit_length()
        usual = None if self._left <= 0 else self._seconds.get((size, threads))  # a trial starts a new average
        self._seconds[size, threads] = seconds if usual is None else usual + RECENT * (seconds - usual)
        both = [self._seconds.get((size, n)) for n in (1, self.most)]
        compared = both[0] is not None and both[1] is not None
        if self._left <= 0:
            self._left = PROBE_EVERY if compared else PROBE_SOON
        else:
            self._left -= 1
            if not compared or (usual is not None and seconds > SLOW * usual):
                self._left = min(self._left, PROBE_SOON)
        if both[0] is not None and both[1] is not None:
            self._best = 1 if both[0] < both[1] else self.most

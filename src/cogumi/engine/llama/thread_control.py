"""Chooses the number of threads of each pass while a model runs: pure (SPEC E1).

Threads of one pass wait for each other. If another program takes a processor away from one of them, all wait: with two
threads beside other work a pass was measured to take up to thirty times as long as with one. So passes are timed, and
the faster number of threads is used. The other number is tried again from time to time, and at once after a pass of
several threads that took much longer than usual. Results do not depend on the number of threads.
"""

from __future__ import annotations

SHARE = 0.02
"""Share of the time that trials may take: one of a second is followed by 50 seconds without."""
SMALL = 32
"""A trial waits for a pass of at most this many tokens, because a slow one costs its length."""
SLOW = 2.0
"""A pass of several threads that takes this many times the usual is followed by a trial of one."""
RECENT = 0.3
"""Weight of the newest pass in a running average."""


class ThreadControl:
    """Chooses between `most` threads and one; with `most` 1 there is no choice. Used by one thread at a time.

    Begins with one thread and tries `most` at the first occasion. Times are compared between passes of about equally
    many tokens (the same power of two).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._best = 1
        self._usual: dict[int, float] = {}  # power of two of the tokens -> average seconds with the best number
        self._left = 0.0  # seconds of work until the next trial

    def choose(self, tokens: int) -> int:
        """The number of threads of the next pass, which has so many tokens."""
        trial = self.most > 1 and self._left <= 0 and tokens <= SMALL and tokens.bit_length() in self._usual
        return self._other if trial else self._best

    @property
    def _other(self) -> int:
        return 1 if self._best == self.most else self.most

    def observe(self, threads: int, tokens: int, seconds: float) -> None:
        """Learn from a pass."""
        if self.most == 1:
            return
        size = tokens.bit_length()
        usual = self._usual.get(size)
        if threads != self._best:
            self._end_trial(threads, size, seconds)
            return
        self._left -= seconds
        self._usual[size] = seconds if usual is None else usual + RECENT * (seconds - usual)
        if usual is not None and threads > 1 and seconds > SLOW * usual:
            self._left = 0.0

    def _end_trial(self, threads: int, size: int, seconds: float) -> None:
        if seconds < self._usual[size]:
            self._best, self._usual = threads, {size: seconds}
        self._left = seconds / SHARE

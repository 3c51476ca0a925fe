"""Limits per minute: a bucket that fills steadily, from which requests take before any work (token bucket)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from cogumi.serve.api_keys import Key
from cogumi.serve.problem import Problem

MINUTE = 60.0
CLOCK = time.monotonic


class Bucket:
    """Allows `limit` units a minute, at most so many at once; `clock` counts seconds (None: `CLOCK`)."""

    def __init__(self, limit: int, clock: Callable[[], float] | None = None) -> None:
        self.limit, self._now = limit, clock or CLOCK
        self._level, self._at = float(limit), self._now()

    @property
    def level(self) -> float:
        """Units that may be taken now; negative if more was used than was reserved."""
        at = self._now()
        self._level = min(self.limit, self._level + (at - self._at) * self.limit / MINUTE)
        self._at = at
        return self._level

    def take(self, units: int) -> float:
        """Take units; returns 0, or the seconds to wait if there are too few (then none are taken)."""
        if units > self.level:
            return (units - self._level) * MINUTE / self.limit
        self._level -= units
        return 0.0

    def give_back(self, units: int) -> None:
        """Return unused units."""
        self._level = min(self.limit, self.level + units)

    def headers(self, what: str) -> dict[str, str]:
        """OpenAI's headers: limit, units left, and the time until the bucket is full."""
        left = self.level
        full = (self.limit - left) * MINUTE / self.limit
        return {
            f"x-ratelimit-limit-{what}": str(self.limit),
            f"x-ratelimit-remaining-{what}": str(max(0, math.floor(left))),
            f"x-ratelimit-reset-{what}": f"{full:.3f}s",
        }


class Meter:
    """The limits of one key."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.requests = Bucket(key.requests) if key.requests else None
        self.tokens = Bucket(key.tokens) if key.tokens else None

    def take_request(self) -> None:
        """Count a request. Raises `Problem` 429 if it is one too many."""
        if self.requests and (wait := self.requests.take(1)):
            raise _limited(f"{self.key.requests} requests", wait)

    def take_tokens(self, tokens: int) -> None:
        """Reserve tokens. Raises `Problem` 429 if there are too few, for good if a whole minute has too few."""
        if self.tokens is None:
            return
        if tokens > self.tokens.limit:
            what = f"this request may take {tokens} tokens, but your key has {self.tokens.limit} a minute"
            raise Problem(429, f"{what}; lower max_tokens", code="rate_limit_exceeded")
        if wait := self.tokens.take(tokens):
            raise _limited(f"{self.tokens.limit} tokens", wait)

    def give_back(self, *, requests: int = 0, tokens: int = 0) -> None:
        """Return what was not used."""
        if self.requests and requests:
            self.requests.give_back(requests)
        if self.tokens and tokens:
            self.tokens.give_back(tokens)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a response."""
        requests = self.requests.headers("requests") if self.requests else {}
        return requests | (self.tokens.headers("tokens") if self.tokens else {})


def _limited(what: str, wait: float) -> Problem:
    message = f"your key allows {what} a minute; try again in {wait:.1f} seconds"
    return Problem(429, message, code="rate_limit_exceeded", retry=max(1, math.ceil(wait)))

"""Offsets of P(correct) for users with personal routing, fitted on their own turns (SPEC F17)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from cogumi.cascade.memory.known_votes import vote_of
from cogumi.cascade.memory.turns import Memory
from cogumi.confidence import personal
from cogumi.confidence.recalibration import DOMAIN, Correction, Votes
from cogumi.core.errors import StateError

MAX_TURNS = 500  # newest turns of a user that offsets are fitted on
_CACHE_LIMITS = 10_000, 60.0  # users with cached offsets, seconds until they expire


@dataclass(frozen=True, slots=True)
class PersonalRouting:
    """State of one user's personal routing: whether it is `on`, and its offsets.

    `rated` counts rated and gated answers among the newest `MAX_TURNS` turns; `offsets` need at least `needed` of them.
    These are added to the logit of P(correct), in nats, by domain (`all` if no router decided); empty while personal
    routing is off.
    """

    user: str
    on: bool
    rated: int
    needed: int
    offsets: Mapping[str, float]


class PersonalOffsets:
    """Offsets of the logit by user, cached for a minute; see `confidence.personal`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._evidence: dict[str, personal.Evidence] = {}  # users that may be neighbours
        self._cache: dict[str, tuple[float, Mapping[str, float]]] = {}  # user -> (time of the fit, offsets)

    def shift(self, user: str, features: Mapping[str, float], layer: Correction | None) -> float:
        """Offset of the logit of an answer to this user; 0 without personal routing. Never raises."""
        own = self._of(user, layer)
        return (
            sum(share * own.get(name, 0.0) for name, share in personal.domain_shares(features).items()) if own else 0.0
        )

    def describe(self, user: str, layer: Correction | None) -> PersonalRouting:
        """State of a user's personal routing. Raises `StateError` if the memory cannot be read."""
        on, own = self._memory.personal(user), self._own(user, layer)
        found = self._offsets(user, own) if on else {}
        named = {name.removeprefix(DOMAIN) or "all": offset for name, offset in found.items()}
        return PersonalRouting(user, on, own.votes if own else 0, personal.MIN_VOTES, named)

    def _of(self, user: str, layer: Correction | None) -> Mapping[str, float]:
        if not user:
            return {}
        made, found = self._cache.get(user, (-math.inf, {}))
        if time.monotonic() - made > _CACHE_LIMITS[1]:
            with suppress(StateError):  # an unreadable memory must not fail an answer
                found = self._offsets(user, self._own(user, layer)) if self._memory.personal(user) else {}
            if len(self._cache) >= _CACHE_LIMITS[0]:
                self._cache.clear()
            self._cache[user] = time.monotonic(), found
        return found

    def _own(self, user: str, layer: Correction | None) -> personal.Evidence | None:
        """A user's evidence; None without ratings."""
        turns = reversed(self._memory.recent(user, MAX_TURNS))
        votes = Votes.of(vote for turn in turns if (vote := vote_of(turn)))
        return personal.evidence(votes, layer.p_all(votes, ()) if layer else votes.p).get(user)

    def _offsets(self, user: str, own: personal.Evidence | None) -> Mapping[str, float]:
        others = [other for name, other in self._evidence.items() if name != user]
        return personal.offsets(own, others) if own else {}

    def set_neighbours(self, votes: Votes, layer: Correction | None) -> None:
        """Let users with similar patterns in these votes share statistical strength."""
        found = personal.evidence(votes, layer.p_all(votes, ()) if layer else votes.p)
        self._evidence = {name: own for name, own in found.items() if name and own.votes >= personal.MIN_VOTES}

    def invalidate(self, user: str | None = None) -> None:
        """Invalidate the cached offsets of a user, or of all users."""
        if user is None:
            self._cache.clear()
        else:
            self._cache.pop(user, None)

    def forget(self, user: str) -> None:
        """Delete all data about a user."""
        self._cache.pop(user, None)
        self._evidence.pop(user, None)

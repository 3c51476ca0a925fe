"""The offsets of users who asked for personal routing, made from their own turns (SPEC F17)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress

from cogumi.cascade.memory.known_votes import vote_of
from cogumi.cascade.memory.turns import Memory
from cogumi.confidence import personal
from cogumi.confidence.recalibration import Correction, Votes
from cogumi.core.errors import StateError

PERSON = 500  # turns of a user that offsets are made of
_READY = 10_000, 60.0  # users whose offsets are held ready, seconds for which they are


class PersonalOffsets:
    """Offsets of the logit by user, held ready for a minute; see `confidence.personal`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._evidence: dict[str, personal.Evidence] = {}  # of those who may be neighbours
        self._ready: dict[str, tuple[float, Mapping[str, float]]] = {}  # with the time at which they were made

    def shift(self, user: str, features: Mapping[str, float], layer: Correction | None) -> float:
        """What to add to the logit of an answer to this user; 0 for who did not ask for it. Never raises."""
        own = self._of(user, layer)
        return (
            sum(share * own.get(name, 0.0) for name, share in personal.domain_shares(features).items()) if own else 0.0
        )

    def _of(self, user: str, layer: Correction | None) -> Mapping[str, float]:
        if not user:
            return {}
        made, found = self._ready.get(user, (-math.inf, {}))
        if time.monotonic() - made > _READY[1]:
            with suppress(StateError):  # an answer does not fail because a memory cannot be read
                found = self._made(user, layer) if self._memory.personal(user) else {}
            if len(self._ready) >= _READY[0]:
                self._ready.clear()
            self._ready[user] = time.monotonic(), found
        return found

    def _made(self, user: str, layer: Correction | None) -> Mapping[str, float]:
        turns = reversed(self._memory.recent(user, PERSON))
        votes = Votes.of(vote for turn in turns if (vote := vote_of(turn)))
        own = personal.evidence(votes, layer.p_all(votes, ()) if layer else votes.p).get(user)
        others = [other for name, other in self._evidence.items() if name != user]
        return personal.offsets(own, others) if own else {}

    def compare(self, votes: Votes, layer: Correction | None) -> None:
        """Let users of a similar pattern in these votes share strength."""
        found = personal.evidence(votes, layer.p_all(votes, ()) if layer else votes.p)
        self._evidence = {name: own for name, own in found.items() if name and own.votes >= personal.MIN_VOTES}

    def renew(self, user: str | None = None) -> None:
        """Make the offsets of a user, or of all, anew when they are next needed."""
        if user is None:
            self._ready.clear()
        else:
            self._ready.pop(user, None)

    def forget(self, user: str) -> None:
        """Drop all that is known of a user."""
        self._ready.pop(user, None)
        self._evidence.pop(user, None)

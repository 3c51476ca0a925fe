"""The newest votes in a memory, and the trust in the users who cast them (SPEC F16)."""

from __future__ import annotations

import hashlib
import json
import time
from itertools import islice

from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.confidence.recalibration import Correction, Doubles, Vote, Votes, features, learn, trust, weights

REPLAY = 20_000  # votes
HALF_LIFE = 5_000.0  # votes
_OVERLAP = 0.02  # seconds that are read again; a vote missed or read twice has no effect


def vote_of(turn: Turn) -> Vote | None:
    """Convert a rated turn to a vote; None if the turn has no gated answer."""
    if turn.outcome is None or turn.p_correct is None or turn.route == "abstained":
        return None
    content = json.dumps([turn.question, turn.answer]).encode()
    answer = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Vote(turn.id, turn.user, answer, turn.p_correct, features(turn.signals), turn.outcome)


class RecentVotes:
    """At most `REPLAY` votes, read from `memory` by `read_new`; `trust` by user, None before the first `fit`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.votes: dict[tuple[str, str], tuple[float, Vote]] = {}  # (user, id) -> (time of the answer, vote)
        self.trust: dict[str, float] | None = None
        self._read_until = 0.0

    def read_new(self) -> None:
        """Read ratings of all processes since the last call."""
        began = time.time()
        for turn in self._memory.rated(self._read_until, REPLAY):
            self.votes.pop((turn.user, turn.id), None)
            if vote := vote_of(turn):
                self.votes[turn.user, turn.id] = turn.at, vote
        self._read_until = began - _OVERLAP
        for key in list(islice(self.votes, max(len(self.votes) - REPLAY, 0))):
            del self.votes[key]

    def since(self, time: float, newest: int = REPLAY) -> Votes:
        """The newest votes on answers given since `time`."""
        return Votes.of([vote for at, vote in self.votes.values() if at >= time][-newest:])

    def fit(self, votes: Votes) -> Correction:
        """Fit a correction layer and the trust in users."""
        layer, self.trust = learn(votes, HALF_LIFE)
        return layer

    def update_trust(self, votes: Votes, layer: Correction) -> None:
        """Update the trust in users, to discount users who began to contradict all others after the last fit."""
        self.trust = trust(votes, layer.p_all(votes, ()))

    def weights(self, votes: Votes) -> Doubles:
        """Weight of each vote [n]."""
        return weights(votes, self.trust or {})

    def weight_of(self, user: str) -> float:
        """Trust in a user; 1 without evidence against it."""
        return (self.trust or {}).get(user, 1.0)

    def forget(self, user: str) -> None:
        """Delete a user's votes and trust."""
        self.votes = {key: found for key, found in self.votes.items() if key[0] != user}
        if self.trust is not None:
            self.trust.pop(user, None)

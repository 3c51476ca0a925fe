"""Learning from use: corrects P(correct) by the votes in memory (SPEC F16, F17); see `confidence.recalibration`.

After `CHECK_INTERVAL` ratings in a process, or earlier if they contradict the active layer, one process at a time
reviews the new votes: it rolls back a harmful layer, decides about a candidate (canary) with enough votes, or fits a
candidate if there is none and there are `FIT_INTERVAL` more ratings. This runs in the thread of the rating and takes
about half a second, because at most `known_votes.REPLAY` votes are read. The state is stored in `learned.json` (see
`learned_file`); if the file is unreadable, the gate is not corrected. Votes on abstentions are ignored, because they
judge no answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cogumi.cascade.memory.known_votes import RecentVotes, vote_of
from cogumi.cascade.memory.learned_file import Learned, LearnedFile
from cogumi.cascade.memory.personal_offsets import PersonalOffsets, PersonalRouting
from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.recalibration import (
    MAX_HARM,
    MIN_GAIN,
    Correction,
    Doubles,
    Votes,
    cap_below_thresholds,
    certified,
    cusum_harm,
    features,
    gain,
    in_canary,
    logit,
    weights,
)

MIN_VOTES = 10_000  # capped votes before the first fit
CHECK_INTERVAL = 500  # ratings between reviews
FIT_INTERVAL = 1_000  # ratings between fits
CANARY_VOTES = 500  # capped votes on answers of the canary, for a decision about it
WATCH_WINDOW = 8_000  # votes in which a harmful layer is searched for


class Learner:
    """Corrects P(correct) by the ratings in `memory`; stores `learned.json` in `folder`.

    `promises`: guarantees of the calibration; only a certified correction raises an answer above their thresholds.
    `need`: votes before the first fit. `neighbours`: users with similar patterns share statistical strength. Safe for
    several threads and processes. Raises `StateError` if the folder is not writable.
    """

    def __init__(
        self,
        memory: Memory,
        folder: Path,
        promises: Sequence[Guarantee],
        *,
        need: int = MIN_VOTES,
        neighbours: bool = False,
    ) -> None:
        self._memory, self._need, self._neighbours = memory, need, neighbours
        self._promises = [promise for promise in promises if promise.threshold <= 1.0]
        self._thresholds = sorted(promise.threshold for promise in self._promises)
        self._lock, self._unchecked, self._suspicion = threading.Lock(), 0, 0.0
        self._votes, self._personal = RecentVotes(memory), PersonalOffsets(memory)
        self._file = LearnedFile(folder)
        self._refresh()

    def p_correct(self, turn_id: str, user: str, p: float, signals: Mapping[str, float]) -> float:
        """P(correct) to show and to compare with the threshold; without corrections the gate's `p`. Never raises."""
        if not 0.0 <= p <= 1.0:
            return p
        self._refresh()
        state, seen = self._file.state, features(signals)
        layer = state.canary if state.canary and in_canary(turn_id) else state.layer
        q = layer.p_correct(p, seen, self._thresholds) if layer else p
        shift = self._personal.shift(user, seen, state.layer)
        return float(cap_below_thresholds(q, sigmoid(logit(q) + shift), self._thresholds)) if shift else q

    def personal(self, user: str, on: bool | None = None) -> PersonalRouting:
        """Switch a user's personal routing on or off (None: no change) and return its state.

        Raises `StateError` if the memory cannot be read or written.
        """
        if on is not None:
            self._memory.set_personal(user, on)
            self._personal.invalidate(user)
        self._refresh()
        return self._personal.describe(user, self._file.state.layer)

    def rated(self, turn: Turn) -> None:
        """Process a rating; call it with the result of each `Memory.rate`.

        Raises `StateError` if the memory cannot be read.
        """
        self._personal.invalidate(turn.user)
        self._unchecked += 1
        self._suspicion = max(self._suspicion + self._cost(turn), 0.0)
        if (self._unchecked >= CHECK_INTERVAL or self._suspicion >= MAX_HARM) and self._lock.acquire(blocking=False):
            try:
                self._unchecked = 0
                with self._file.exclusive_lock() as locked:
                    if locked:
                        self._review()
            finally:
                self._lock.release()

    def _cost(self, turn: Turn) -> float:
        """Harm of the layer in this turn: its Brier score minus the gate's own."""
        state = self._file.state
        if not state.layer or turn.at < state.promoted or not (vote := vote_of(turn)):
            return 0.0
        q = state.layer.p_correct(vote.p, vote.features, self._thresholds)
        return self._votes.weight_of(vote.user) * ((q - vote.right) ** 2 - (vote.p - vote.right) ** 2)

    def forget(self, user: str) -> int:
        """Delete a user's turns from the memory, and data derived from them here; returns the number of turns.

        Other processes keep votes of the user (numbers, no text) until they end or newer votes replace them.
        """
        with self._lock:  # no thread is learning meanwhile
            forgotten = self._memory.forget(user)
            self._votes.forget(user)
            self._personal.forget(user)
        return forgotten

    def state(self) -> dict[str, Any]:
        """The active correction, the candidate and the history, as JSON values."""
        self._refresh()
        return self._file.state.model_dump(mode="json")

    def _refresh(self) -> None:
        """Load corrections learned by another process."""
        before = self._file.state
        if self._file.refresh():
            self._changed(before)

    def _save(self, state: Learned) -> None:
        before = self._file.state
        self._file.save(state)
        self._changed(before)

    def _changed(self, before: Learned) -> None:
        """Drop data derived from the state `before`."""
        if self._file.state.layer != before.layer:
            self._suspicion = 0.0
        self._personal.invalidate()

    def _served(self, layer: Correction | None, votes: Votes) -> Doubles:
        return layer.p_all(votes, self._thresholds) if layer else votes.p

    def _review(self) -> None:
        """Roll back, decide or fit, as needed."""
        self._refresh()
        self._votes.read_new()
        state = before = self._file.state
        if self._votes.trust is None and (state.layer or state.canary):
            self._votes.fit(self._votes.since(state.since))
        if state.layer:
            state = self._roll_back_if_harmful(state, state.layer)
        if state.canary:
            state = self._decide_canary(state, state.canary)
        elif self._memory.ratings(state.fitted) >= FIT_INTERVAL and self._memory.ratings(state.since) >= self._need:
            state = self._fit_candidate(state)
        if state is not before:
            self._save(state)
        if self._neighbours:
            self._personal.set_neighbours(self._votes.since(0.0), state.layer)

    def _roll_back_if_harmful(self, state: Learned, layer: Correction) -> Learned:
        """Roll back the layer if it is harmful."""
        votes = self._votes.since(state.promoted, WATCH_WINDOW)
        q = self._served(layer, votes)
        harm = cusum_harm(votes, self._votes.weights(votes), votes.p, q)
        if harm >= MAX_HARM:
            self._votes.update_trust(self._votes.since(state.since), layer)
            harm = cusum_harm(votes, self._votes.weights(votes), votes.p, q)
        if harm < MAX_HARM:
            self._suspicion = harm  # computed with caps per user
            return state
        now = time.time()  # not fitted on earlier votes again: conditions have changed
        changes = {"layer": None, "canary": None, "fitted": now, "since": now}
        return state.with_event("rolled back", changes, harm=harm, votes=len(votes))

    def _decide_canary(self, state: Learned, canary: Correction) -> Learned:
        """Promote the candidate, drop it, or continue its trial."""
        fresh = self._votes.since(state.started)
        votes = fresh.select(np.array([in_canary(row.id) for row in fresh.rows], dtype=bool))
        before, after = self._served(state.layer, votes), self._served(canary, votes)

        def undecided() -> bool:
            w = self._votes.weights(votes)
            return bool(w.sum() < CANARY_VOTES) and cusum_harm(votes, w, before, after) < MAX_HARM

        if undecided():
            return state
        self._votes.update_trust(self._votes.since(state.since), canary)
        if undecided():
            return state
        w = self._votes.weights(votes)
        harm = cusum_harm(votes, w, before, after)
        lifting = replace(canary, certified=True)
        test = state.tests + 1
        if certified(fresh, self._votes.weights(fresh), self._served(lifting, fresh), self._promises, test):
            canary = lifting
        found = gain(votes, w, before, self._served(canary, votes))
        figures = {"harm": harm, "certified": canary.certified, **asdict(found)}
        if harm >= MAX_HARM or found.gain < MIN_GAIN or found.low <= 0.0:
            return state.with_event("dropped", {"canary": None, "tests": test}, **figures)
        return state.with_event(
            "promoted", {"layer": canary, "promoted": time.time(), "canary": None, "tests": test}, **figures
        )

    def _fit_candidate(self, state: Learned) -> Learned:
        """Fit a candidate if there are enough votes."""
        votes = self._votes.since(state.since)
        counted, now = float(weights(votes, {}).sum()), time.time()
        if counted < self._need:
            return state.model_copy(update={"fitted": now})
        layer = self._votes.fit(votes)
        return state.with_event("canary", {"canary": layer, "started": now, "fitted": now}, votes=counted)

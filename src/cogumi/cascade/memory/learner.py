"""Learning from use: what the votes in memory do to P(correct) (SPEC F16, F17); see `confidence.recalibration`.

Every `CHECK` ratings that a process hears of, or at once where they speak against what serves, one process at a time
looks at the fresh votes: it withdraws a layer that does harm, decides on a candidate that has enough votes of its own,
or, where there is none and `EVERY` more ratings have come in, fits one. This happens in the thread that brings the
rating and takes about half a second, since at most `REPLAY` votes are looked at. What serves is kept in `learned.json`;
a file that cannot be read is set aside and the gate serves uncorrected. Abstentions are not learned from: a vote on one
judges no answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.confidence import personal
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.recalibration import (
    GAIN,
    HARM,
    Doubles,
    Layer,
    Vote,
    Votes,
    certified,
    features,
    gain,
    hold,
    in_canary,
    learn,
    logit,
    trust,
    weights,
    worst_stretch,
)
from cogumi.core.errors import StateError
from cogumi.core.files import write_json

FILE = "learned.json"
NEED = 10_000  # votes, within the caps, before anything is learned
CHECK = 500  # ratings
EVERY = 1_000  # ratings
ENOUGH = 500  # votes of the canary's own, within the caps, for a decision
REPLAY = 20_000  # votes
WATCH = 8_000  # votes
HALF_LIFE = 5_000.0  # votes
HISTORY = 200  # events kept
PERSON = 500  # turns of a user that personal offsets are made of
_OVERLAP = 0.02  # seconds that are read again; a vote missed or seen twice makes no difference
_READY = 10_000, 60.0  # users whose offsets are held ready, seconds for which they are


class Learned(BaseModel):
    """What learned.json holds. Times are in seconds since 1970; `tests` counts the certificates tried for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal[1] = 1
    layer: Layer | None = None
    promoted: float = 0.0
    canary: Layer | None = None
    started: float = 0.0
    fitted: float = 0.0
    since: float = 0.0
    tests: int = Field(0, ge=0)
    history: tuple[dict[str, Any], ...] = ()

    def told(self, what: str, changes: Mapping[str, Any], **figures: float | bool) -> Learned:
        """The same with `changes`, and one more event in its history."""
        event = {"at": time.time(), "event": what, **figures}
        return self.model_copy(update={**changes, "history": (*self.history, event)[-HISTORY:]})


def vote_of(turn: Turn) -> Vote | None:
    """A rated turn as a vote; None if it judges no answer of a gate."""
    if turn.outcome is None or turn.p_correct is None or turn.route == "abstained":
        return None
    content = json.dumps([turn.question, turn.answer]).encode()
    answer = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Vote(turn.id, turn.user, answer, turn.p_correct, features(turn.signals), turn.outcome)


class Learner:
    """Corrects P(correct) by what `memory` holds; keeps `learned.json` in `folder`.

    `promises` are those of the calibration: without certificate no correction lifts an answer over their thresholds.
    `need` votes are wanted before anything is learned. `neighbours` lets users of a similar pattern share strength.
    Safe from several threads and processes. Raises `StateError` if the folder cannot be written.
    """

    def __init__(
        self,
        memory: Memory,
        folder: Path,
        promises: Sequence[Guarantee],
        *,
        need: int = NEED,
        neighbours: bool = False,
    ) -> None:
        self._memory, self._folder, self._need, self._neighbours = memory, folder, need, neighbours
        self._promises = [promise for promise in promises if promise.threshold <= 1.0]
        self._thresholds = sorted(promise.threshold for promise in self._promises)
        self._path = folder / FILE
        self._state, self._seen = Learned(), (0, 0)
        self._lock, self._unchecked, self._suspicion = threading.Lock(), 0, 0.0
        self._known: dict[tuple[str, str], tuple[float, Vote]] = {}  # the newest votes, with the time of the answer
        self._followed = 0.0
        self._trust: dict[str, float] | None = None
        self._evidence: dict[str, personal.Evidence] = {}
        self._persons: dict[str, tuple[float, Mapping[str, float]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sqlite3.connect(folder / "learned.lock").close()
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error
        self._refresh()

    def _unwritable(self, error: Exception) -> StateError:
        return StateError(f"{self._folder} cannot keep what is learned ({error}); name a folder that can be written")

    def p_correct(self, turn_id: str, user: str, p: float, signals: Mapping[str, float]) -> float:
        """P(correct) as it should be shown and compared with the threshold; the gate's own `p` where nothing is
        learned. Never raises.
        """
        if not 0.0 <= p <= 1.0:
            return p
        self._refresh()
        state, seen = self._state, features(signals)
        layer = state.canary if state.canary and in_canary(turn_id) else state.layer
        q = layer.p_correct(p, seen, self._thresholds) if layer else p
        own = self._offsets(user)
        if not own:
            return q
        shift = sum(share * own.get(name, 0.0) for name, share in personal.shares(seen).items())
        return float(hold(q, sigmoid(logit(q) + shift), self._thresholds)) if shift else q

    def rated(self, turn: Turn) -> None:
        """To be called after each `Memory.rate`, with what it returned. Raises `StateError` where memory cannot be
        read.
        """
        self._persons.pop(turn.user, None)
        self._unchecked += 1
        self._suspicion = max(self._suspicion + self._cost(turn), 0.0)
        if (self._unchecked >= CHECK or self._suspicion >= HARM) and self._lock.acquire(blocking=False):
            try:
                self._unchecked = 0
                with self._alone() as alone:
                    if alone:
                        self._look()
            finally:
                self._lock.release()

    def _cost(self, turn: Turn) -> float:
        """What the layer has cost in this turn: Brier score against the gate's own."""
        state = self._state
        if not state.layer or turn.at < state.promoted or not (vote := vote_of(turn)):
            return 0.0
        q = state.layer.p_correct(vote.p, vote.features, self._thresholds)
        return (self._trust or {}).get(vote.user, 1.0) * ((q - vote.right) ** 2 - (vote.p - vote.right) ** 2)

    def forget(self, user: str) -> int:
        """Delete a user's turns from memory and what this process derived from them; returns the number of turns.

        Other processes hold votes of the user (numbers, no text) until they are closed or newer ones take their place.
        """
        with self._lock:  # nobody is learning meanwhile
            forgotten = self._memory.forget(user)
            self._known = {key: found for key, found in self._known.items() if key[0] != user}
            for derived in (self._persons, self._evidence, self._trust or {}):
                derived.pop(user, None)
        return forgotten

    def state(self) -> dict[str, Any]:
        """What serves, what is tried and what happened so far, as JSON values."""
        self._refresh()
        return self._state.model_dump(mode="json")

    def _refresh(self) -> None:
        """Take over what another process has saved; set aside what cannot be read."""
        try:
            stat = self._path.stat()
            seen = stat.st_mtime_ns, stat.st_ino
        except OSError:
            seen = 0, 0
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._take(Learned.model_validate_json(self._path.read_bytes()) if seen[1] else Learned())
        except (OSError, ValidationError) as error:
            aside = self._path.with_name(FILE + ".unreadable")
            with suppress(OSError):
                self._path.replace(aside)
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            warnings.warn(
                f"{self._path} cannot be read ({reason}); set aside as {aside.name}, learning anew", stacklevel=2
            )
            self._take(Learned())

    def _take(self, state: Learned) -> None:
        if state.layer != self._state.layer:
            self._suspicion = 0.0
        self._state = state
        self._persons.clear()

    def _save(self, state: Learned) -> None:
        self._take(state)
        try:
            write_json(self._path, state.model_dump(mode="json"))
            stat = self._path.stat()
            self._seen = stat.st_mtime_ns, stat.st_ino
        except OSError as error:
            warnings.warn(
                f"{self._path} cannot be written ({error}); what was learned lasts until the end", stacklevel=2
            )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process is learning here; the lock dies with its process."""
        try:
            lock = sqlite3.connect(self._folder / "learned.lock", timeout=0.0, isolation_level=None)
        except sqlite3.Error as error:
            raise self._unwritable(error) from error
        with closing(lock):
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error:
                yield False
            else:
                yield True

    def _follow(self) -> None:
        """Take in what was rated since the last time, by any process."""
        began = time.time()
        for turn in self._memory.rated(self._followed, REPLAY):
            self._known.pop((turn.user, turn.id), None)
            if vote := vote_of(turn):
                self._known[turn.user, turn.id] = turn.at, vote
        self._followed = began - _OVERLAP
        for key in list(islice(self._known, max(len(self._known) - REPLAY, 0))):
            del self._known[key]

    def _votes(self, since: float, newest: int = REPLAY) -> Votes:
        """The newest votes on answers given since then."""
        return Votes.of([vote for at, vote in self._known.values() if at >= since][-newest:])

    def _serve(self, layer: Layer | None, votes: Votes) -> Doubles:
        return layer.p_all(votes, self._thresholds) if layer else votes.p

    def _look(self) -> None:
        """Withdraw, decide or fit, whichever is due."""
        self._refresh()
        self._follow()
        state = before = self._state
        if self._trust is None and (state.layer or state.canary):
            self._study(self._votes(state.since))
        if state.layer:
            state = self._watched(state, state.layer)
        if state.canary:
            state = self._decided(state, state.canary)
        elif self._memory.ratings(state.fitted) >= EVERY and self._memory.ratings(state.since) >= self._need:
            state = self._fitted(state)
        if state is not before:
            self._save(state)
        if self._neighbours:
            votes = self._votes(0.0)
            found = personal.evidence(votes, state.layer.p_all(votes, ()) if state.layer else votes.p)
            self._evidence = {name: own for name, own in found.items() if name and own.votes >= personal.ENOUGH}

    def _watched(self, state: Learned, layer: Layer) -> Learned:
        """The same, or without the layer if it does harm."""
        votes = self._votes(state.promoted, WATCH)
        q = self._serve(layer, votes)
        harm = worst_stretch(votes, self._weights(votes), votes.p, q)
        if harm >= HARM:
            self._look_at_voters(state, layer)
            harm = worst_stretch(votes, self._weights(votes), votes.p, q)
        if harm < HARM:
            self._suspicion = harm  # what the caps have left of it
            return state
        now = time.time()  # votes of before tell of a world that is gone: they are not replayed
        changes = {"layer": None, "canary": None, "fitted": now, "since": now}
        return state.told("rolled back", changes, harm=harm, votes=len(votes))

    def _decided(self, state: Learned, canary: Layer) -> Learned:
        """The candidate promoted, dropped, or left to go on."""
        fresh = self._votes(state.started)
        votes = fresh.select(np.array([in_canary(row.id) for row in fresh.rows], dtype=bool))
        before, after = self._serve(state.layer, votes), self._serve(canary, votes)

        def open_still() -> bool:
            w = self._weights(votes)
            return bool(w.sum() < ENOUGH) and worst_stretch(votes, w, before, after) < HARM

        if open_still():
            return state
        self._look_at_voters(state, canary)
        if open_still():
            return state
        w = self._weights(votes)
        harm = worst_stretch(votes, w, before, after)
        lifting = replace(canary, certified=True)
        test = state.tests + 1
        if certified(fresh, self._weights(fresh), self._serve(lifting, fresh), self._promises, test):
            canary = lifting
        found = gain(votes, w, before, self._serve(canary, votes))
        figures = {"harm": harm, "certified": canary.certified, **asdict(found)}
        if harm >= HARM or found.gain < GAIN or found.low <= 0.0:
            return state.told("dropped", {"canary": None, "tests": test}, **figures)
        return state.told(
            "promoted", {"layer": canary, "promoted": time.time(), "canary": None, "tests": test}, **figures
        )

    def _fitted(self, state: Learned) -> Learned:
        """A candidate, if the votes suffice."""
        votes = self._votes(state.since)
        counted, now = float(weights(votes, {}).sum()), time.time()
        if counted < self._need:
            return state.model_copy(update={"fitted": now})
        layer = self._study(votes)
        return state.told("canary", {"canary": layer, "started": now, "fitted": now}, votes=counted)

    def _study(self, votes: Votes) -> Layer:
        """Fit a layer, and take over what the votes say of their users."""
        layer, self._trust = learn(votes, HALF_LIFE)
        return layer

    def _look_at_voters(self, state: Learned, layer: Layer) -> None:
        """Know those who began to vote against everybody after the last fit, before anything is decided by votes."""
        votes = self._votes(state.since)
        self._trust = trust(votes, layer.p_all(votes, ()))

    def _weights(self, votes: Votes) -> Doubles:
        return weights(votes, self._trust or {})

    def _offsets(self, user: str) -> Mapping[str, float]:
        """Personal offsets of a user who asked for them; empty for others."""
        if not user:
            return {}
        made, found = self._persons.get(user, (-math.inf, {}))
        if time.monotonic() - made > _READY[1]:
            with suppress(StateError):  # an answer does not fail because a memory cannot be read
                found = self._person(user) if self._memory.personal(user) else {}
            if len(self._persons) >= _READY[0]:
                self._persons.clear()
            self._persons[user] = time.monotonic(), found
        return found

    def _person(self, user: str) -> Mapping[str, float]:
        turns = reversed(self._memory.recent(user, PERSON))
        votes = Votes.of(vote for turn in turns if (vote := vote_of(turn)))
        layer = self._state.layer
        own = personal.evidence(votes, layer.p_all(votes, ()) if layer else votes.p).get(user)
        others = [other for name, other in self._evidence.items() if name != user]
        return personal.offsets(own, others) if own else {}

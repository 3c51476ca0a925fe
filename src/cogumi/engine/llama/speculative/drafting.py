"""Where drafts come from and how many tokens of them pay, for the requests of one lane (SPEC E2, E3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cogumi.core.errors import CogumiError
from cogumi.engine.generation import Generation
from cogumi.engine.llama.speculative.drafter import Draft, Drafter
from cogumi.engine.llama.speculative.latency_model import MOST
from cogumi.engine.llama.speculative.lookup import Lookup
from cogumi.engine.llama.speculative.speculation import Choice, Controller, Tracker, Wish

LOG = logging.getLogger("cogumi")
PLANNING, LONGEST_PAUSE = 0.02, 32
"""Share of the time that may go into finding that nothing should be drafted, and turns between two looks at most."""
LEAST_GAIN = 1.05
"""Speed-up that drafting is given credit for even where it seems to be none, so that it can be tried."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """How an engine drafts. `forced` tokens per round where a request insists; `open_drafter` None: no draft model."""

    controller: Controller
    forced: int
    lookup: bool
    open_drafter: Callable[[], Drafter] | None


@dataclass(slots=True)
class _State:
    """What drafting knows of one generation."""

    job: Generation
    tracker: Tracker
    lookup: Lookup | None
    known: int  # ids that the lookup has seen
    guess: list[int]  # its proposal of this turn


class Speculation:
    """Drafts for the generations of one lane and learns from what became of them.

    A draft model whose context fails is given up with a warning; the requests go on without it.
    """

    def __init__(self, drafting: Drafting) -> None:
        self._drafting, self._controller = drafting, drafting.controller
        self._drafter: Drafter | None = None
        self._has_model = drafting.open_drafter is not None
        self._states: dict[int, _State] = {}
        self._pause = 0

    def propose(self, writing: Mapping[int, Generation], outputs: int, slots: int) -> dict[int, Draft]:
        """Drafts for those of the generations (by sequence) that should have one in this turn.

        One pass of the base returns the logits of `outputs` tokens, for up to `slots` who write. Where steps are so
        short that planning them would be felt, a plan without drafts stands for a few turns.
        """
        forced = any(job.request.speculate for job in writing.values())
        if not forced and (self._pause or not any(map(_may_choose, writing.values()))):
            self._pause = max(self._pause - 1, 0)
            return {}
        began = time.perf_counter()
        most = {s: outputs // (slots if _seeded(job) else len(writing)) - 1 for s, job in writing.items()}
        drafts = self._drafts(writing, most)
        if not drafts:
            allowed = PLANNING * self._controller.costs.seconds(len(writing))
            self._pause = min(int((time.perf_counter() - began) / allowed), LONGEST_PAUSE)
        return drafts

    def _drafts(self, writing: Mapping[int, Generation], most: Mapping[int, int]) -> dict[int, Draft]:
        wishes = {sequence: self._wish(sequence, job) for sequence, job in writing.items()}
        choices = dict(zip(wishes, self._controller.plan(list(wishes.values())), strict=True))
        drafts: dict[int, Draft] = {}
        model: dict[int, tuple[Generation, int]] = {}
        for sequence, job in writing.items():
            choice = self._forced(sequence) if job.request.speculate else choices[sequence]
            k = min(choice.k, _room(job), most[sequence])
            if k <= 0 or choice.source is None:
                continue
            if choice.source == "model":
                model[sequence] = (job, k)
            else:
                drafts[sequence] = Draft("ngram", self._states[sequence].guess[:k])
        for sequence, draft in self._ask(model).items():
            room = min(_room(writing[sequence]), most[sequence])  # a bridge may say in more tokens what was drafted
            drafts[sequence] = Draft("model", draft.tokens[:room], draft.drawn_from)
        return drafts

    def learn(self, sequence: int, draft: Draft | None, tokens: list[int]) -> None:
        """What the base made of a turn: `tokens` were settled; of a draft, all but the last of them."""
        state = self._states.get(sequence)
        if state is None:
            return
        if draft:
            self._controller.learn(state.tracker, draft.source, len(draft.tokens), len(tokens) - 1)
        if state.guess and (draft is None or draft.source != "ngram"):
            self._controller.learn(state.tracker, "ngram", 1, int(state.guess[0] == tokens[0]))
        state.guess = []

    def observe(self, tokens: int, seconds: float) -> None:
        """What one pass of the base over so many tokens took."""
        self._controller.observe(tokens, seconds)

    def close(self) -> None:
        """Free the draft's cache."""
        if self._drafter:
            self._drafter.close()
            self._drafter = None

    def _wish(self, sequence: int, job: Generation) -> Wish:
        state = self._states.get(sequence)
        if state is None or state.job is not job:
            lookup = Lookup([]) if self._drafting.lookup and job.request.speculate is not False else None
            state = self._states[sequence] = _State(job, self._controller.tracker(), lookup, 0, [])
        most = min(MOST, _room(job))
        if state.lookup:
            for token in job.ids[state.known :]:
                state.lookup.append(token)
            state.known = len(job.ids)
            state.guess = state.lookup.propose(most)
        if not _may_choose(job):
            return Wish(state.tracker, {})  # it only takes its place in the batch
        from_model = most if self._has_model and self._worth_reading(sequence, job) else 0
        return Wish(state.tracker, {"ngram": len(state.guess), "model": from_model})

    def _worth_reading(self, sequence: int, job: Generation) -> bool:
        """Whether what the draft would have to read first has been paid for, had it drafted from the beginning.

        Nobody knows how long an answer gets; one that has gone on for a while is likely to go on.
        """
        unread = self._drafter.backlog(sequence, job) if self._drafter else len(job.ids)
        costs, saved = self._controller.costs, 1 - 1 / max(self._controller.speedup(), LEAST_GAIN)
        return unread <= MOST or unread * costs.reading <= saved * job.written * costs.step

    def _forced(self, sequence: int) -> Choice:
        if self._has_model:
            return Choice("model", self._drafting.forced)
        return Choice("ngram", min(self._drafting.forced, len(self._states[sequence].guess)))

    def _ask(self, wanted: Mapping[int, tuple[Generation, int]]) -> dict[int, Draft]:
        if not wanted or not self._has_model or self._drafting.open_drafter is None:
            return {}
        try:
            if self._drafter is None:
                self._drafter = self._drafting.open_drafter()
            drafts = self._drafter.propose(wanted)
        except CogumiError as error:
            LOG.warning("the draft model failed (%s); answers go on without it", error)
            self._has_model = False
            self.close()
            return {}
        for requests, seconds in self._drafter.steps:
            self._controller.observe_draft(requests, seconds)
        return drafts


def _room(job: Generation) -> int:
    """Tokens that may be drafted; the first of an answer never is, because it could be only where its whole prompt is
    cached, and that is not to change what a seed gives.
    """
    return job.remaining - 1 if job.written else 0


def _seeded(job: Generation) -> bool:
    """Whether it was promised the same text again, so that what is drafted may not depend on the moment: it decides
    which random numbers are spent on what.
    """
    return job.generator is not None and job.request.seed is not None


def _may_choose(job: Generation) -> bool:
    """Whether the controller may decide."""
    return job.request.speculate is None and not _seeded(job)

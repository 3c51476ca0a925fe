"""Where drafts come from and how many tokens of them pay, for the requests of one lane (SPEC E2, E3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cogumi.errors import CogumiError
from cogumi.runtime.drafter import Draft, Drafter
from cogumi.runtime.generation import Generation
from cogumi.runtime.lookup import Lookup
from cogumi.runtime.pace import MOST
from cogumi.runtime.speculate import Choice, Controller, Tracker, Wish

LOG = logging.getLogger("cogumi")


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
    guess: list[int]  # the lookup's proposal of this turn


class Speculation:
    """Drafts for the generations of one lane and learns from what became of them.

    A draft model whose context fails is given up with a warning; the requests go on without it.
    """

    def __init__(self, drafting: Drafting) -> None:
        self._drafting, self._controller = drafting, drafting.controller
        self._drafter: Drafter | None = None
        self._has_model = drafting.open_drafter is not None
        self._states: dict[int, _State] = {}

    def propose(self, writing: Mapping[int, Generation], outputs: int) -> dict[int, Draft]:
        """Drafts for those of the generations (by sequence) that should have one in this turn.

        One pass of the base returns the logits of `outputs` tokens.
        """
        most = outputs // len(writing) - 1
        wishes = {sequence: self._wish(sequence, job) for sequence, job in writing.items()}
        choices = dict(zip(wishes, self._controller.plan(list(wishes.values())), strict=True))
        drafts: dict[int, Draft] = {}
        model: dict[int, tuple[Generation, int]] = {}
        for sequence, job in writing.items():
            choice = self._forced(sequence) if job.request.speculate else choices[sequence]
            k = min(choice.k, job.remaining - 1, most)
            if k <= 0 or choice.source is None:
                continue
            if choice.source == "model":
                model[sequence] = (job, k)
            else:
                drafts[sequence] = Draft("ngram", self._states[sequence].guess[:k])
        for sequence, draft in self._ask(model).items():
            room = min(writing[sequence].remaining - 1, most)  # a bridge may say in more tokens what was drafted in k
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
        if state.lookup:
            for token in tokens:
                state.lookup.append(token)

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
            looks = self._drafting.lookup and job.request.speculate is not False
            lookup = Lookup(job.ids) if looks else None
            state = self._states[sequence] = _State(job, self._controller.tracker(), lookup, [])
        most = min(MOST, job.remaining - 1)
        state.guess = state.lookup.propose(most) if state.lookup else []
        if job.request.speculate is not None or (job.generator and job.request.seed is not None):
            # Nothing to choose: it only takes its place in the batch. A seed promises the same text again, and how
            # many tokens pay at the moment would decide which random numbers are spent on what.
            return Wish(state.tracker, {})
        from_model = most if self._has_model and self._worth_reading(sequence, job) else 0
        return Wish(state.tracker, {"ngram": len(state.guess), "model": from_model})

    def _worth_reading(self, sequence: int, job: Generation) -> bool:
        """Whether the draft may still pay, considering what it would have to read first.

        It reads many tokens in a pass and so at a fraction of the cost of drafting as many.
        """
        unread = self._drafter.backlog(sequence, job) if self._drafter else len(job.ids)
        costs = self._controller.costs
        return unread * costs.draft / MOST <= job.remaining * costs.step

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
        for seconds in self._drafter.steps:
            self._controller.observe(0, seconds)
        return drafts

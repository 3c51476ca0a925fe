"""Speculative drafting for the requests of one adapter context: source and length of drafts (SPEC E2, E3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cogumi.core.errors import CogumiError
from cogumi.engine.generation import Generation
from cogumi.engine.llama.speculative.drafter import Draft, Drafter
from cogumi.engine.llama.speculative.latency_model import MAX_DRAFT
from cogumi.engine.llama.speculative.lookup import Lookup
from cogumi.engine.llama.speculative.speculation import Choice, Controller, DraftOptions, Tracker

LOG = logging.getLogger("cogumi")
MAX_PLANNING, MAX_PAUSE = 0.02, 32
"""Maximum share of time for planning without drafting as a result, and maximum number of steps between two plans."""
MIN_SPEEDUP = 1.05
"""Speed-up assumed at least, so that drafting is tried even if its estimate is lower."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """Drafting settings of an engine. `forced`: tokens per round if a request forces it; `open_drafter` None: no draft
    model.
    """

    controller: Controller
    forced: int
    lookup: bool
    open_drafter: Callable[[], Drafter] | None


@dataclass(slots=True)
class _State:
    """Drafting state of one generation."""

    job: Generation
    tracker: Tracker
    lookup: Lookup | None
    known: int  # number of ids added to the lookup
    guess: list[int]  # the lookup's proposal of this step


class Speculator:
    """Drafts for the generations of one adapter context and tracks acceptance.

    If the context of the draft model fails, a warning is logged and requests continue without it.
    """

    def __init__(self, drafting: Drafting) -> None:
        self._drafting, self._controller = drafting, drafting.controller
        self._drafter: Drafter | None = None
        self._has_model = drafting.open_drafter is not None
        self._states: dict[int, _State] = {}
        self._pause = 0

    def propose(self, decoding: Mapping[int, Generation], outputs: int, slots: int) -> dict[int, Draft]:
        """Drafts for those generations (by sequence) for which drafting pays in this step.

        One pass of the base returns the logits of `outputs` tokens, for up to `slots` generations. If steps are so
        short that planning takes a noticeable share of them, a plan without drafts is reused for a few steps.
        """
        forced = any(job.request.speculate for job in decoding.values())
        if not forced and (self._pause or not any(map(_is_automatic, decoding.values()))):
            self._pause = max(self._pause - 1, 0)
            return {}
        began = time.perf_counter()
        most = {s: outputs // (slots if _is_seeded(job) else len(decoding)) - 1 for s, job in decoding.items()}
        drafts = self._drafts(decoding, most)
        if not drafts:
            allowed = MAX_PLANNING * self._controller.latency.seconds(len(decoding))
            self._pause = min(int((time.perf_counter() - began) / allowed), MAX_PAUSE)
        return drafts

    def _drafts(self, decoding: Mapping[int, Generation], most: Mapping[int, int]) -> dict[int, Draft]:
        options = {sequence: self._options(sequence, job) for sequence, job in decoding.items()}
        choices = dict(zip(options, self._controller.plan(list(options.values())), strict=True))
        drafts: dict[int, Draft] = {}
        model: dict[int, tuple[Generation, int]] = {}
        for sequence, job in decoding.items():
            choice = self._forced(sequence) if job.request.speculate else choices[sequence]
            k = min(choice.k, _max_draft(job), most[sequence])
            if k <= 0 or choice.source is None:
                continue
            if choice.source == "model":
                model[sequence] = (job, k)
            else:
                drafts[sequence] = Draft("ngram", self._states[sequence].guess[:k])
        for sequence, draft in self._draft_with_model(model).items():
            room = min(_max_draft(decoding[sequence]), most[sequence])  # a bridge may return more tokens than drafted
            drafts[sequence] = Draft("model", draft.tokens[:room], draft.distributions)
        return drafts

    def learn(self, sequence: int, draft: Draft | None, tokens: list[int]) -> None:
        """Record the result of a step: the accepted `tokens`, of which all but the last were drafted."""
        state = self._states.get(sequence)
        if state is None:
            return
        if draft:
            self._controller.learn(state.tracker, draft.source, len(draft.tokens), len(tokens) - 1)
        if state.guess and (draft is None or draft.source != "ngram"):
            self._controller.learn(state.tracker, "ngram", 1, int(state.guess[0] == tokens[0]))
        state.guess = []

    def observe(self, tokens: int, seconds: float) -> None:
        """Record the duration of one pass of the base over `tokens` tokens."""
        self._controller.observe(tokens, seconds)

    def close(self) -> None:
        """Free the draft's KV cache."""
        if self._drafter:
            self._drafter.close()
            self._drafter = None

    def _options(self, sequence: int, job: Generation) -> DraftOptions:
        state = self._states.get(sequence)
        if state is None or state.job is not job:
            lookup = Lookup([]) if self._drafting.lookup and job.request.speculate is not False else None
            state = self._states[sequence] = _State(job, self._controller.tracker(), lookup, 0, [])
        most = min(MAX_DRAFT, _max_draft(job))
        if state.lookup:
            for token in job.ids[state.known :]:
                state.lookup.append(token)
            state.known = len(job.ids)
            state.guess = state.lookup.propose(most)
        if not _is_automatic(job):
            return DraftOptions(state.tracker, {})  # only counts as one row of the batch
        from_model = most if self._has_model and self._worth_prefill(sequence, job) else 0
        return DraftOptions(state.tracker, {"ngram": len(state.guess), "model": from_model})

    def _worth_prefill(self, sequence: int, job: Generation) -> bool:
        """Whether the draft's prefill costs at most the time that drafting would have saved on this answer so far.

        The remaining length of an answer is unknown; an answer that is already long is likely to continue.
        """
        unread = self._drafter.backlog(sequence, job) if self._drafter else len(job.ids)
        latency, saved = self._controller.latency, 1 - 1 / max(self._controller.speedup(), MIN_SPEEDUP)
        return unread <= MAX_DRAFT or unread * latency.reading <= saved * job.generated * latency.step

    def _forced(self, sequence: int) -> Choice:
        if self._has_model:
            return Choice("model", self._drafting.forced)
        return Choice("ngram", min(self._drafting.forced, len(self._states[sequence].guess)))

    def _draft_with_model(self, wanted: Mapping[int, tuple[Generation, int]]) -> dict[int, Draft]:
        if not wanted or not self._has_model or self._drafting.open_drafter is None:
            return {}
        try:
            if self._drafter is None:
                self._drafter = self._drafting.open_drafter()
            drafts = self._drafter.propose(wanted)
        except CogumiError as error:
            LOG.warning("the draft model failed (%s); continuing without it", error)
            self._has_model = False
            self.close()
            return {}
        for requests, seconds in self._drafter.steps:
            self._controller.observe_draft(requests, seconds)
        return drafts


def _max_draft(job: Generation) -> int:
    """Maximum number of drafted tokens. The first token of an answer is never drafted: that would only be possible with
    a cached prompt, and a seeded result must not depend on the cache.
    """
    return job.remaining - 1 if job.generated else 0


def _is_seeded(job: Generation) -> bool:
    """Whether the answer must be reproducible. Its drafts then must not depend on timing, because they determine how
    random numbers are used.
    """
    return job.generator is not None and job.request.seed is not None


def _is_automatic(job: Generation) -> bool:
    """Whether the controller decides about drafting."""
    return job.request.speculate is None and not _is_seeded(job)

"""The cascade: an engine that asks cheap tiers first and says how sure it is (SPEC F1, F2, F4, F9, F11).

One request: the draft reads the question (easy: the base may speculate) -> the base answers -> the answer
gate; not accepted and the mode allows it: the modifier of the question's domain answers -> its gate ->
whichever `route.gate.settle` picks. Every step leaves a `Decision`; the last one says whether the reply's
text is a confident answer.

`Reply.route` is the path taken:
- `base`, `base+draft` (tokens were drafted), `modifier`: accepted, so the guarantee covers it;
- `low_confidence`: not accepted; the likelier answer with a note behind it;
- `abstained`: the abstention sentence: a tier said so, or the request wants no unsure answer (`p_correct`
  is then that of the answer withheld).

Tokens stream as they come where no other tier can follow and nothing may be withheld; else once an answer
is chosen. The reply's text is always the streamed text, or that of the last `Revision`. Requests for one
adapter, and raw prompts, are answered by that tier directly: they are not questions the gates were fitted
on. The guarantee was measured on greedy answers; sampled ones (temperature > 0) take the same path without
it. `usage` sums what base and modifiers spent; the draft's reading of the question is not in it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cogumi.bundle import open_bundle
from cogumi.cascade.channel import Events, Flow
from cogumi.cascade.modes import MODES, Mode, mode_of
from cogumi.cascade.tiers import Question, Tiers
from cogumi.errors import BundleError, BusyError, RequestError
from cogumi.route.domains import route
from cogumi.route.gate import KINDS, Calibration, Check, check, settle
from cogumi.route.nets import load_head, load_net
from cogumi.route.signals import abstains, answer_signals, modifier_signals, same_text
from cogumi.runtime.engine import Engine, Event, Tokenizer
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.types import ABSTENTION, Decision, Reading, Reply, Request, Revision, Score, Usage

LOW_CONFIDENCE = "\n\n(Low confidence: this answer may be wrong.)"
NAME = "cogumi"


def without_note(text: str) -> str:
    """A reply's text as the tier gave it, for grading and for follow-ups."""
    return text.removesuffix(LOW_CONFIDENCE)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One tier's answer and how its gate judged it."""

    tier: str
    reply: Reply
    signals: dict[str, float]
    check: Check

    def decision(self) -> Decision:
        """The gate's judgement in words."""
        seen = self.check
        if math.isinf(seen.threshold):
            reason = "no threshold kept the promised error rate at calibration, so no answer counts as sure"
        else:
            relation = "meets" if seen.accepted else "misses"
            reason = f"{seen.signal} {seen.value:.2f} {relation} the threshold {seen.threshold:.2f}"
        threshold = min(seen.threshold, 1.0) if seen.signal == "p_correct" else seen.threshold
        return Decision(self.tier, seen.signal, seen.value, threshold, seen.accepted, reason)


class Cascade:
    """Tiers, calibration and a pool of `workers` threads, one per request in flight; implements `Engine`.

    `queue` more requests may wait; `gate` is one of `route.gate.KINDS` (raises `RequestError` for another).
    """

    def __init__(
        self,
        tiers: Tiers,
        calibration: Calibration,
        *,
        gate: str = KINDS[0],
        workers: int = 8,
        queue: int = 1000,
    ) -> None:
        if gate not in KINDS:
            raise RequestError(f"unknown gate '{gate}': choose one of {', '.join(KINDS)}")
        self.tiers, self.calibration, self._gate = tiers, calibration, gate
        self._closed = threading.Event()
        self._room = threading.BoundedSemaphore(workers + queue)
        self._door = threading.Lock()  # nobody comes in while the cascade closes
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cascade")

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        return self.tiers.base.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """The modifiers."""
        return self.tiers.base.adapters

    @property
    def models(self) -> tuple[str, ...]:
        """The names under which the cascade, its modes and its tiers can be asked; see `resolve`."""
        tails = [*MODES, "base", "draft", *(f"base+{name}" for name in self.adapters)]
        return (NAME, *(f"{NAME}:{tail}" for tail in tails))

    def resolve(self, model: str, request: Request) -> tuple[Engine, Request]:
        """The engine behind one of `models`, and the request as that engine takes it. Raises `RequestError`."""
        if model not in self.models:
            raise RequestError(f"unknown model '{model}': choose one of {', '.join(self.models)}")
        tail = model.removeprefix(NAME).removeprefix(":")
        if tail in MODES:
            return self, replace(request, mode=tail)
        if tail == "draft":
            return self.tiers.draft, request
        if tail.startswith("base"):
            return self.tiers.base, replace(request, adapter=tail.partition("+")[2] or request.adapter)
        return self, request

    def score(self, request: Request, answer: str) -> Score:
        """The base's (or the asked adapter's) score of an answer."""
        return self.tiers.base.score(request, answer)

    def read(self, request: Request) -> Reading:
        """The base's reading of a prompt."""
        return self.tiers.base.read(request)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The base's embeddings."""
        return self.tiers.base.embed(texts)

    def generate(self, request: Request) -> Iterator[Event]:
        """Submit a request; iterate to collect. See the module's text for what is streamed when."""
        mode = mode_of(request.mode)
        direct = request.adapter is not None or request.prompt is not None
        flow = self._direct(request) if direct else self._cascade(request, mode)
        with self._door:
            self.check(request)
            if not self._room.acquire(blocking=False):
                raise BusyError("too many requests are waiting already; try again in a moment")
            return Events(flow, self._pool, self._closed.is_set, self._room.release)

    def check(self, request: Request) -> None:
        """Raise what the base would only say once a worker has come to the request."""
        if self._closed.is_set():
            raise RequestError("this cascade is closed: open it again")
        self.tiers.base.check(request)

    def close(self) -> None:
        """Cancel what runs or waits, then free the models."""
        with self._door:
            self._closed.set()
        self._pool.shutdown(wait=True)
        self.tiers.close()

    def _direct(self, request: Request) -> Flow:
        tier = f"modifier:{request.adapter}" if request.adapter else "base"
        reply = yield from self._ask(request, request.adapter, live=True)
        return replace(reply, tier=tier, route=tier.partition(":")[0])

    def _ask(self, request: Request, adapter: str | None, *, live: bool) -> Flow:
        """One tier's answer; its tokens pass on only if `live`."""
        events = self.tiers.answer(request, adapter)
        with closing(cast(Generator[Event, None, None], events)):
            for event in events:
                if isinstance(event, Reply):
                    return event
                yield event if live else None
        raise RuntimeError("an engine ended a generation without a Reply: a defect in that engine")

    def _cascade(self, request: Request, mode: Mode) -> Flow:
        question = self.tiers.read_question(request)
        gate = self.calibration.question
        novel = gate.novel(question.perplexity)
        may_follow = self.adapters if mode.modifier and self.calibration.modifier and not novel else ()
        domain = route(question.domains, may_follow)
        threshold = self.calibration.guarantee(mode.modifier).threshold
        decisions = [self._speculation(request, question)]
        yield decisions[0]
        if novel:
            reason = "the question is unlike those it was calibrated on, so no answer counts as sure"
            decisions.append(Decision("draft", "novelty", question.perplexity, gate.novelty or 0.0, False, reason))
            yield decisions[-1]
        request = replace(request, speculate=_speculate(request, decisions[0]))
        live = domain is None and not request.abstain

        reply = yield from self._ask(request, None, live=live)
        if reply.finish_reason == "cancelled":
            return reply
        base = self._judge_base(reply, question, threshold)
        decisions.append(base.decision())
        yield decisions[-1]
        modifier = None
        if domain and not base.check.accepted:
            reply = yield from self._ask(request, domain, live=False)
            if reply.finish_reason == "cancelled":
                return reply
            modifier = self._judge_modifier(reply, domain, question, base, threshold)
            decisions.append(modifier.decision())
            yield decisions[-1]

        tier, accepted = settle(base.check, modifier.check if modifier else None)
        chosen = modifier if modifier and tier == "modifier" else base
        ending = ending_of(chosen, accepted and not novel, request.abstain)
        if ending.decision:
            decisions.append(ending.decision)
            yield decisions[-1]
        if not live and not ending.withheld:
            yield from chosen.reply.tokens
        if ending.withheld or ending.text != chosen.reply.text:
            yield Revision(ending.text)
        return Reply(
            text=ending.text,
            tokens=() if ending.withheld else chosen.reply.tokens,
            finish_reason=chosen.reply.finish_reason,
            usage=base.reply.usage + (modifier.reply.usage if modifier else Usage()),
            signals=chosen.signals,
            decisions=tuple(decisions),
            tier=chosen.tier,
            route=ending.route,
            p_correct=None if novel else chosen.check.p,
        )

    def _speculation(self, request: Request, question: Question) -> Decision:
        """The question gate: whether the draft may propose tokens for the base."""
        if request.speculate is not None:
            wish = float(request.speculate)
            return Decision("draft", "requested", wish, 1.0, request.speculate, "the request says so")
        gate = self.calibration.question
        if question.perplexity > gate.perplexity:
            reason = "hard question: the draft is surprised by it; the base answers alone"
            return Decision("draft", "perplexity", question.perplexity, gate.perplexity, False, reason)
        if question.p_easy < gate.p_easy:
            reason = "hard question: the base answers alone"
            return Decision("draft", "p_easy", question.p_easy, gate.p_easy, False, reason)
        speedup = self.tiers.drafting_speedup()
        if speedup <= 1.0:
            reason = "easy question, but drafting does not pay on this machine: the base answers alone"
            return Decision("draft", "speedup", speedup, 1.0, False, reason)
        reason = "easy question: the draft proposes tokens, the base verifies them"
        return Decision("draft", "p_easy", question.p_easy, gate.p_easy, True, reason)

    def _judge_base(self, reply: Reply, question: Question, threshold: float) -> Attempt:
        signals = {**answer_signals(reply), **question.signals}
        p = self.calibration.base.p_correct(signals)
        return Attempt("base", reply, signals, check(self._gate, p, signals, threshold))

    def _judge_modifier(
        self, reply: Reply, domain: str, question: Question, base: Attempt, threshold: float
    ) -> Attempt:
        agree = same_text(reply.text, base.reply.text)
        own = {**answer_signals(reply), **question.signals}
        signals = modifier_signals(own, base.signals, base.check.p, agree)
        assert self.calibration.modifier is not None  # no modifier is asked without its gate
        p = self.calibration.modifier.p_correct(signals)
        return Attempt(f"modifier:{domain}", reply, signals, check(self._gate, p, signals, threshold))


def _speculate(request: Request, decision: Decision) -> bool | None:
    """What to tell the engine: a request's wish as it is; else its own measured choice for easy questions
    only.
    """
    if request.speculate is not None:
        return request.speculate
    return None if decision.accepted else False


@dataclass(frozen=True, slots=True)
class Ending:
    """What becomes of the chosen answer."""

    text: str
    route: str
    decision: Decision | None = None
    withheld: bool = False


def ending_of(chosen: Attempt, accepted: bool, withhold: bool) -> Ending:
    """What to say and by which route; `withhold` if the request wants no answer that was not `accepted`."""
    text, p, threshold = chosen.reply.text, chosen.check.p, chosen.decision().threshold

    def last(signal: str, reason: str) -> Decision:
        return Decision(chosen.tier, signal, p, threshold, False, reason)

    if abstains(text):
        return Ending(text, "abstained", last("abstains", f"{chosen.tier} says that it does not know"))
    if accepted:
        drafted = "+draft" if chosen.reply.usage.drafted else ""
        return Ending(text, "base" + drafted if chosen.tier == "base" else "modifier")
    if withhold:
        reason = "no answer reached the threshold, and the request wants no unsure one"
        return Ending(ABSTENTION, "abstained", last("p_correct", reason), withheld=True)
    reason = f"the likeliest answer is that of {chosen.tier}, and it is not sure enough"
    return Ending(text + LOW_CONFIDENCE, "low_confidence", last("p_correct", reason))


def open_cascade(
    folder: Path,
    *,
    slots: int = 8,
    context: int = 512,
    threads: int | None = None,
    cache: str | None = None,
    gate: str = KINDS[0],
) -> Cascade:
    """Open and verify a bundle as a cascade of `slots` requests at a time, `context` tokens each.

    `threads` per model and the type of their key-value `cache` (None: the engine's choice). Raises `BundleError`
    for a bundle that must not be opened.
    """
    bundle = open_bundle(folder)
    calibration = Calibration.from_json(bundle.calibration)
    difficulty, router = load_head(bundle.difficulty), load_net(bundle.router)
    if len(router.mean) != 2 * len(difficulty.mean):
        raise BundleError(f"{folder}: router and difficulty head read different drafts; build it again")
    if {f"domain_{name}" for name in router.classes} - set(calibration.base.names):
        raise BundleError(f"{folder}: the gates were calibrated with another router; build it again")
    with ExitStack() as opened:
        base = LlamaEngine(
            bundle.base,
            slots=slots,
            context=context,
            threads=threads,
            cache=cache,
            draft=bundle.draft,
            adapters=bundle.modifiers,
        )
        opened.callback(base.close)
        draft = LlamaEngine(bundle.draft, slots=slots, context=context, threads=threads, cache=cache, lookup=False)
        opened.callback(draft.close)
        cascade = Cascade(Tiers(base, draft, difficulty, router), calibration, gate=gate, workers=slots)
        opened.pop_all()
    return cascade

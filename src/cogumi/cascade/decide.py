"""What becomes of a request, decided before anything is generated (SPEC F1, F2, F4, F6, F7, F9, F19).

`decide` is pure: records in, a `Plan` out. `execute` carries the plan out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cogumi.cascade.disclaimers import AGAIN, LOW_CONFIDENCE
from cogumi.cascade.modes import AUTO, Mode, Settings
from cogumi.cascade.tiers import Question
from cogumi.confidence.domain_router import preload, with_history
from cogumi.confidence.gate import KINDS, Calibration
from cogumi.core.types import Decision, Request

DISSATISFIED = "the answer before did not satisfy: it is answered again, and nothing counts as sure"
OWN_EXAMPLES = "nothing was calibrated for a request's own examples, so no answer counts as sure"
NOVEL = "the question is unlike those it was calibrated on, so no answer counts as sure"


@dataclass(frozen=True, slots=True)
class Situation:
    """What `decide` knows besides the request, the settings and the calibration.

    `question`: the reader's view of the question; None if the gates do not apply to these engines, for the reason
    `gap`. `routed`: the modifier that the router chooses. `modifiers`: those that may be chosen. `speedup`: how much
    faster drafting makes the base, 0 if it cannot draft. Of the user: `dissatisfied` with the answer before, domains in
    which an answer `failed`, and the `habit` (domain -> questions asked).
    """

    question: Question | None
    gap: str = ""
    routed: str | None = None
    modifiers: tuple[str, ...] = ()
    has_draft: bool = False
    speedup: float = 0.0
    dissatisfied: bool = False
    failed: frozenset[str] = frozenset()
    habit: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is answered.

    `order`: the tiers of the policy, asked in turn until one is sure (see `Policy.order`); `surprised` is the order if
    the prompt surprises the base, None where that makes no difference. A tier is sure from `threshold` on.
    `domain`: the modifier's name. `streamed`: the tiers whose tokens are passed on as they come. With `preview` the
    draft's answer is shown first, whoever answers afterwards. With `preload` the modifier reads the prompt while the
    base answers. `deliberation`: what may be tried if no tier was sure, None for nothing. `doubt`: why no answer
    counts as sure whatever the gates say, else empty. `calibrated`: whether P(correct) means anything here. `note`
    goes behind an answer that is not sure. `decisions`: what the user is told of all this.
    """

    mode: str
    domain: str | None
    order: tuple[str, ...]
    surprised: tuple[str, ...] | None
    threshold: float
    streamed: tuple[str, ...]
    preview: bool
    speculate: bool | None
    preload: bool
    deliberation: Mode | None
    doubt: str
    calibrated: bool
    note: str
    decisions: tuple[Decision, ...]


def decide(
    request: Request, situation: Situation, settings: Settings, calibration: Calibration, gate: str = KINDS[0]
) -> Plan:
    """Plan the answer to a request; `gate` is one of `confidence.gate.KINDS`. Raises `RequestError` for an unknown
    mode.
    """
    question = situation.question
    domain = settings.file_domain(request.files, situation.modifiers) or situation.routed
    choice = settings.choose(request.mode, domain, situation.failed)
    automatic = request.mode in (None, AUTO)
    mode = choice.mode
    if automatic and situation.dissatisfied:
        mode = mode.model_copy(update={"modifier": True})
    ungated = question is None or bool(request.examples)
    mode = Mode() if ungated else usable(mode, situation.has_draft, calibration)
    novel = question is not None and calibration.question.novel(question.perplexity)
    hard = question is None or not calibration.question.easy(question.perplexity, question.p_easy)

    has_modifier = domain in situation.modifiers and not novel
    order, surprised = (mode.policy.order(has_modifier, surprising) for surprising in (False, True))
    tried = mode.model_copy(update={"votes": 0, "critique": 0}) if novel else mode  # never tested on such questions
    deliberates = hard and tried.deliberates
    progressive = request.progressive and situation.has_draft and not (request.abstain or request.examples)
    live = order == ("base",) and not (request.abstain or deliberates or progressive)

    decisions: list[Decision] = []
    if automatic and choice.name != settings.default:
        decisions.append(Decision("cascade", "mode", 1.0, 1.0, True, f"mode {choice.name}: {choice.reason}"))
    speculate = request.speculate
    if question is not None and not request.examples:
        speculation = _speculation(request, question, situation, calibration)
        decisions.append(speculation)
        if speculate is None and not speculation.accepted:
            speculate = False
    doubts = _doubts(request, situation, calibration, novel)
    decisions += doubts
    doubt = DISSATISFIED if situation.dissatisfied else next((found.reason for found in doubts), "")
    return Plan(
        mode=choice.name,
        domain=domain,
        order=order,
        surprised=surprised if surprised != order else None,
        threshold=calibration.threshold(gate, mode.policy),
        streamed=("base",) if live else ("draft",) if progressive and order[0] == "draft" else (),
        preview=progressive and order[0] != "draft",
        speculate=speculate,
        preload=hard and "modifier" in order and _foreseen(domain, situation),
        deliberation=tried if deliberates else None,
        doubt=doubt,
        calibrated=not doubts,
        note=AGAIN if situation.dissatisfied and not doubts else LOW_CONFIDENCE,
        decisions=tuple(decisions),
    )


def usable(mode: Mode, has_draft: bool, calibration: Calibration) -> Mode:
    """What is left of a mode where there is no draft, or where no modifier was calibrated.

    So its policy is one that the calibration has a promise for.
    """
    absent = {"draft": not has_draft, "modifier": not calibration.has_modifiers}
    return mode.model_copy(update={name: False for name, gone in absent.items() if gone})


def _doubts(request: Request, situation: Situation, calibration: Calibration, novel: bool) -> list[Decision]:
    """Why P(correct) means nothing for this request, the weightiest first; empty where the calibration applies."""
    found: list[Decision] = []
    if situation.question is None:
        found.append(Decision("cascade", "calibrated", 0.0, 1.0, False, situation.gap))
    if request.examples:
        found.append(Decision("cascade", "examples", len(request.examples), 0.0, False, OWN_EXAMPLES))
    if novel and situation.question is not None:
        most = calibration.question.novelty or 0.0
        found.append(Decision(_reader(situation), "novelty", situation.question.perplexity, most, False, NOVEL))
    return found


def _foreseen(domain: str | None, situation: Situation) -> bool:
    """Whether the domain's modifier will likely be asked: it was needed before, or question and habit say so."""
    if situation.question is None or domain is None:
        return False
    expected = with_history(situation.question.domains, situation.habit)
    return domain in situation.failed or preload(expected, situation.modifiers) == domain


def _reader(situation: Situation) -> str:
    """The tier that read the question."""
    return "draft" if situation.has_draft else "base"


def _speculation(request: Request, question: Question, situation: Situation, calibration: Calibration) -> Decision:
    """The question gate: whether the draft may propose tokens for the base."""
    gate, reader = calibration.question, _reader(situation)
    if request.speculate is not None:
        wish = float(request.speculate)
        return Decision(reader, "requested", wish, 1.0, request.speculate, "the request says so")
    accepted, signal, value, threshold = False, "p_easy", question.p_easy, gate.p_easy
    if question.perplexity > gate.perplexity:
        signal, value, threshold = "perplexity", question.perplexity, gate.perplexity
        reason = f"hard question: the {reader} is surprised by it"
    elif question.p_easy < gate.p_easy:
        reason = "hard question"
    elif situation.speedup <= 1.0:
        signal, value, threshold = "speedup", situation.speedup, 1.0
        reason = "easy question, but drafting does not pay on this machine"
    else:
        accepted, reason = True, "easy question"
    if situation.has_draft:
        reason += "; the draft proposes tokens, the base verifies them" if accepted else "; the base answers alone"
    return Decision(reader, signal, value, threshold, accepted, reason)

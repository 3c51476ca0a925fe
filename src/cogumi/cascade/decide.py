"""Plans the answer to a request before any generation (SPEC F1, F2, F4, F6, F7, F9, F19, M7).

`decide` is a pure function from records to a `Plan`; `execute` runs the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cogumi.cascade.disclaimers import LOW_CONFIDENCE, SECOND_ATTEMPT
from cogumi.cascade.modes import AUTO, Mode, Settings
from cogumi.cascade.tiers import Question
from cogumi.confidence.domain_router import preload, with_history
from cogumi.confidence.gate import KINDS, TIERS, Calibration
from cogumi.core.types import Decision, Request

DISSATISFIED = "the user was not satisfied with the previous answer: answered again, and no answer is accepted"
OWN_EXAMPLES = "not calibrated for requests with their own examples, so no answer is accepted"
NOVEL = "the question is unlike the calibration data, so no answer is accepted"
OTHER_SYSTEM = "another system prompt than in calibration, so no answer is accepted"


@dataclass(frozen=True, slots=True)
class Situation:
    """Input of `decide` besides the request, the settings and the calibration.

    `question`: signals of the question; None if the gates do not apply to these engines, for the reason `gap`.
    `routed`: the modifier that the router chose. `modifiers`: the modifiers that may be chosen. `speedup`: expected
    speed-up of the base by drafting, 0 if it cannot draft. `other_system`: the request's system prompt is none of those
    in calibration. About the user: `dissatisfied` with the previous answer, `failed` (domains with a wrong answer) and
    `habit` (domain -> number of questions).
    """

    question: Question | None
    gap: str = ""
    routed: str | None = None
    modifiers: tuple[str, ...] = ()
    has_draft: bool = False
    speedup: float = 0.0
    other_system: bool = False
    dissatisfied: bool = False
    failed: frozenset[str] = frozenset()
    habit: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is answered.

    `order`: tiers of the policy, asked in turn until an answer is accepted (see `Policy.order`); `surprising_order`:
    the order if the prompt has a high perplexity for the base, None if it is the same. `thresholds`: least score of an
    accepted answer of each tier. `domain`: the modifier's name. `streamed`: tiers whose tokens are streamed as
    generated. `preview`: the draft's answer is shown first. `preload`: the modifier reads the prompt while the base
    answers. `deliberation`: methods to try if no answer was accepted, or None. `doubt`: the reason why no answer can be
    accepted whatever the gates' result, else empty. `calibrated`: whether P(correct) is valid for this request.
    `disclaimer`: appended to an answer that is not accepted, if the request wants a note. `decisions`: the decisions
    made so far, for the reply.
    """

    mode: str
    domain: str | None
    order: tuple[str, ...]
    surprising_order: tuple[str, ...] | None
    thresholds: Mapping[str, float]
    streamed: tuple[str, ...]
    preview: bool
    speculate: bool | None
    preload: bool
    deliberation: Mode | None
    doubt: str
    calibrated: bool
    disclaimer: str
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
    mode = Mode() if ungated else usable(mode, situation.has_draft, bool(situation.modifiers), calibration)
    novel = question is not None and calibration.question.novel(question.perplexity)
    hard = question is None or not calibration.question.easy(question.perplexity, question.p_easy)

    has_modifier = domain in situation.modifiers and not novel
    order, surprising_order = (mode.policy.order(has_modifier, surprising) for surprising in (False, True))
    extra = mode.model_copy(update={"votes": 0, "critique": 0}) if novel else mode  # not evaluated on novel questions
    deliberates = hard and extra.deliberates
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
        surprising_order=surprising_order if surprising_order != order else None,
        thresholds={tier: calibration.threshold(gate, mode.policy, tier) for tier in TIERS},
        streamed=("base",) if live else ("draft",) if progressive and order[0] == "draft" else (),
        preview=progressive and order[0] != "draft",
        speculate=speculate,
        preload=hard and "modifier" in order and _modifier_expected(domain, situation),
        deliberation=extra if deliberates else None,
        doubt=doubt,
        calibrated=not doubts,
        disclaimer=SECOND_ATTEMPT if situation.dissatisfied and not doubts else LOW_CONFIDENCE,
        decisions=tuple(decisions),
    )


def usable(mode: Mode, has_draft: bool, has_modifiers: bool, calibration: Calibration) -> Mode:
    """The mode without tiers that are missing or not calibrated, so that calibration covers its policy."""
    absent = {
        "draft": not (has_draft and "draft" in calibration.gates),
        "modifier": not (has_modifiers and calibration.has_modifiers),
    }
    return mode.model_copy(update={name: False for name, missing in absent.items() if missing})


def _doubts(request: Request, situation: Situation, calibration: Calibration, novel: bool) -> list[Decision]:
    """Reasons why P(correct) is not valid for this request, most important first; empty if calibration applies."""
    found: list[Decision] = []
    if situation.question is None:
        found.append(Decision("cascade", "calibrated", 0.0, 1.0, False, situation.gap))
    if request.examples:
        found.append(Decision("cascade", "examples", len(request.examples), 0.0, False, OWN_EXAMPLES))
    if novel and situation.question is not None:
        most = calibration.question.novelty or 0.0
        found.append(Decision(_reader(situation), "novelty", situation.question.perplexity, most, False, NOVEL))
    if situation.other_system:
        found.append(Decision("cascade", "system_prompt", 0.0, 1.0, False, OTHER_SYSTEM))
    return found


def _modifier_expected(domain: str | None, situation: Situation) -> bool:
    """Whether the domain's modifier will likely be asked: after a wrong answer there, or by router and habit."""
    if situation.question is None or domain is None:
        return False
    expected = with_history(situation.question.domains, situation.habit)
    return domain in situation.failed or preload(expected, situation.modifiers) == domain


def _reader(situation: Situation) -> str:
    """The tier that read the question."""
    return "draft" if situation.has_draft else "base"


def _speculation(request: Request, question: Question, situation: Situation, calibration: Calibration) -> Decision:
    """The question gate: decides whether the draft proposes tokens for the base."""
    gate, reader = calibration.question, _reader(situation)
    if request.speculate is not None:
        requested = float(request.speculate)
        return Decision(reader, "requested", requested, 1.0, request.speculate, "set by the request")
    accepted, signal, value, threshold = False, "p_easy", question.p_easy, gate.p_easy
    if question.perplexity > gate.perplexity:
        signal, value, threshold = "perplexity", question.perplexity, gate.perplexity
        reason = f"hard question: high perplexity for the {reader}"
    elif question.p_easy < gate.p_easy:
        reason = "hard question"
    elif situation.speedup <= 1.0:
        signal, value, threshold = "speedup", situation.speedup, 1.0
        reason = "easy question, but drafting is not faster on this machine"
    else:
        accepted, reason = True, "easy question"
    if situation.has_draft:
        reason += "; the draft proposes tokens, the base verifies them" if accepted else "; the base answers alone"
    return Decision(reader, signal, value, threshold, accepted, reason)

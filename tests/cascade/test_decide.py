"""`cascade.decide`: the pure function from a request and its situation to a plan."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.cascade.decide import DISSATISFIED, NOVEL, OTHER_SYSTEM, OWN_EXAMPLES, Situation, decide, usable
from cogumi.cascade.disclaimers import LOW_CONFIDENCE, SECOND_ATTEMPT
from cogumi.cascade.modes import MODES, Mode, Settings
from cogumi.cascade.tiers import Question
from cogumi.confidence.gate import QuestionGate
from cogumi.core.errors import RequestError
from cogumi.core.types import Message, Request
from support.bundle import calibrated

GATES = {"draft": 0.5, "base": 0.5, "modifier": 0.5, "direct": 0.5}
EASY = Question({}, 5.0, 0.9, {"base": 0.1, "code": 0.8, "math": 0.1})
HARD = replace(EASY, p_easy=0.1)
NEW = replace(EASY, perplexity=500.0)
SITUATION = Situation(EASY, routed="code", modifiers=("code", "math"), has_draft=True, speedup=2.0)
UNREAD = replace(SITUATION, question=None, gap="the base has no hidden states", routed=None)
SETTINGS = Settings(domains={"math": "fast"})


def calibration(**gates):
    return calibrated({**GATES, **gates}, 0.8, QuestionGate(20.0, 0.5, novelty=100.0, base_perplexity=30.0))


def ask(**values):
    return Request(messages=(Message("user", "What is 2 + 3?"),), **values)


def plan(situation=SITUATION, settings=SETTINGS, gates=None, **values):
    return decide(ask(**values), situation, settings, calibration(**(gates or {})))


@pytest.mark.parametrize(
    ("mode", "order", "surprising_order"),
    [
        ("fast", ("base",), None),
        ("balanced", ("base", "modifier"), None),
        ("turbo", ("draft", "base"), None),
        ("straight", ("base", "modifier"), ("direct",)),
        ("mobile", ("draft", "base", "modifier"), ("draft", "direct")),
    ],
)
def test_mode_determines_the_order_of_tiers(mode, order, surprising_order):
    found = plan(mode=mode)
    assert (found.order, found.surprising_order, found.domain, found.doubt) == (order, surprising_order, "code", "")
    assert found.calibrated
    elsewhere = plan(replace(SITUATION, routed=None), mode=mode)
    assert "modifier" not in elsewhere.order
    assert elsewhere.surprising_order is None


def test_only_orders_with_a_calibrated_threshold_are_used():
    assert plan(replace(SITUATION, has_draft=False), mode="mobile").order == ("base", "modifier")
    alone = plan(gates={"modifier": None}, mode="balanced")
    assert (alone.order, alone.thresholds["base"]) == (("base",), 0.8)
    assert usable(MODES["mobile"], False, True, calibration(modifier=None)).policy.name == "base"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_modifiers", [False, True])
@pytest.mark.parametrize("has_draft", [False, True])
def test_every_bundle_accepts_answers_in_every_mode_if_its_base_is_certified(mode, has_draft, has_modifiers):
    """Only `base` is certified: a missing tier is left out, an uncertified one answers but is never accepted."""
    whole = calibration()
    certified = {"base": whole.guarantees["base"]}
    tested = {name: replace(p, threshold=math.inf) for name, p in whole.guarantees.items()}
    for guarantees in (certified, tested | certified):
        only = replace(whole, guarantees=guarantees)
        situation = replace(SITUATION, has_draft=has_draft, modifiers=("code",) if has_modifiers else ())
        found = decide(ask(mode=mode), situation, SETTINGS, only)
        assert ("draft" in found.order) is (has_draft and MODES[mode].draft)
        assert ("modifier" in found.order) is (has_modifiers and MODES[mode].modifier)
        skips_base = has_modifiers and MODES[mode].modifier_first
        assert found.thresholds["base"] == (math.inf if skips_base else 0.8)
        for tier in set(found.order) - {"base"}:
            assert found.thresholds[tier] == math.inf


def test_calibrated_modifiers_that_the_bundle_lacks_do_not_raise_the_threshold():
    both = calibration()
    high = replace(
        both, guarantees={**both.guarantees, "base+modifier": replace(both.guarantees["base"], threshold=0.9)}
    )
    missing = decide(ask(mode="balanced"), replace(SITUATION, modifiers=()), SETTINGS, high)
    assert (missing.order, missing.thresholds["base"]) == (("base",), 0.8)
    assert decide(ask(mode="balanced"), SITUATION, SETTINGS, high).thresholds["base"] == 0.9


def test_tokens_are_streamed_only_when_they_are_final():
    assert plan(mode="fast").streamed == ("base",)
    assert plan(mode="fast", abstain=True).streamed == ()
    assert plan(mode="balanced").streamed == ()
    assert plan(replace(SITUATION, routed=None), mode="balanced").streamed == ("base",)
    tries = Settings(modes={"tries": Mode(votes=3)})
    assert plan(settings=tries, mode="tries").streamed == ("base",)
    assert plan(replace(SITUATION, question=HARD), tries, mode="tries").streamed == ()


def test_progressive_answer_starts_with_the_draft():
    shown = plan(mode="balanced", progressive=True)
    assert (shown.preview, shown.streamed) == (True, ())
    own = plan(mode="turbo", progressive=True)
    assert (own.preview, own.streamed) == (False, ("draft",))
    for found in (
        plan(replace(SITUATION, has_draft=False), mode="fast", progressive=True),
        plan(mode="fast", progressive=True, abstain=True),
        plan(mode="fast", progressive=True, examples=(("q", "a"),)),
    ):
        assert not found.preview
        assert "draft" not in found.streamed


def test_extra_attempts_are_made_for_hard_questions_only():
    tries = Settings(modes={"tries": Mode(modifier=True, votes=3, critique=1, examples=2)})
    assert plan(settings=tries, mode="tries").deliberation is None
    assert plan(replace(SITUATION, question=HARD), tries, mode="tries").deliberation == tries.modes["tries"]
    novel = plan(replace(SITUATION, question=NEW), tries, mode="tries")
    assert (novel.order, novel.doubt, novel.calibrated) == (("base",), NOVEL, False)
    assert (novel.deliberation.votes, novel.deliberation.critique, novel.deliberation.examples) == (0, 0, 2)
    assert plan(replace(SITUATION, question=NEW), mode="accurate").deliberation is None


def test_likely_modifier_is_preloaded():
    hard = replace(SITUATION, question=HARD)
    assert plan(hard).preload
    assert not plan(SITUATION).preload
    assert not plan(hard, mode="fast").preload
    unclear = replace(HARD, domains={"base": 0.3, "code": 0.4, "math": 0.3})
    assert not plan(replace(hard, question=unclear)).preload
    assert plan(replace(hard, question=unclear, failed=frozenset({"code"}))).preload
    assert plan(replace(hard, question=unclear, habit={"code": 50})).preload


def test_every_reason_for_doubt_is_reported():
    angry = replace(SITUATION, dissatisfied=True)
    assert (plan(angry).doubt, plan(angry).disclaimer, plan(angry).calibrated) == (DISSATISFIED, SECOND_ATTEMPT, True)
    assert plan(angry, settings=Settings(default="fast")).order == ("base", "modifier")
    assert plan(angry, mode="fast").order == ("base",)
    both = plan(replace(angry, question=NEW), examples=(("q", "a"),))
    assert (both.doubt, both.disclaimer, both.calibrated) == (DISSATISFIED, LOW_CONFIDENCE, False)
    assert [(d.signal, d.reason) for d in both.decisions] == [("examples", OWN_EXAMPLES), ("novelty", NOVEL)]
    other = plan(replace(SITUATION, other_system=True))
    assert (other.doubt, other.calibrated, other.order) == (OTHER_SYSTEM, False, plan().order)
    assert (other.decisions[-1].signal, other.decisions[-1].accepted) == ("system_prompt", False)
    own = plan(examples=(("q", "a"),), mode="accurate")
    assert (own.order, own.doubt, own.speculate, own.deliberation) == (("base",), OWN_EXAMPLES, None, None)


def test_base_answers_unsure_for_engines_without_calibrated_gates():
    found = plan(UNREAD, mode="accurate")
    assert (found.order, found.surprising_order, found.deliberation, found.calibrated) == (("base",), None, None, False)
    assert (found.doubt, found.disclaimer, found.speculate) == (UNREAD.gap, LOW_CONFIDENCE, None)
    assert [(d.tier, d.signal, d.accepted) for d in found.decisions] == [("cascade", "calibrated", False)]


def test_mode_is_reported_if_it_is_not_the_default():
    (told, _) = plan(replace(SITUATION, routed="math")).decisions
    assert (told.signal, told.reason) == ("mode", "mode fast: set for math in the settings")
    assert plan(files=("a.csv",)).domain == "math"
    assert plan(replace(SITUATION, failed=frozenset({"code"}))).mode == "accurate"
    with pytest.raises(RequestError, match="unknown mode 'nope'"):
        plan(mode="nope")


@pytest.mark.parametrize(
    ("question", "speedup", "requested", "signal", "accepted"),
    [
        (EASY, 2.0, None, "p_easy", True),
        (EASY, 1.0, None, "speedup", False),
        (HARD, 2.0, None, "p_easy", False),
        (replace(EASY, perplexity=21.0), 2.0, None, "perplexity", False),
        (HARD, 0.0, True, "requested", True),
        (EASY, 2.0, False, "requested", False),
    ],
)
def test_drafting_is_used_for_easy_questions_where_it_is_faster(question, speedup, requested, signal, accepted):
    found = plan(replace(SITUATION, question=question, speedup=speedup), speculate=requested)
    (told,) = found.decisions
    assert (told.signal, told.accepted) == (signal, accepted)
    assert found.speculate is (None if requested is None and accepted else accepted)


situations = st.builds(
    Situation,
    st.sampled_from([EASY, HARD, NEW, None]),
    st.just("a gap"),
    st.sampled_from([None, "code", "math", "law"]),
    st.sampled_from([(), ("code",), ("code", "math")]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([frozenset(), frozenset({"code"})]),
    st.sampled_from([{}, {"code": 30}]),
)
requests = st.builds(
    ask,
    mode=st.sampled_from([None, "auto", *MODES]),
    abstain=st.booleans(),
    progressive=st.booleans(),
    speculate=st.sampled_from([None, True, False]),
    examples=st.sampled_from([(), (("q", "a"),)]),
    files=st.sampled_from([(), ("a.py",)]),
)


@given(requests, situations, st.booleans())
def test_invariants_of_every_plan(request, situation, modifiers):
    known = calibration(modifier=0.5 if modifiers else None)
    found = decide(request, situation, SETTINGS, known)
    for order in filter(None, (found.order, found.surprising_order)):
        assert order
        assert len(set(order)) == len(order)
        assert "draft" not in order or situation.has_draft
        assert not {"modifier", "direct"} & {*order} or (modifiers and found.domain in situation.modifiers)
        assert {"base", "direct"} & {*order}
    assert found.preview <= situation.has_draft
    if request.abstain:
        assert not found.streamed
        assert not found.preview
    if found.streamed == ("base",):  # a streamed answer is final: no tier follows it
        assert found.order == ("base",)
        assert found.deliberation is None
    novel = situation.question is NEW
    unread = situation.question is None or bool(request.examples)
    assert bool(found.doubt) == (situation.dissatisfied or novel or situation.other_system or unread)
    assert found.calibrated == (not novel and not situation.other_system and not unread)
    if novel or unread:
        assert not {"modifier", "direct"} & {*found.order}
    assert found.preload <= ("modifier" in found.order)
    assert decide(request, situation, SETTINGS, known) == found

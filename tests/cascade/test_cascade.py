"""The cascade over pico engines: every route of a request, and properties common to all routes."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest

from cogumi.bundle.format import open_bundle
from cogumi.cascade.decide import OTHER_SYSTEM
from cogumi.cascade.disclaimers import LOW_CONFIDENCE, finish
from cogumi.cascade.modes import MODES, Mode, Settings, load_settings
from cogumi.cascade.opening import open_cascade
from cogumi.confidence.gate import QuestionGate
from cogumi.confidence.nets import Net
from cogumi.confidence.signals import answer_signals
from cogumi.core.errors import BundleError, BusyError, CogumiError, ContextError, RequestError
from cogumi.core.types import ABSTENTION, Decision, Message, Request, Revision, Token
from cogumi.engine.protocol import final_reply, replies
from support.bundle import calibrated, cascade_of, make_bundle, open_tiers
from support.waiting import PATIENCE, Gate, until

SLOTS, CONTEXT = 4, 128


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def tiers(bundle):
    """The bundle's models; its router assigns every question to `code`."""
    opened = open_tiers(bundle, SLOTS, CONTEXT)
    yield opened
    opened.close()


def cascade(tiers, base=0.7, modifier=0.7, threshold=0.5, easy=1e9, draft=0.7, queue=1000, question=None, **parts):
    gates = {"draft": draft, "base": base, "modifier": modifier, "direct": modifier}
    whole = calibrated(gates, threshold, question or QuestionGate(easy, 0.5))
    return cascade_of(tiers, whole, workers=SLOTS, queue=queue, **parts)


def ask(text="What is 2 + 3?", **values):
    return Request(messages=(Message("user", text),), **{"max_tokens": 10, **values})


def streamed(events):
    """The text of a client that applies revisions, and the reply."""
    text = ""
    for event in events:
        if isinstance(event, Token):
            text += event.text
        elif isinstance(event, Revision):
            text = event.text
    return text, event


PATHS = {
    "base": {"base": 0.9, "threshold": 0.8},
    "modifier": {"base": 0.3, "modifier": 0.9, "threshold": 0.8},
    "low, modifier likelier": {"base": 0.3, "modifier": 0.6, "threshold": 0.8},
    "low, base likelier": {"base": 0.6, "modifier": 0.3, "threshold": 0.8},
    "no modifier calibrated": {"base": 0.3, "modifier": None, "threshold": 0.8},
    "nothing was promised": {"base": 0.9, "modifier": 0.95, "threshold": math.inf},
}
ENDS = {  # route and tier in modes balanced and fast
    "base": (("base", "base"), ("base", "base")),
    "modifier": (("modifier", "modifier:code"), ("low_confidence", "base")),
    "low, modifier likelier": (("low_confidence", "modifier:code"), ("low_confidence", "base")),
    "low, base likelier": (("low_confidence", "base"), ("low_confidence", "base")),
    "no modifier calibrated": (("low_confidence", "base"), ("low_confidence", "base")),
    "nothing was promised": (("low_confidence", "modifier:code"), ("low_confidence", "base")),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["balanced", "fast"])
def test_every_route(tiers, path, mode):
    events = list(cascade(tiers, **PATHS[path]).generate(ask(mode=mode, speculate=False)))
    text, reply = streamed(events)
    route, tier = ENDS[path][mode == "fast"]
    assert (reply.route, reply.tier) == (route, tier)
    adapter = tier.partition(":")[2] or None
    own = final_reply(tiers.answer(ask(speculate=False), adapter or "base"))
    assert reply.text == text == own.text
    assert reply.tokens == own.tokens
    assert reply.p_correct == pytest.approx(PATHS[path]["modifier" if adapter else "base"], abs=1e-6)
    assert reply.decisions == tuple(e for e in events if isinstance(e, Decision))
    assert reply.decisions[-1].accepted == (route in ("base", "modifier"))
    assert all(math.isfinite(d.value) and math.isfinite(d.threshold) for d in reply.decisions)


def test_usage_counts_every_attempt(tiers):
    one = final_reply(cascade(tiers, **PATHS["base"]).generate(ask(speculate=False)))
    two = final_reply(cascade(tiers, **PATHS["low, base likelier"]).generate(ask(speculate=False)))
    base, modifier = (final_reply(tiers.answer(ask(speculate=False), a)).usage for a in ("base", "code"))
    counted = attrgetter("prompt_tokens", "completion_tokens")  # how much was cached depends on which slot was free
    assert counted(one.usage) == counted(base)
    assert counted(two.usage) == counted(base + modifier)
    assert two.usage.completion_tokens == 20


def kinds(events):
    return [type(e).__name__ for e in events]


def test_tokens_are_streamed_only_when_the_answer_is_final(tiers):
    low = cascade(tiers, **PATHS["low, base likelier"])
    live = kinds(low.generate(ask(mode="fast", speculate=False)))
    assert live == ["Decision", *["Token"] * 10, "Decision", "Decision", "Reply"]
    held = kinds(low.generate(ask(mode="balanced", speculate=False)))
    assert held == ["Decision", "Decision", "Decision", "Decision", *["Token"] * 10, "Reply"]
    noted = kinds(low.generate(ask(mode="fast", speculate=False, note=True)))
    assert noted == [*live[:-1], "Revision", "Reply"]
    accepted = cascade(tiers, **PATHS["base"])
    assert kinds(accepted.generate(ask(mode="fast", speculate=False)))[-2:] == ["Decision", "Reply"]


@pytest.mark.parametrize("mode", ["balanced", "fast"])
def test_request_can_withhold_unsure_answers(tiers, mode):
    low = cascade(tiers, **PATHS["low, base likelier"])
    events = list(low.generate(ask(mode=mode, abstain=True)))
    text, reply = streamed(events)
    assert "Token" not in kinds(events)
    assert (reply.text, text, reply.route, reply.tokens) == (ABSTENTION, ABSTENTION, "abstained", ())
    assert not reply.decisions[-1].accepted
    sure_of_it = final_reply(cascade(tiers, **PATHS["base"]).generate(ask(mode=mode, abstain=True)))
    assert sure_of_it.route.startswith("base")


@pytest.mark.parametrize("accepted", [True, False])
def test_abstention_of_a_tier_is_never_accepted(accepted):
    ending = finish("base", "I don't know", False, accepted, withhold=False)
    assert (ending.text, ending.route) == ("I don't know", "abstained")
    assert "does not know" in ending.reason


def test_sampled_requests_take_the_same_route(tiers):
    request = ask(temperature=0.9, seed=5, speculate=False)
    reply = final_reply(cascade(tiers, **PATHS["modifier"]).generate(request))
    assert reply.text == final_reply(tiers.answer(request, "code")).text
    assert reply.route == "modifier"


def test_speculation_depends_on_the_question_unless_requested(tiers):
    plain = final_reply(cascade(tiers).generate(ask(speculate=False)))
    forced = final_reply(cascade(tiers).generate(ask(speculate=True)))
    assert forced.route == "base+draft"
    assert forced.usage.drafted > 0 == plain.usage.drafted
    assert forced.text == plain.text
    assert [d.signal for d in (plain.decisions[0], forced.decisions[0])] == ["requested", "requested"]
    surprised = final_reply(cascade(tiers, easy=1.0).generate(ask()))
    assert (surprised.decisions[0].signal, surprised.decisions[0].accepted) == ("perplexity", False)
    assert surprised.usage.drafted == 0
    seen = final_reply(cascade(tiers, question=QuestionGate(1e9, 0.99)).generate(ask())).decisions[0]
    assert (seen.signal, seen.accepted) == ("p_easy", False)
    assert seen.value == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)  # the bias of the head is one


@pytest.mark.parametrize(("speedup", "decided"), [(1.5, ("p_easy", True)), (0.9, ("speedup", False))])
def test_easy_question_is_drafted_only_where_it_is_faster(tiers, speedup, decided, monkeypatch):
    monkeypatch.setattr(type(tiers.base), "drafting_speedup", speedup)  # replaces the value measured on this machine
    seen = final_reply(cascade(tiers).generate(ask())).decisions[0]
    assert (seen.signal, seen.accepted) == decided
    assert replace(tiers, base=tiers.draft).drafting_speedup() == 0.0  # an engine without a draft


@pytest.mark.parametrize("mode", ["fast", "balanced"])
def test_answer_to_a_novel_question_is_never_accepted(tiers, mode):
    gate = QuestionGate(1e9, 0.5, novelty=1.0)  # every question has a higher perplexity
    whole = cascade(tiers, base=0.99, modifier=0.99, question=gate)
    text, reply = streamed(whole.generate(ask(mode=mode)))
    assert (reply.route, reply.tier, reply.p_correct) == ("low_confidence", "base", None)
    noted, again = streamed(whole.generate(ask(mode=mode, note=True)))
    assert noted == again.text == reply.text + LOW_CONFIDENCE
    assert text == reply.text
    novelty = next(d for d in reply.decisions if d.signal == "novelty")
    assert not novelty.accepted
    assert novelty.value > novelty.threshold == 1.0
    assert not reply.decisions[-1].accepted


def test_answer_under_another_system_prompt_is_never_accepted(tiers):
    """Calibrated with one prompt: it is known in any spacing, and stands before a request that has none."""

    def asked(prompt, systems=("Be brief.",)):
        messages = (Message("system", prompt),) * bool(prompt) + (Message("user", "What is 2 + 3?"),)
        known = cascade(tiers, base=0.9, threshold=0.8, system="Be brief.", systems=systems and frozenset(systems))
        return final_reply(known.generate(Request(messages=messages, max_tokens=4, mode="fast")))

    for reply in (asked(""), asked(" Be\nbrief. "), asked("You are a pirate.", systems=None)):
        assert reply.accepted
        assert reply.p_correct == pytest.approx(0.9)
    other = asked("You are a pirate.")
    assert (other.route, other.accepted, other.p_correct) == ("low_confidence", False, None)
    assert OTHER_SYSTEM in [d.reason for d in other.decisions if d.signal == "system_prompt"]


def test_perplexity_gate_can_be_selected(tiers):
    reply = final_reply(cascade(tiers, base=0.01, modifier=0.01, gate="perplexity").generate(ask()))
    mine = math.exp(-answer_signals(final_reply(tiers.answer(ask(), "base")))["mean_logprob"])
    judged = reply.decisions[1]
    assert (judged.signal, judged.threshold) == ("perplexity", 30.0)
    assert judged.value == pytest.approx(mine, rel=1e-6)
    assert judged.accepted == (mine <= 30)
    with pytest.raises(RequestError, match="calibrated, searched, perplexity"):
        cascade(tiers, gate="entropy")


def test_adapter_or_raw_prompt_is_answered_directly(tiers):
    low = cascade(tiers, **PATHS["low, base likelier"])
    text, reply = streamed(low.generate(ask(adapter="math", speculate=False)))
    assert reply.text == text == final_reply(tiers.answer(ask(speculate=False), "math")).text
    assert (reply.tier, reply.route, reply.decisions, reply.p_correct) == (
        "modifier:math",
        "modifier",
        (),
        None,
    )
    raw = Request(prompt="one two", max_tokens=5)
    assert final_reply(low.generate(raw)).text == final_reply(tiers.base.generate(raw)).text


def test_model_names_select_tiers_and_modes(tiers):
    whole = cascade(tiers)
    modes = "fast balanced straight accurate desktop mobile turbo"
    assert list(whole.models.items()) == [
        ("cogumi", "cascade"),
        *((f"cogumi:{name}", "mode") for name in modes.split()),
        ("cogumi:base", "tier"),
        ("cogumi:draft", "tier"),
        ("cogumi:base+code", "modifier"),
        ("cogumi:base+math", "modifier"),
    ]
    for name in whole.models:
        engine, request = whole.resolve(name, ask())
        assert final_reply(engine.generate(request)).finish_reason in ("stop", "length")
    assert whole.resolve("cogumi:fast", ask()) == (whole, ask(mode="fast"))
    assert whole.resolve("cogumi", ask(mode="fast")) == (whole, ask(mode="fast"))
    assert whole.resolve("cogumi:base+math", ask()) == (tiers.base, ask(adapter="math"))
    assert whole.resolve("cogumi:draft", ask())[0] is tiers.draft
    with pytest.raises(RequestError, match="unknown model 'gpt': choose one of cogumi, cogumi:fast"):
        whole.resolve("gpt", ask())


def test_cascade_implements_the_whole_engine_protocol(tiers):
    whole = cascade(tiers)
    assert whole.adapters == ("code", "math")
    assert whole.tokenizer is tiers.base.tokenizer
    assert whole.score(ask(), "five") == tiers.base.score(ask(), "five")
    assert whole.read(ask()) == tiers.base.read(ask())
    assert np.array_equal(whole.embed(["a b"]), tiers.base.embed(["a b"]))


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (ask(mode="nope"), RequestError, "unknown mode 'nope': choose one of auto, fast, balanced"),
        (ask(adapter="law"), RequestError, "unknown adapter 'law'"),
        (ask("word " * 300), ContextError, "the context holds 128"),
        (ask(max_tokens=0), RequestError, "max_tokens"),
        (ask(temperature=-1.0), RequestError, "temperature"),
        (ask(grammar="root ::= ("), RequestError, "the grammar cannot be used"),
    ],
)
def test_unanswerable_requests_are_refused_by_the_call(tiers, request_, error, words):
    with pytest.raises(error, match=words):
        cascade(tiers).generate(request_)


def test_mode_is_selected_by_request_memory_domain_and_default():
    mine = Settings(domains={"math": "fast"}, modes={"careful": Mode(modifier=True, votes=7)}, default="balanced")
    assert mine.choose("careful", "math", ["math"]).mode.votes == 7
    assert mine.choose(None, "math", ["math"]).name == "accurate"
    assert mine.choose("auto", "math", []).name == "fast"
    assert mine.choose(None, "code", ["math"]).name == "balanced"
    assert mine.choose(None, None, []).reason == "the default"
    assert mine.names == (*MODES, "careful")


def test_file_names_indicate_a_domain():
    known = Settings()
    assert known.file_domain(["src/Main.PY", "notes.txt"], ["code", "math"]) == "code"
    assert known.file_domain(["a.py", "b.csv"], ["code", "math"]) is None
    assert known.file_domain(["a.py"], ["math"]) is None
    assert known.file_domain([], ["code"]) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modes: {m: {votes: 2}}", "modes.m.votes: votes is 2; give 3 to 10"),
        ("modes: {m: {speed: 2}}", "modes.m.speed: Extra inputs"),
        ("default: nope", "unknown mode 'nope'"),
        ("domains: {math: nope}", "unknown mode 'nope'"),
        ("modes: {auto: {}}", "the mode name 'auto'"),
        ("modes: {base: {}}", "the mode name 'base'"),
        ("modes: [", "is not YAML"),
    ],
)
def test_invalid_settings_are_refused_with_their_location(tmp_path, text, words):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(CogumiError, match=words):
        load_settings(path)


def test_concurrent_answers_equal_sequential_ones(tiers):
    whole = cascade(tiers, **PATHS["low, modifier likelier"])
    requests = [ask(f"What is {i} + {i * i}?", speculate=False, mode=mode) for i in range(12) for mode in MODES]
    together = [r.text for r in replies(whole, requests, window=24)]
    assert together == [final_reply(whole.generate(r)).text for r in requests]


def test_full_queue_is_busy_until_a_request_ends(tiers, monkeypatch):
    gate, whole = Gate(monkeypatch), cascade(tiers, **PATHS["low, base likelier"], queue=2)
    gate.shut()
    streams = [whole.generate(ask(max_tokens=60)) for _ in range(SLOTS + 2)]
    with pytest.raises(BusyError, match="try again"):
        whole.generate(ask())
    gate.open()
    assert all(final_reply(stream).finish_reason != "cancelled" for stream in streams)
    assert final_reply(whole.generate(ask())).text


@pytest.mark.parametrize("mode", ["fast", "balanced"])
def test_closing_early_frees_every_slot(tiers, mode):
    whole = cascade(tiers, **PATHS["low, base likelier"])
    waiting = [whole.generate(ask(mode=mode, max_tokens=100)) for _ in range(3 * SLOTS)]
    next(waiting[0])
    for events in waiting:
        events.close()
    assert list(waiting[0]) == []
    until(lambda: tiers.base.free_slots == SLOTS)
    assert final_reply(whole.generate(ask())).finish_reason in ("stop", "length")


def test_dropping_the_iterator_cancels_the_request(tiers, monkeypatch):
    whole, scheduler, cancelled = cascade(tiers, **PATHS["low, base likelier"]), tiers.base._scheduler, []
    cancel = scheduler.cancel
    monkeypatch.setattr(scheduler, "cancel", lambda generation: (cancelled.append(generation), cancel(generation)))
    gate = Gate(monkeypatch)
    gate.shut(engine=tiers.base)
    next(whole.generate(ask(mode="fast", max_tokens=100)))  # nothing holds the iterator afterwards
    gate.wait()
    assert not cancelled  # the generation is still under way
    gate.open()
    until(lambda: len(cancelled) == 1)
    until(lambda: tiers.base.free_slots == SLOTS)


def test_closing_the_cascade_cancels_all_requests(bundle, monkeypatch):
    gate, whole = Gate(monkeypatch), open_cascade(bundle, slots=2, context=CONTEXT, threads=1)
    gate.shut()
    waiting = [whole.generate(ask(max_tokens=100)) for _ in range(8)]
    gate.wait()
    with ThreadPoolExecutor(1) as other:
        closed = other.submit(whole.close)
        until(whole._closed.is_set)
        gate.open()
        assert {final_reply(events).finish_reason for events in waiting} == {"cancelled"}
        closed.result(PATIENCE)
    with pytest.raises(RequestError, match="closed"):
        whole.generate(ask())


def test_internal_error_reaches_the_reader(tiers):
    broken = replace(
        tiers, heads=replace(tiers.heads, router=Net.of([0], [1], [[[0.0, 0.0]]], [[0.0, 0.0]], ["code", "math"]))
    )
    with pytest.raises(ValueError, match="mismatch"):
        list(cascade(broken).generate(ask()))


def test_bundle_with_mismatched_parts_is_refused(bundle, tmp_path, monkeypatch):
    """The checksums of the bundle are correct, but its networks do not match its models."""
    files = open_bundle(bundle)
    Net.of(np.zeros(3), np.ones(3), [np.zeros((3, 2))], [[0.0, 0.0]], ["code", "math"]).save(tmp_path / "router")
    monkeypatch.setattr("cogumi.bundle.unpack.open_bundle", lambda _: replace(files, router=tmp_path / "router"))
    with pytest.raises(BundleError, match="different models"):
        open_cascade(bundle)

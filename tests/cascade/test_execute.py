"""`cascade.execute`: draft answers, deliberation, complaints, memory, reuse and disclaimers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.cascade.disclaimers import DISCLAIMERS, LOW_CONFIDENCE, SECOND_ATTEMPT, finish, without_disclaimer
from cogumi.cascade.memory.answer_cache import AnswerCache
from cogumi.cascade.memory.turns import Memory
from cogumi.cascade.modes import Mode, Settings
from cogumi.cascade.template_bank import Templates
from cogumi.confidence.gate import QuestionGate
from cogumi.confidence.signals import FLOOR
from cogumi.core.errors import ContextError, RequestError
from cogumi.core.types import ABSTENTION, Decision, Example, Message, Reply, Request, Revision, Token, Usage
from cogumi.engine.protocol import final_reply
from cogumi.evaluate.accuracy import ask as ask_all
from cogumi.evaluate.accuracy import figures
from support.bundle import calibrated, cascade_of, make_bundle, open_tiers

EASY, HARD = QuestionGate(1e9, 0.5), QuestionGate(1e9, 0.99)
EXAMPLE = Example("1", "code", 1, (), "no model says this", "test", {"check": {"kind": "exact"}})


@pytest.fixture(scope="module")
def tiers(tmp_path_factory):
    """Pico models; the router assigns every question to `code`."""
    opened = open_tiers(make_bundle(tmp_path_factory.mktemp("path")), slots=8, context=192)
    yield opened
    opened.close()


def cascade(tiers, question=EASY, threshold=0.8, draft=0.3, base=0.3, modifier=0.3, **parts):
    gates = {"draft": draft, "base": base, "modifier": modifier, "direct": modifier}
    return cascade_of(tiers, calibrated(gates, threshold, question), **parts)


def ask(*texts, **values):
    """A conversation: question, answer, question, ..."""
    texts = texts or ("What is 2 + 3?",)
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Request(messages=messages, **{"max_tokens": 10, "speculate": False, **values})


def answer(tiers, tier, request):
    return final_reply(tiers.answer(request, tier)).text


def signals(reply):
    return [(d.tier, d.signal) for d in reply.decisions]


def test_confident_draft_answers_where_the_mode_allows(tiers):
    reply = final_reply(cascade(tiers, draft=0.9).generate(ask(mode="turbo")))
    assert (reply.tier, reply.route) == ("draft", "draft")
    assert reply.text == answer(tiers, "draft", ask())
    unsure = final_reply(cascade(tiers, base=0.9).generate(ask(mode="turbo")))
    assert (unsure.tier, unsure.route) == ("base", "base")
    assert final_reply(cascade(tiers, draft=0.9).generate(ask(mode="balanced"))).tier != "draft"


def test_novel_question_goes_directly_to_the_modifier(tiers):
    surprised = replace(EASY, base_perplexity=1.0)
    reply = final_reply(cascade(tiers, surprised, modifier=0.9).generate(ask(mode="mobile")))
    assert (reply.tier, reply.route) == ("modifier:code", "modifier")
    assert not any(tier == "base" for tier, _ in signals(reply))
    calm = final_reply(cascade(tiers, EASY, base=0.9).generate(ask(mode="mobile")))
    assert calm.tier == "base"


def test_progressive_answer_starts_with_the_draft_and_is_revised(tiers):
    for mode in ("fast", "balanced", "turbo"):
        events = list(cascade(tiers, base=0.9).generate(ask(mode=mode, progressive=True)))
        first = "".join(e.text for e in events if isinstance(e, Token))
        assert first == answer(tiers, "draft", ask())
        assert events[-1].text == answer(tiers, "base", ask())
        assert [e.text for e in events if isinstance(e, Revision)] == [events[-1].text] * (first != events[-1].text)


def test_vote_can_replace_an_unsure_answer_but_not_accept_it(tiers):
    whole = cascade(tiers, HARD)
    reply = final_reply(whole.generate(ask(mode="accurate")))
    assert ("base+votes", "agreement") in signals(reply) or ("modifier:code+votes", "agreement") in signals(reply)
    assert reply.route in ("low_confidence", "abstained")
    assert not reply.decisions[-1].accepted
    assert final_reply(whole.generate(ask(mode="accurate"))).text == reply.text
    easy = final_reply(cascade(tiers, EASY).generate(ask(mode="accurate")))
    sure = final_reply(cascade(tiers, HARD, base=0.9).generate(ask(mode="accurate")))
    assert not any(signal == "agreement" for r in (easy, sure) for _, signal in signals(r))
    assert reply.usage.completion_tokens > easy.usage.completion_tokens


def test_hard_questions_can_get_examples_of_their_domain(tiers):
    templates = Templates({"code": [(f"q{i}", f"a{i}") for i in range(5)]})
    settings = Settings(modes={"shown": Mode(examples=2)})
    reply = final_reply(cascade(tiers, HARD, templates=templates, settings=settings).generate(ask(mode="shown")))
    assert ("base+examples", "p_correct") in signals(reply)
    too_long = Templates({"code": [("q " * 300, "a")]})
    reply = final_reply(cascade(tiers, HARD, templates=too_long, settings=settings).generate(ask(mode="shown")))
    assert not any(tier == "base+examples" for tier, _ in signals(reply))
    nothing = final_reply(cascade(tiers, HARD, settings=settings).generate(ask(mode="shown")))
    assert not any(tier == "base+examples" for tier, _ in signals(nothing))


class Unhappy:
    """Replaces the follow-up classifier: a message with "wrong" is a complaint."""

    sure = 0.5

    def dissatisfied(self, messages):
        return float(len(messages) > 1 and "wrong" in messages[-1].content)


def test_complaint_is_answered_by_the_modifier_and_stored(tiers, tmp_path):
    memory = Memory(tmp_path / "memory.sqlite")
    whole = cascade(tiers, base=0.9, modifier=0.95, memory=memory, escalation=Unhappy())
    first = final_reply(whole.generate(ask(user="ann", id="one")))
    assert (first.route, first.tier) == ("base", "base")
    again = final_reply(whole.generate(ask("What is 2 + 3?", first.text, "That is wrong.", user="ann", note=True)))
    assert again.decisions[0].signal == "dissatisfied"
    assert (again.route, again.tier) == ("low_confidence", "modifier:code")
    assert again.text == answer(tiers, "code", ask()) + SECOND_ATTEMPT  # the question itself, not the complaint
    assert {t.id: t.outcome for t in memory.recent("ann")}["one"] is False
    assert memory.failed("ann") == {"code"}
    later = final_reply(whole.generate(ask("What is 4 + 4?", user="ann")))
    assert any(d.signal == "mode" and "an earlier answer" in d.reason for d in later.decisions)
    assert not any(d.signal == "mode" for d in final_reply(whole.generate(ask("What is 4 + 4?", user="bob"))).decisions)
    told = "That is wrong, I meant 12 + 3"
    more = final_reply(whole.generate(ask("What is 2 + 3?", first.text, told, user="ann")))
    whole_talk = ask("What is 2 + 3?", first.text, told)
    assert without_disclaimer(more.text) in (answer(tiers, "code", whole_talk), answer(tiers, "base", whole_talk))
    memory.close()


def test_request_without_modifiers_is_respected_after_a_complaint(tiers):
    whole = cascade(tiers, base=0.9, modifier=0.95, escalation=Unhappy())
    reply = final_reply(whole.generate(ask("What is 2 + 3?", "6", "wrong", mode="fast")))
    assert (reply.tier, reply.route) == ("base", "low_confidence")


def test_only_the_user_of_an_answer_can_rate_it(tiers, tmp_path):
    memory = Memory(tmp_path / "memory.sqlite")
    whole = cascade(tiers, memory=memory)
    reply = final_reply(whole.generate(ask(user="ann", id="one", session="s")))
    turn = memory.recent("ann")[0]
    assert (turn.id, turn.session, turn.answer, turn.outcome) == ("one", "s", without_disclaimer(reply.text), None)
    with pytest.raises(RequestError):
        whole.feedback("one", True, "bob")
    with pytest.raises(RequestError):
        whole.feedback("two", True, "ann")
    whole.feedback("one", True, "ann")
    assert memory.recent("ann")[0].outcome is True
    with pytest.raises(RequestError, match="--state"):
        cascade(tiers).feedback("one", True, "ann")
    memory.close()


@pytest.mark.parametrize(
    "text", ["", "\x00\x07\x1b[31m", "x1" * 50_000, f"Say this.{LOW_CONFIDENCE}", SECOND_ATTEMPT * 2]
)
def test_unusual_questions_are_answered_or_refused_with_a_message(tiers, text):
    whole = cascade(tiers, base=0.9)
    if len(text) > 1_000:
        with pytest.raises(ContextError, match="shorten the prompt"):
            whole.generate(ask(text))
        return
    reply = final_reply(whole.generate(ask(text)))
    assert (reply.route, reply.text) == ("base", without_disclaimer(reply.text))


notes = st.lists(st.sampled_from(DISCLAIMERS), max_size=3).map("".join)


@given(st.text(max_size=20), notes, st.booleans(), st.booleans())
def test_model_text_cannot_imitate_disclaimers(text, imitated, accepted, withhold):
    own = without_disclaimer(text + imitated)
    assert without_disclaimer(own) == own
    final = finish("base", text + imitated, False, accepted, withhold, LOW_CONFIDENCE)
    if accepted:
        assert final.text == own
    assert without_disclaimer(final.text) == own or final.text == ABSTENTION
    assert (
        sum(final.text.count(note) for note in DISCLAIMERS) <= own.count(DISCLAIMERS[0]) + own.count(DISCLAIMERS[1]) + 1
    )


def test_every_decision_is_emitted_when_it_is_made(tiers):
    events = list(cascade(tiers, HARD, escalation=Unhappy()).generate(ask("a", "b", "wrong")))
    assert events[-1].decisions == tuple(e for e in events if isinstance(e, Decision))


def test_accepted_answer_is_reused_for_the_same_user_only(tiers):
    cache = AnswerCache(None, None)
    whole = cascade(tiers, base=0.9, cache=cache)
    said = answer(tiers, "base", ask())
    stop = (said[2:4],)  # a truncated answer would not be cached
    first = final_reply(whole.generate(ask(user="ann", stop=stop)))
    again = final_reply(whole.generate(ask(user="ann", stop=stop)))
    assert (again.route, again.text, again.p_correct) == ("cache", first.text, first.p_correct)
    assert again.usage == Usage()
    assert again.decisions[-1].reason == "reused the answer to the same question"
    others = [
        ask(user="bob", stop=stop),
        ask(stop=stop),
        ask(user="ann", stop=stop, mode="fast"),
        ask(user="ann", stop=stop, max_tokens=9),
        ask(user="ann", stop=("zq",)),
        ask(user="ann", stop=stop, temperature=0.5),
        ask(user="ann", stop=stop, abstain=True),
        ask("Hello", "Hi", "What is 2 + 3?", user="ann", stop=stop),
        Request(messages=(Message("system", "Be brief."), *ask().messages), user="ann", max_tokens=10, stop=stop),
        ask(user="ann", stop=stop, progressive=True),
    ]
    assert not any(final_reply(whole.generate(other)).route == "cache" for other in others)
    unsure = cascade(tiers, cache=AnswerCache(None, None))
    assert {final_reply(unsure.generate(ask(user="ann", stop=stop))).route for _ in range(2)} == {"low_confidence"}


def test_withheld_answers_include_unsure_drafts(tiers):
    events = list(cascade(tiers).generate(ask(mode="fast", progressive=True, abstain=True)))
    assert not any(isinstance(event, Token) for event in events)
    assert events[-1].text == ABSTENTION


def test_draft_signal_of_text_longer_than_the_context_is_the_floor(tiers):
    question = tiers.read_question(ask())
    whole = Reply("\u00e9\u65e5" * 300, (Token(5, "x", -0.1, 0.1, 1.0),), "length", Usage())
    assert tiers.base_signals(ask(), whole, question)["draft_nats"] == FLOOR


def test_reused_answer_rated_wrong_is_not_reused_again(tiers, tmp_path):
    memory = Memory(tmp_path / "memory.sqlite")
    whole = cascade(tiers, base=0.9, memory=memory, cache=AnswerCache(None, None), escalation=Unhappy())
    stop = (answer(tiers, "base", ask())[2:4],)

    def routes(*users):
        return [final_reply(whole.generate(ask(user=user, stop=stop, id=f"{user}{i}"))).route for i, user in users]

    assert routes((0, "ann"), (1, "ann"), (2, "bob"), (3, "bob")) == ["base", "cache", "base", "cache"]
    assert {turn.id: turn.route for turn in memory.recent("ann")} == {"ann0": "base", "ann1": "cache"}
    whole.feedback("ann1", False, "ann")  # the reused answer
    assert routes((4, "ann"), (5, "bob")) == ["base", "cache"]
    whole.feedback("ann4", True, "ann")
    assert routes((6, "ann")) == ["cache"]
    said = final_reply(whole.generate(ask(user="bob", stop=stop))).text
    final_reply(whole.generate(ask("What is 2 + 3?", said, "wrong", user="bob", stop=stop)))
    assert routes((7, "bob"), (8, "ann")) == ["base", "cache"]
    memory.close()


def test_abstention_is_reported_and_never_accepted(tiers):
    forced = ask(grammar='root ::= "I don\'t know."', max_tokens=30, mode="fast")
    reply = final_reply(cascade(tiers, base=0.9).generate(forced))
    assert (reply.text, reply.route, reply.accepted) == (ABSTENTION, "abstained", False)
    judged, told = reply.decisions[-2:]
    assert (judged.signal, judged.accepted, judged.reason) == (
        "p_correct",
        True,
        "accepted abstention (p_correct 0.90, threshold 0.80)",
    )
    assert (told.signal, told.value, told.threshold, told.accepted) == ("abstains", 1.0, 0.0, False)
    assert told.reason == "base says that it does not know"
    unsure = final_reply(cascade(tiers, base=0.3).generate(forced))
    assert "misses the threshold" in unsure.decisions[-2].reason
    assert unsure.decisions[-1] == replace(told, value=1.0)


def test_answers_are_accepted_only_on_accepting_routes(tiers):
    cache = AnswerCache(None, None)
    stop = (answer(tiers, "base", ask())[2:4],)
    whole = cascade(tiers, base=0.9, draft=0.9, cache=cache)
    base, again, draft, adapter = (
        final_reply(whole.generate(request))
        for request in (ask(stop=stop), ask(stop=stop), ask(mode="turbo"), ask(adapter="code"))
    )
    found = {reply.route: reply.accepted for reply in (base, again, draft, adapter)}
    assert found == {"base": True, "cache": True, "draft": True, "modifier": False}
    unsure = final_reply(cascade(tiers, modifier=0.9).generate(ask(mode="fast")))
    assert (unsure.route, unsure.accepted) == ("low_confidence", False)
    assert final_reply(cascade(tiers, modifier=0.9).generate(ask())).accepted
    doubted = cascade(tiers, base=0.9, escalation=Unhappy())
    assert not final_reply(doubted.generate(ask("a", "b", "wrong"))).accepted
    asked, _ = ask_all(whole, [ask(stop=stop), ask(mode="turbo")], [EXAMPLE, EXAMPLE])
    found = figures(asked)
    assert (found["coverage"], found["accepted_error"]) == (1.0, 1.0)
    alone, _ = ask_all(tiers.base, [ask()], [EXAMPLE])
    assert figures(alone)["coverage"] is None


def test_a_request_without_system_prompt_gets_the_one_of_the_calibration(tiers):
    """The answer is that of the whole conversation; a request's own system prompt is kept."""
    own = replace(ask(), messages=(Message("system", "Be kind."), *ask().messages))
    shared = replace(ask(), messages=(Message("system", "Be brief."), *ask().messages))
    bot = cascade(tiers, base=0.9, system="Be brief.")
    plain = cascade(tiers, base=0.9)
    for asked, same in ((ask(), shared), (shared, shared), (own, own)):
        one, two = final_reply(bot.generate(asked)), final_reply(plain.generate(same))
        assert (one.text, one.usage.prompt_tokens) == (two.text, two.usage.prompt_tokens)

"""Personal routing from Python (SPEC F17): opt-in, display, the note in the reply, and deletion."""

import pytest

from cogumi.cascade.opening import open_cascade
from cogumi.confidence.personal import MIN_VOTES
from cogumi.core.errors import RequestError
from cogumi.core.types import Decision, Message, Request
from support.bundle import make_bundle

RATED = 60


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("personal"))


@pytest.fixture(scope="module")
def bot(bundle, tmp_path_factory):
    """A cascade in whose memory ann and bob rated `RATED` answers wrong."""
    state = tmp_path_factory.mktemp("state")
    with open_cascade(bundle, threads=1, slots=2, state=state) as opened:
        for user in ("ann", "bob"):
            for _ in range(RATED):
                opened.feedback(reply_to(opened, user).id, right=False, user=user)
        yield opened


def reply_to(bot, user):
    return bot.ask("What is 2 + 3?", mode="fast", max_tokens=2, user=user)


def personal(reply):
    return [decision for decision in reply.decisions if decision.signal == "personal"]


def test_personal_routing_is_off_until_a_user_opts_in(bot):
    shown = bot.personal("bob")
    assert (shown.user, shown.on, shown.needed, shown.offsets) == ("bob", False, MIN_VOTES, {})
    assert MIN_VOTES < shown.rated <= RATED
    reply = reply_to(bot, "bob")
    assert reply.p_correct == pytest.approx(0.7)
    assert personal(reply) == []


def test_changed_p_correct_is_noted_and_opting_out_ends_it(bot):
    on = bot.personal("ann", on=True)
    assert on.on
    assert set(on.offsets) == {"base", "code", "math"}
    assert min(on.offsets.values()) < -0.3
    question = Request((Message("user", "What is 2 + 3?"),), mode="fast", max_tokens=2, user="ann")
    events = list(bot.generate(question))
    reply = events[-1]
    assert reply.p_correct < 0.65
    (told,) = personal(reply)
    assert told in [event for event in events if isinstance(event, Decision)]
    assert (told.tier, told.value, told.threshold) == ("base", reply.p_correct, pytest.approx(0.7))
    assert told.reason == f"personal routing: this user's ratings move P(correct) from 0.70 to {reply.p_correct:.2f}"
    other = reply_to(bot, "bob")
    assert other.p_correct == pytest.approx(0.7)
    off = bot.chat(user="ann", mode="fast", max_tokens=2).personal(on=False)
    assert (off.on, off.offsets) == (False, {})
    assert reply_to(bot, "ann").p_correct == pytest.approx(0.7)


def test_few_ratings_change_nothing(bot):
    bot.personal("cy", on=True)
    for _ in range(5):
        bot.feedback(reply_to(bot, "cy").id, right=False, user="cy")
    shown = bot.personal("cy")
    assert (shown.on, shown.rated, shown.offsets) == (True, 5, {})
    assert personal(reply_to(bot, "cy")) == []


def test_forgotten_user_is_not_opted_in(bot):
    bot.personal("dan", on=True)
    bot.feedback(reply_to(bot, "dan").id, right=False, user="dan")
    assert bot.forget("dan") == 1
    shown = bot.personal("dan")
    assert (shown.on, shown.rated) == (False, 0)


def test_missing_requirements_are_reported_in_one_line(bot, bundle):
    with pytest.raises(RequestError, match="personal routing needs a user; give a user id"):
        bot.personal("", on=True)
    with pytest.raises(RequestError, match="give a user id"):
        bot.chat().personal()
    with open_cascade(bundle, threads=1, slots=2) as without:
        with pytest.raises(RequestError, match="personal routing needs a state folder"):
            without.personal("ann", on=True)
        with pytest.raises(RequestError, match="nothing is stored without a state folder"):
            without.forget("ann")

"""Personal routing from Python: asked for, shown, noted beside the answer, and forgotten (SPEC F17)."""

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
    """In its memory, ann and bob called `RATED` answers wrong."""
    state = tmp_path_factory.mktemp("state")
    with open_cascade(bundle, threads=1, slots=2, state=state) as opened:
        for user in ("ann", "bob"):
            for _ in range(RATED):
                opened.feedback(asked(opened, user).id, right=False, user=user)
        yield opened


def asked(bot, user):
    return bot.ask("What is 2 + 3?", mode="fast", max_tokens=2, user=user)


def personal(reply):
    return [decision for decision in reply.decisions if decision.signal == "personal"]


def test_it_is_off_until_a_user_asks_for_it(bot):
    shown = bot.personal("bob")
    assert (shown.user, shown.on, shown.needed, shown.offsets) == ("bob", False, MIN_VOTES, {})
    assert MIN_VOTES < shown.rated <= RATED
    reply = asked(bot, "bob")
    assert reply.p_correct == pytest.approx(0.7)
    assert personal(reply) == []


def test_a_changed_p_correct_says_so_and_opting_out_ends_it(bot):
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
    other = asked(bot, "bob")
    assert other.p_correct == pytest.approx(0.7)
    off = bot.chat(user="ann", mode="fast", max_tokens=2).personal(on=False)
    assert (off.on, off.offsets) == (False, {})
    assert asked(bot, "ann").p_correct == pytest.approx(0.7)


def test_few_ratings_move_nothing(bot):
    bot.personal("cy", on=True)
    for _ in range(5):
        bot.feedback(asked(bot, "cy").id, right=False, user="cy")
    shown = bot.personal("cy")
    assert (shown.on, shown.rated, shown.offsets) == (True, 5, {})
    assert personal(asked(bot, "cy")) == []


def test_a_forgotten_user_has_asked_for_nothing(bot):
    bot.personal("dan", on=True)
    bot.feedback(asked(bot, "dan").id, right=False, user="dan")
    assert bot.forget("dan") == 1
    shown = bot.personal("dan")
    assert (shown.on, shown.rated) == (False, 0)


def test_what_it_needs_is_told_in_one_line(bot, bundle):
    with pytest.raises(RequestError, match="personal routing belongs to a user: name one"):
        bot.personal("", on=True)
    with pytest.raises(RequestError, match="name one"):
        bot.chat().personal()
    with open_cascade(bundle, threads=1, slots=2) as without:
        with pytest.raises(RequestError, match="nothing is remembered here, so nothing can be personal"):
            without.personal("ann", on=True)
        with pytest.raises(RequestError, match="nothing is remembered here, so nothing can be forgotten"):
            without.forget("ann")

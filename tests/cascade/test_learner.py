"""The learner over a memory (SPEC F16, F17): candidates, promotion, rollback, and persistence."""

import json
import math
import multiprocessing
import time
import warnings
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.cascade.memory import learner as learner_module
from cogumi.cascade.memory.known_votes import vote_of
from cogumi.cascade.memory.learned_file import FILE, Learned, LearnedFile
from cogumi.cascade.memory.learner import Learner
from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.recalibration import Correction, Vote
from cogumi.core.errors import StateError
from support.votes import CANARIES, PROMISE, votes_of
from support.waiting import PATIENCE


def turn(id, user="ann", **changes):
    fields = {"p_correct": 0.8, "signals": {"domain_math": 1.0}, "outcome": None, "route": "base"} | changes
    return Turn(
        id,
        user,
        "",
        time.time(),
        f"q {id}",
        "a",
        "math",
        "base",
        fields["route"],
        "fast",
        fields["p_correct"],
        fields["signals"],
        fields["outcome"],
    )


@pytest.fixture
def memory(tmp_path):
    with closing(Memory(tmp_path / "memory.db")) as opened:
        yield opened


def test_new_learner_changes_nothing(memory, tmp_path):
    learner = Learner(memory, tmp_path, [PROMISE])
    for p in (0.0, 0.123456789, 1.0):
        assert learner.p_correct("t", "ann", p, {"domain_math": 1.0}) == p
    assert learner.state()["layer"] is None
    assert math.isnan(learner.p_correct("t", "ann", math.nan, {}))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([b"{}", b"null", b'{"format": 2}', b'{"layer": {"offset": 1e999}}']))
def test_a_damaged_file_is_set_aside(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("learned")
    with closing(Memory(folder / "memory.db")) as memory:
        (folder / FILE).write_bytes(content)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner = Learner(memory, folder, [PROMISE])
            assert learner.p_correct("t", "ann", 0.7, {}) == 0.7
        if content != b"{}":  # the only one of these that is a valid state
            assert [str(w.message).count("renamed to") for w in said] == [1]
            assert (folder / f"{FILE}.unreadable").read_bytes() == content


def test_state_round_trips_through_its_file(memory, tmp_path):
    layer = Correction(-0.5, 0.1, {"domain_math": (-0.3, 0.0)}, certified=True)
    state = Learned(layer=layer, promoted=1.0, tests=3).with_event("promoted", {}, gain=0.02)
    learner = Learner(memory, tmp_path, [PROMISE])
    learner._save(state)
    other = Learner(memory, tmp_path, [PROMISE])
    assert other.state() == learner.state() == state.model_dump(mode="json")
    assert other.p_correct("t", "", 0.8, {"domain_math": 1.0}) < 0.8


def test_state_of_another_process_is_loaded(memory, tmp_path):
    one, other = (Learner(memory, tmp_path, [PROMISE]) for _ in range(2))
    one._save(Learned(layer=Correction(-1.0)))
    assert other.p_correct("t", "", 0.8, {}) == one.p_correct("t", "", 0.8, {}) < 0.7
    (tmp_path / FILE).unlink()
    assert other.p_correct("t", "", 0.8, {}) == 0.8


def test_candidate_is_used_for_the_canary_only(memory, tmp_path):
    learner = Learner(memory, tmp_path, [PROMISE])
    learner._save(Learned(canary=Correction(-1.0)))
    changed = [i for i in range(40) if learner.p_correct(f"turn-{i}", "", 0.8, {}) != 0.8]
    assert changed == CANARIES


def test_a_folder_that_cannot_be_written_is_refused(memory, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="can be written"):
        Learner(memory, tmp_path / "file", [PROMISE])


def test_only_rated_answers_with_a_probability_are_votes():
    assert vote_of(turn("t", outcome=True)).right
    assert vote_of(turn("t")) is None
    assert vote_of(turn("t", outcome=True, p_correct=None)) is None
    assert vote_of(turn("t", outcome=False, route="abstained")) is None


def live(memory, learner, rng, n, shift, name="t"):
    """`n` rated questions of 50 users."""
    for i in range(n):
        z = rng.normal(1.0, 1.6)
        p, signals = float(sigmoid(z)), {"domain_math": 1.0}
        learner.p_correct(f"{name}{i}", f"u{i % 50}", p, signals)
        memory.remember(turn(f"{name}{i}", f"u{i % 50}", p_correct=p, signals=signals))
        learner.rated(memory.rate(f"{name}{i}", f"u{i % 50}", bool(rng.random() < sigmoid(z + shift))))


def events(learner):
    return [event["event"] for event in learner.state()["history"]]


def test_promotion_and_rollback(memory, tmp_path, monkeypatch):
    """With small limits: a drift is learned, and rolled back once it is over."""
    for name, value in {"CHECK_INTERVAL": 50, "FIT_INTERVAL": 200, "CANARY_VOTES": 60}.items():
        monkeypatch.setattr(learner_module, name, value)
    learner = Learner(memory, tmp_path, [PROMISE], need=300)
    rng = np.random.default_rng(0)
    live(memory, learner, rng, 4_000, -2.0, "bad")
    assert events(learner)[:2] == ["canary", "promoted"]
    assert learner.p_correct("x", "", 0.8, {"domain_math": 1.0}) < 0.6
    live(memory, learner, rng, 600, 0.0, "good")
    assert "rolled back" in events(learner)
    assert learner.state()["layer"] is None
    again = Learner(memory, tmp_path, [PROMISE])  # the history is persisted
    assert events(again) == events(learner)


def test_attacker_can_neither_roll_back_a_layer_nor_hide_its_harm(memory, tmp_path):
    """A user who starts to vote against all others after the last fit is detected before the votes count."""
    learner = Learner(memory, tmp_path, [])
    layer = Correction(-1.5)
    rng = np.random.default_rng(7)

    def look(votes):
        learner._votes.votes = {(v.user, v.id): (2.0, v) for v in votes}
        learner._save(Learned(layer=layer, promoted=1.0))
        return learner._roll_back_if_harmful(learner._file.state, layer).layer

    worse = votes_of(rng, 3_000, shift=(-1.5, -1.5))
    villain = [Vote(f"v{i}", "villain", f"v{i}", 0.9, {}, True) for i in range(2_000)]
    assert look(worse) == layer
    assert look([*worse, *villain]) == layer
    good = votes_of(rng, 300)
    helper = [Vote(f"v{i}", "villain", f"v{i}", 0.9, {}, False) for i in range(2_000)]
    assert look([*worse, *good]) is None
    assert look([*worse, *[v for pair in zip(good, helper[:300], strict=True) for v in pair]]) is None


def test_too_few_votes_or_voters_teach_nothing(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "CHECK_INTERVAL", 50)
    monkeypatch.setattr(learner_module, "FIT_INTERVAL", 50)
    learner = Learner(memory, tmp_path, [PROMISE], need=300)
    for i in range(900):
        memory.remember(turn(f"t{i}", "villain"))
        learner.rated(memory.rate(f"t{i}", "villain", False))
    assert events(learner) == []


def test_personal_offsets_are_opt_in_and_forgotten(memory, tmp_path):
    learner = Learner(memory, tmp_path, [PROMISE])
    for user, right in (("ann", False), ("bob", False), ("cy", True)):
        for i in range(60):
            memory.remember(turn(f"t{i}", user, p_correct=0.7))
            learner.rated(memory.rate(f"t{i}", user, right))
    signals = {"domain_math": 1.0}
    assert learner.p_correct("x", "ann", 0.7, signals) == 0.7
    for user in ("ann", "cy"):
        memory.set_personal(user, True)
    learner = Learner(memory, tmp_path, [PROMISE])
    assert learner.p_correct("x", "ann", 0.7, signals) < 0.6
    assert 0.7 < learner.p_correct("x", "cy", 0.85, signals) < 0.9  # raised, but not above the calibrated threshold
    assert learner.p_correct("x", "bob", 0.7, signals) == 0.7
    assert learner.forget("ann") == 60
    assert learner.p_correct("x", "ann", 0.7, signals) == 0.7


def hold_lock(folder, ready, done):
    with LearnedFile(folder).exclusive_lock() as alone:
        ready.put(alone)
        done.get(timeout=PATIENCE)


def test_only_one_process_learns_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Queue(), context.Queue()
    file = LearnedFile(tmp_path)
    process = context.Process(target=hold_lock, args=(tmp_path, ready, done))
    process.start()
    assert ready.get(timeout=PATIENCE)
    with file.exclusive_lock() as alone:
        assert not alone
    process.kill()
    process.join()
    with file.exclusive_lock() as alone:
        assert alone  # the lock was released when its holder ended


def test_closed_memory_does_not_fail_answers(tmp_path):
    memory = Memory(tmp_path / "memory.db")
    learner = Learner(memory, tmp_path, [PROMISE])
    memory.close()
    assert learner.p_correct("t", "ann", 0.7, {}) == 0.7


def test_state_is_valid_json(memory, tmp_path):
    assert json.loads(json.dumps(Learner(memory, tmp_path, []).state()))["format"] == 1

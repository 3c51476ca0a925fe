"""The answer cache: exact and similar hits, isolation of users, verified reuse, and damaged files."""

import json
import sqlite3
import subprocess
import sys
import threading
from dataclasses import astuple, fields, replace
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.cascade.memory.answer_cache import AnswerCache, Hit, Scope
from cogumi.cascade.memory.answers import FILE, AnswerFile
from cogumi.cascade.memory.neighbours import MANY, Neighbours
from cogumi.confidence.nets import Net
from cogumi.confidence.reuse import FEATURES
from cogumi.core.errors import StateError
from cogumi.core.types import Decision, Reply, Token, Usage
from support.encoder import Trigrams

ME = Scope(user="me", model="m")
text = st.text(st.characters(codec=None), max_size=60)


def reply(text, **more):
    kept = {"tier": "base", "route": "base", "accepted": True, **more}
    return Reply(text, (Token(0, text, -0.1, 0.1, 1.0),), "stop", Usage(3, 1), **kept)


def near(folder=None, **more):
    return AnswerCache(Trigrams(), folder, **{"similarity": 0.8, **more})


def test_same_question_gets_the_complete_cached_answer():
    decision = Decision("base", "p_correct", 0.9, 0.8, True, "meets")
    kept = reply("Paris", p_correct=0.9, signals={"a": 1.5}, decisions=(decision,))
    cache = AnswerCache(None, None)
    assert cache.find(ME, "Capital of France?") is None
    cache.keep(ME, "Capital of France?", kept)
    hit = cache.find(ME, "\r\nCapital of France? \n")
    assert hit.exact
    assert hit.similarity == 1
    assert hit.reply == replace(kept, tokens=(), usage=Usage())
    assert cache.find(ME, "capital of france?") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [("print('a')", "print('A')"), ("if x:\n    y()", "if x:\ny()"), ("  x = 1\nx", "x = 1\nx"), ("a  b", "a b\tc")],
)
def test_significant_spelling_differences_are_kept_apart(one, other):
    cache = near(similarity=0.0)
    cache.keep(ME, one, reply("one"))
    assert cache.find(ME, other) is None


def test_similar_question_is_answered_unless_it_conflicts():
    cache = near(similarity=0.8)
    cache.keep(ME, "How many people live in Norway in 2020?", reply("5.4 million"))
    hit = cache.find(ME, "how many people live in norway in 2020")
    assert not hit.exact
    assert hit.question == "How many people live in Norway in 2020?"
    assert hit.reply.text == "5.4 million"
    assert cache.find(ME, "How many people live in Norway in 2021?") is None
    assert cache.find(ME, "How many people live in Norwich in 2020?") is None
    assert cache.find(ME, "Something entirely different?") is None


scopes = st.builds(Scope, *[st.sampled_from(["", "a", "b", 'a","b', "\ud800"])] * len(fields(Scope)))
questions = st.sampled_from(["", "a question about cats", "A question about cats", "a question about dogs"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(scopes, questions), max_size=25), scopes, questions)
def test_no_answer_crosses_a_scope(kept, scope, question):
    cache = near(similarity=0.5)
    for where, what in kept:
        cache.keep(where, what, reply(json.dumps([astuple(where), what])))
        hit = cache.find(scope, question)
        if hit:
            assert tuple(json.loads(hit.reply.text)[0]) == astuple(scope)
        exact = cache.find(where, what)
        assert exact.exact
        assert json.loads(exact.reply.text) == [list(astuple(where)), what]
    cache.close()


def test_unsure_truncated_and_cancelled_answers_are_not_cached():
    cache = near()
    for bad in (
        replace(reply("x"), finish_reason="length"),
        replace(reply("x"), finish_reason="cancelled"),
        replace(reply("x"), route="low_confidence", accepted=False),
        replace(reply("x"), route="abstained", accepted=False),
    ):
        cache.keep(ME, "q", bad)
    assert len(cache) == 0


@pytest.mark.parametrize("question", ["", " ", "\0\x1b[31m\x07", "\ud800", "q" * 100_000, "wort " * 20_000])
def test_any_question_can_be_looked_up(question, tmp_path):
    cache = AnswerCache(Trigrams(), tmp_path)
    assert cache.find(ME, question) is None
    cache.keep(ME, question, reply(question))
    assert cache.find(ME, question).reply.text == question
    assert cache.find(ME, question + "!") is None or len(question) < 1000


def test_least_recently_used_answers_are_evicted():
    cache = near(size=3)
    for i in range(3):
        cache.keep(ME, f"question {i}", reply(str(i)))
    assert cache.find(ME, "question 0")
    cache.keep(ME, "another", reply("x"))
    assert len(cache) == 3
    assert cache.find(ME, "question 1") is None
    assert cache.find(ME, "question 0").exact
    assert cache.find(ME, "question 2").exact


def test_answers_survive_a_restart_and_are_shared_between_processes(tmp_path):
    one, other = near(tmp_path), near(tmp_path)
    assert other.find(ME, "is the sky blue today") is None
    one.keep(ME, "is the sky blue today?", reply("yes"))
    assert other.find(ME, "is the sky blue today?").exact
    assert not other.find(ME, "is the sky blue today").exact
    one.judge(one.find(ME, "is the sky blue today?"), False)
    assert other.find(ME, "is the sky blue today") is None
    one.keep(ME, "is the sky blue today?", reply("no"))
    one.close()
    other.close()
    again = near(tmp_path)
    assert again.find(ME, "is the sky blue today").reply.text == "no"


def test_vectors_of_another_encoder_are_not_compared(tmp_path):
    one = near(tmp_path)
    one.keep(ME, "is the sky blue today?", reply("yes"))
    assert one.find(ME, "is the sky blue today")

    class Other(Trigrams):
        identity = "other"

    other = AnswerCache(Other(), tmp_path, similarity=0.8)
    assert other.find(ME, "is the sky blue today") is None
    assert other.find(ME, "is the sky blue today?").exact


WRITER = """
import sys
import tarfile
from pathlib import Path
from cogumi.cascade.memory.answer_cache import AnswerCache, Hit, Scope
from cogumi.core.types import Reply, Usage
cache = AnswerCache(None, Path(sys.argv[1]), size=150)
for i in range(100):
    cache.keep(Scope(user="me"), f"{sys.argv[2]} {i}", Reply(str(i), (), "stop", Usage(), accepted=True))
    hit = cache.find(Scope(user="me"), f"{sys.argv[2]} {i}")
    assert hit and hit.reply.text == str(i)
"""


def test_processes_can_write_concurrently(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b", "c")]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    cache = AnswerCache(None, tmp_path, size=150)
    assert 100 <= len(cache) <= 150


def test_cache_is_thread_safe():
    cache, wrong = near(size=50), []

    def work(name):
        for i in range(60):
            cache.keep(Scope(user=name), f"question {i}", reply(f"{name} {i}"))
            hit = cache.find(Scope(user=name), f"question {i}")
            if hit and hit.reply.text != f"{name} {i}":
                wrong.append(hit)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 50


def filled(folder, n=200):
    cache = AnswerCache(Trigrams(), folder)
    for i in range(n):
        cache.keep(ME, f"question {i}", reply(f"answer {i} " * 20))
    cache.close()
    return folder / FILE


@pytest.mark.parametrize("share", [0.5, 0.9, 0.01])
def test_truncated_file_is_moved_aside_with_a_warning(tmp_path, share):
    path = filled(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.warns(UserWarning, match=r"damaged .* moved to answers.sqlite.damaged-1"):
        cache = AnswerCache(Trigrams(), tmp_path)
    assert (tmp_path / f"{FILE}.damaged-1").stat().st_size == int(share * len(content))
    assert cache.find(ME, "question 1") is None
    cache.keep(ME, "question 1", reply("new"))
    assert cache.find(ME, "question 1").reply.text == "new"


def test_file_that_is_not_a_database_is_moved_aside(tmp_path):
    (tmp_path / FILE).write_text("not a database, " * 100)
    with pytest.warns(UserWarning, match="not a database"):
        AnswerCache(None, tmp_path)
    assert (tmp_path / f"{FILE}.damaged-1").read_text().startswith("not a database")


def test_answer_changed_on_disk_is_not_served(tmp_path):
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"answer 7 ", b"answer 8 "))
    cache = AnswerCache(None, tmp_path)
    with pytest.warns(UserWarning, match="changed on disk"):
        assert cache.find(ME, "question 7") is None
    assert cache.find(ME, "question 9").reply.text.startswith("answer 9")


@pytest.mark.parametrize(
    ("change", "message"), [("user_version = 99", "version 99"), ("application_id = 7", "another program")]
)
def test_a_file_of_another_version_is_refused(tmp_path, change, message):
    path = filled(tmp_path, 3)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA {change}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StateError, match=rf"{message}.*move it away or name another"):
        AnswerCache(None, tmp_path)
    assert path.read_bytes() == before


def test_unusable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used"):
        AnswerCache(None, tmp_path / "file")


def test_closed_cache_gives_no_hits_and_no_errors():
    cache = near()
    cache.close()
    with pytest.warns(UserWarning, match="cannot be used"):
        assert cache.find(ME, "q") is None


def test_fitted_check_decides_about_similar_questions():
    n = len(FEATURES)
    no = Net.of(np.zeros(n), np.ones(n), [np.zeros((n, 1))], [[-1.0]], ("different", "same"))
    yes = Net.of(np.zeros(n), np.ones(n), [np.zeros((n, 1))], [[1.0]], ("different", "same"))
    for check, found in ((no, False), (yes, True)):
        cache = near(check=check)
        cache.keep(ME, "is the sky blue today?", reply("yes"))
        assert (cache.find(ME, "is the sky blue today") is not None) == found
        assert cache.find(ME, "is the sky blue today?")


def test_answer_rated_wrong_is_not_reused():
    cache = near()
    cache.keep(ME, "q", reply("wrong"))
    cache.judge(cache.find(ME, "q"), True)
    cache.judge(cache.find(ME, "q"), False)
    assert cache.find(ME, "q") is None
    cache.keep(ME, "is the sky blue today?", reply("wrong"))
    cache.judge(cache.find(ME, "is the sky blue today"), False)
    assert cache.find(ME, "is the sky blue today") is None


def test_verified_reuse_starts_only_after_a_proof(tmp_path):
    cache = near(tmp_path, verified=True, risk=0.05, similarity=0.5)
    cache.keep(ME, "is the sky blue today?", reply("yes"))
    served = []
    for marks in islice(product("?!.", repeat=6), 400):
        question = "is the sky blue today" + "".join(marks)
        hit = cache.find(ME, question)
        served.append(hit is not None)
        if hit is None:
            cache.keep(ME, question, reply("Yes."))
    assert not any(served[:59])  # the number of correct answers that proves 5%
    assert 0.8 < np.mean(served[200:]) < 1
    assert cache.find(ME, "is the sky blue today?").exact
    cache.close()
    again = near(tmp_path, verified=True, risk=0.05, similarity=0.5)
    new = ["is the sky blue today" + "".join(marks) for marks in product("?!", repeat=5)]
    assert np.mean([again.find(ME, question) is not None for question in new]) > 0.7


def test_verified_reuse_never_starts_for_differing_answers():
    cache = near(verified=True, risk=0.05, similarity=0.5)
    for number, marks in enumerate(islice(product("?!.", repeat=6), 300)):
        question = "is the sky blue today" + "".join(marks)
        assert cache.find(ME, question) is None
        cache.keep(ME, question, reply(f"answer {number % 7}"))


def test_rating_of_one_user_does_not_affect_the_cache_of_others():
    cache = near(verified=True, risk=0.05, similarity=0.5)
    cache.keep(ME, "is the sky blue today?", reply("yes"))
    hit = Hit("is the sky blue today?", reply("yes"), 0.9, False, ME.digest(), 1, 0.9, 0.9)
    for _ in range(3000):
        cache.judge(hit, True)
    assert cache.find(ME, "is the sky blue today!") is None


def test_index_and_exact_search_give_the_same_neighbours():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(MANY + 500, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    few, many = Neighbours(32), Neighbours(32)
    few.add(range(1000), vectors[:1000])
    many.add(range(MANY + 500), vectors)
    for i in (0, 500, 999):
        for found in (few.nearest(vectors[i], 3), many.nearest(vectors[i], 3)):
            assert found[0] == (i, pytest.approx(1, abs=1e-2))
    for index in (few, many):
        before = len(index)
        index.remove([500, 10**9])
        assert len(index) == before - 1
        assert index.nearest(vectors[500], 1)[0][0] != 500


def test_old_ratings_are_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr("cogumi.cascade.memory.answers.MAX_JUDGEMENTS", 10)
    answers = AnswerFile(tmp_path)
    for i in range(30):
        answers.judge(1, b"a", i / 30, 0.5, i % 2 == 0, compared=True)
    assert [round(30 * score) for _, score, _, _ in answers.compared(b"a", 0)] == list(range(20, 30))
    assert answers.compared(b"b", 0) == []
    assert len(answers.judgements(1, b"a")) == 10

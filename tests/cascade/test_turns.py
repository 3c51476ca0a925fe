"""Session memory (SPEC F8): durability after crashes, isolation of users, deletion and damaged files."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.cascade.memory import turns as module
from cogumi.cascade.memory.turns import MAX_CHARACTERS, Memory, Turn
from cogumi.core.errors import RequestError, StateError


def turn(id, user="ann", **changes):
    made = Turn(id, user, "s", time.time(), "what?", "that", "math", "base", "base", "fast", 0.7, {"x": 1.5}, None)
    return replace(made, **changes)


@pytest.fixture
def memory(tmp_path):
    with closing(Memory(tmp_path / "deep" / "memory.db")) as opened:
        yield opened


def test_turn_round_trips_through_the_memory(memory):
    kept = [turn(f"t{i}", session=f"s{i}", outcome=[None, True, False][i % 3]) for i in range(7)]
    for one in kept:
        memory.remember(one)
    assert memory.recent("ann") == tuple(reversed(kept[2:]))
    assert memory.recent("ann", 100) == tuple(reversed(kept))
    assert memory.recent("ann", 0) == memory.recent("bob") == ()


def test_failures_and_usual_domains_of_a_user(memory):
    for i, domain in enumerate(["math", "math", "code", "tools"]):
        memory.remember(turn(f"t{i}", domain=domain))
    assert memory.failed("ann") == frozenset()
    memory.rate("t0", "ann", False)
    memory.rate("t2", "ann", False)
    memory.rate("t3", "ann", True)
    assert memory.failed("ann") == {"math", "code"}
    assert memory.habit("ann") == {"math": 2, "code": 1, "tools": 1}
    memory.rate("t2", "ann", True)  # the later rating replaces the earlier one
    assert memory.failed("ann") == {"math"}


def test_turns_without_a_user_can_be_rated_but_not_recalled(memory):
    memory.remember(turn("t", user=""))
    assert memory.rate("t", "", False).outcome is False
    assert (memory.recent(""), memory.habit(""), memory.failed("")) == ((), {}, frozenset())
    assert [t.id for t in memory.rated()] == ["t"]


def test_unknown_answer_cannot_be_rated(memory):
    memory.remember(turn("t"))
    for id, user in (("t", "bob"), ("t", ""), ("u", "ann"), ("", "ann"), ("x" * 100_000, "ann\0")):
        with pytest.raises(RequestError, match="no answer"):
            memory.rate(id, user, True)
    assert memory.ratings() == 0


def test_same_id_of_two_users_is_two_answers(memory):
    memory.remember(turn("t", answer="hers"))
    memory.remember(turn("t", user="bob", answer="his"))
    assert memory.rate("t", "ann", False).answer == "hers"
    assert memory.recent("bob")[0].outcome is None


NAMES = st.text(st.characters(codec=None), max_size=3) | st.sampled_from(
    ["", "a", "A", "a\0", "á", "a\u0301", "\ud800", "?"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 3), st.sampled_from(["remember", "rate", "forget"])), max_size=25))
def test_calls_of_one_user_do_not_affect_another(tmp_path_factory, calls):
    """Compared with one dictionary per user, for any user names."""
    expected = {}
    with closing(Memory(tmp_path_factory.mktemp("m") / "memory.db")) as memory:
        for step, (user, id, call) in enumerate(calls):
            mine = expected.setdefault(user, {})
            if call == "remember":
                mine.pop(str(id), None)
                mine[str(id)] = turn(str(id), user=user, answer=f"{step}")
                memory.remember(mine[str(id)])
            elif call == "forget":
                assert memory.forget(user) == len(mine)
                mine.clear()
            elif str(id) in mine:
                mine[str(id)] = replace(mine[str(id)], outcome=True)
                assert memory.rate(str(id), user, True) == mine[str(id)]
            else:
                with pytest.raises(RequestError):
                    memory.rate(str(id), user, True)
        for user, mine in expected.items():
            assert memory.recent(user, 100) == (tuple(reversed(mine.values())) if user else ())
            assert memory.habit(user) == ({"math": len(mine)} if user and mine else {})


def test_rated_turns_are_ordered_by_rating(memory, monkeypatch):
    clock = count(time.time())
    monkeypatch.setattr(module, "time", SimpleNamespace(time=clock.__next__))
    monkeypatch.setattr(module, "_PAGE", 3)
    for i in range(10):
        memory.remember(turn(f"t{i}", user=f"u{i}"))
    for i in (7, 3, 5, 1, 9, 0, 2):
        memory.rate(f"t{i}", f"u{i}", True)
    middle = next(clock)
    memory.rate("t3", "u3", False)
    assert [t.id for t in memory.rated()] == ["t7", "t5", "t1", "t9", "t0", "t2", "t3"]
    assert [t.id for t in memory.rated(newest=3)] == ["t0", "t2", "t3"]
    assert [(t.id, t.outcome) for t in memory.rated(middle)] == [("t3", False)]
    assert (memory.ratings(), memory.ratings(middle)) == (7, 1)


@pytest.mark.parametrize("text", ["", "\0\x1b[2J\r\n\x7f", "\ud800 alone", "漢字🙂" * 3, "x" * 100_000])
def test_any_text_is_stored(memory, text):
    memory.remember(turn("t", question=text, answer=text))
    found = memory.recent("ann")[0]
    assert found.question == found.answer == text[:MAX_CHARACTERS].replace("\ud800", "?")


def test_growth_is_bounded(memory, monkeypatch):
    monkeypatch.setattr(module, "MAX_TURNS", 5)
    monkeypatch.setattr(module, "MAX_ANONYMOUS_TURNS", 7)
    for i in range(20):
        for user in ("", "ann", "bob"):
            memory.remember(turn(f"t{i}", user=user))
    assert [t.id for t in memory.recent("ann", 100)] == ["t19", "t18", "t17", "t16", "t15"]
    assert memory.forget("") == 7
    memory.remember(turn("old", user="cy", at=time.time() - 181 * 86_400))
    assert memory.recent("cy") == ()


def test_forgotten_text_is_removed_from_the_disk(memory):
    secret = "the launch code is 0000"
    for i in range(50):
        memory.remember(turn(f"t{i}", question=secret, session=secret))
        memory.remember(turn(f"t{i}", user="bob"))
    memory.set_personal("ann", True)
    folder = memory._path.parent

    def found():
        return any(secret.encode() in path.read_bytes() for path in folder.iterdir())

    assert found()
    assert memory.forget("ann") == 50
    assert not found()
    assert not memory.personal("ann")
    assert len(memory.recent("bob", 100)) == 50


def test_personal_routing_is_stored_per_user(memory):
    for wish in (True, True, False, True):
        memory.set_personal("ann", wish)
        assert memory.personal("ann") is wish
    memory.set_personal("", True)
    assert not memory.personal("")
    assert not memory.personal("bob")


def foreign(path, *statements):
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def test_file_of_another_version_is_refused_and_unchanged(tmp_path):
    path = tmp_path / "memory.db"
    Memory(path).close()
    foreign(path, "PRAGMA user_version = 99")
    with pytest.raises(StateError, match=r"version 99.*move the file away"):
        Memory(path)
    foreign(path, "PRAGMA user_version = 1")
    Memory(path).close()


def test_database_of_another_program_is_refused_and_unchanged(tmp_path):
    path = tmp_path / "memory.db"
    foreign(path, "CREATE TABLE theirs (x)", "PRAGMA user_version = 1")
    before = path.read_bytes()
    with pytest.raises(StateError, match="another program"):
        Memory(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"not a database, and long enough to look like one" * 100, b"SQLite format 3\0cut"]
)
def test_file_that_is_not_a_database_is_refused(tmp_path, content):
    path = tmp_path / "memory.db"
    path.write_bytes(content)
    with pytest.raises(StateError, match="move the file away"):
        Memory(path)
    assert path.read_bytes() == content


def test_truncated_file_is_refused_on_open_or_read(tmp_path):
    path = tmp_path / "memory.db"
    with closing(Memory(path)) as memory:
        for i in range(200):
            memory.remember(turn(f"t{i}", question="q" * 500))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError), closing(Memory(path)) as memory:
        memory.recent("ann", 1000)


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="can be written"):
        Memory(tmp_path / "file" / "memory.db")
    with pytest.raises(StateError, match="can be written"):
        Memory(tmp_path)


CHILD = """
import os, sys, time
from pathlib import Path
from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.core.errors import StateError
path, name, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if sys.argv[4:] and os.geteuid() == 0:
    os.seteuid(65534)  # permissions do not bind root
try:
    memory = Memory(path)
    for i in range(n):
        memory.remember(Turn(f"{name}-{i}", name, "", time.time(), "q" * 2000, "a", "math", "", "", "", 0.5, {}, None))
        memory.rate(f"{name}-{i}", name, True)
        print(i, flush=True)
except StateError as error:
    print("StateError:", error)
"""


def child(path, name, n, *more):
    command = [sys.executable, "-c", CHILD, str(path), name, str(n), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_read_only_folder_is_refused(tmp_path):
    folder = tmp_path / "shut"
    Memory(folder / "memory.db").close()
    (folder / "memory.db").chmod(0o444)
    folder.chmod(0o555)
    for parent in (tmp_path, *list(tmp_path.parents)[:2]):
        parent.chmod(0o755)
    for name in ("memory.db", "new.db"):
        said = child(folder / name, "ann", 1, "unprivileged").communicate(timeout=60)[0]
        assert said.startswith("StateError:"), said
        assert "can be written" in said


def test_processes_can_create_and_write_one_file_concurrently(tmp_path):
    path, n = tmp_path / "memory.db", 40
    running = [child(path, f"u{k}", n) for k in range(4)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [s.split()[-1:] for s in said] == [[str(n - 1)]] * 4, said
    with closing(Memory(path)) as memory:
        assert all(len(memory.recent(f"u{k}", 100)) == n for k in range(4))
        assert memory.ratings() == 4 * n


def test_killed_process_loses_at_most_one_turn(tmp_path):
    path = tmp_path / "memory.db"
    for attempt in range(3):
        process = child(path, f"u{attempt}", 100_000)
        said = [process.stdout.readline() for _ in range(30 + 7 * attempt)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.wait()
        done = len([line for line in said if line.endswith("\n")])
        with closing(Memory(path)) as memory:
            kept = memory.recent(f"u{attempt}", 1_000_000)
            assert kept[-1].id == f"u{attempt}-0"
            assert done <= len(kept) <= done + 1
            assert sum(t.outcome is True for t in kept) >= done
            memory.remember(turn("after", user="next"))  # the file stays usable


def test_memory_is_thread_safe(memory):
    failures = []

    def work(name):
        try:
            for i in range(30):
                memory.remember(turn(f"{i}", user=name))
                memory.rate(f"{i}", name, i % 2 == 0)
                assert {t.user for t in memory.recent(name)} == {name}
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"u{k}",)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert memory.ratings() == 180


def test_closed_memory_refuses_calls(tmp_path):
    memory = Memory(tmp_path / "memory.db")
    memory.close()
    with pytest.raises(StateError):
        memory.recent("ann")

"""Session memory: questions, answering tiers and ratings (SPEC F8). One SQLite file per server.

Several processes and threads may use the file at the same time (write-ahead log, busy timeout; open it after a fork,
not before). Each turn is one transaction: a killed process loses at most the turn being written; a power failure may
lose the last few. Data is partitioned by user: a call for one user never reads, rates or deletes turns of another.
Requests without a user share the partition "": they can be rated by id but are never used for later answers.

Limits: the newest `MAX_TURNS` per user (`MAX_ANONYMOUS_TURNS` for ""), at most `MAX_AGE_DAYS` old; questions and
answers are truncated to `MAX_CHARACTERS`. Control characters are stored unchanged.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi.core.errors import RequestError, StateError

FILE = "memory.sqlite"
"""Its name in the state folder."""
VERSION = 1
APPLICATION = 0x636F676D  # "cogm": marks this program's databases
MAX_TURNS = 1_000
MAX_ANONYMOUS_TURNS = 10_000
MAX_AGE_DAYS = 180
MAX_CHARACTERS = 20_000
BUSY_SECONDS = 10.0
_PAGE = 1_000  # rows per query, so that a reader does not hold all texts in memory
_LOG_PAGES = 4_000  # pages of 4 KiB in the log before it is written to the database and synced

_SCHEMA = f"""
CREATE TABLE turns (
    seq INTEGER PRIMARY KEY, user BLOB NOT NULL, id BLOB NOT NULL, session BLOB NOT NULL, at REAL NOT NULL,
    rated_at REAL, outcome INTEGER, p_correct REAL, domain TEXT NOT NULL, tier TEXT NOT NULL, route TEXT NOT NULL,
    mode TEXT NOT NULL, signals TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, UNIQUE (user, id));
CREATE INDEX by_user ON turns (user, seq);
CREATE INDEX by_age ON turns (at);
CREATE INDEX by_rating ON turns (rated_at, seq) WHERE rated_at IS NOT NULL;
CREATE TABLE personal (user BLOB PRIMARY KEY);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""
_COLUMNS = "id, user, session, at, question, answer, domain, tier, route, mode, p_correct, signals, outcome"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer. `at`: seconds since 1970. `p_correct`: the gate's P(correct) from the `signals`,
    before corrections (None: no gate applied). `outcome`: whether the answer was right (None: not rated).
    """

    id: str
    user: str
    session: str
    at: float
    question: str
    answer: str
    domain: str
    tier: str
    route: str
    mode: str
    p_correct: float | None
    signals: Mapping[str, float]
    outcome: bool | None


def _key(text: str) -> bytes:
    """Encode a name injectively, including invalid Unicode."""
    return text.encode("utf-8", "surrogatepass")


def _text(text: str) -> str:
    return text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _turn(row: tuple[Any, ...]) -> Turn:
    id, user, session, at, question, answer, domain, tier, route, mode, p_correct, signals, outcome = row
    id, user, session = (name.decode("utf-8", "surrogatepass") for name in (id, user, session))
    right = None if outcome is None else bool(outcome)
    return Turn(
        id, user, session, at, question, answer, domain, tier, route, mode, p_correct, json.loads(signals), right
    )


class Memory:
    """The memory in the file `path`, which is created if missing.

    Raises `StateError`, here and in every call, for an unusable file or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        try:
            found = self._kind()  # before writing, because the file may belong to another program
            if found is None:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("BEGIN IMMEDIATE")
                found = self._kind()  # another process may have created it meanwhile
                for statement in _SCHEMA.split(";") if found is None else ():
                    self._db.execute(statement)
                self._db.execute("COMMIT")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
            writable = "BEGIN IMMEDIATE", "ROLLBACK"
            for statement in writable if found in (None, (APPLICATION, VERSION)) else ():
                self._db.execute(statement)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        if found is not None and found[0] != APPLICATION:
            raise StateError(f"{self._path} is a database of another program; use another state folder")
        if found is not None and found[1] != VERSION:
            raise StateError(
                f"{self._path} is a memory of version {found[1]}, this program reads version {VERSION}; "
                "use the program that wrote it, or move the file away to start a new memory"
            )

    def _kind(self) -> tuple[int, int] | None:
        """(application, version) of the file; None if it is empty."""
        if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return None
        return tuple(self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            f"the memory {self._path} cannot be used ({error}); check that its folder can be written and has space, "
            "or move the file away to start a new memory"
        )

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The connection, locked for this thread."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Atomic transaction; other processes wait."""
        with self._database() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite ends it itself on some errors, such as a full disk
                    db.execute("ROLLBACK")
                raise

    def remember(self, turn: Turn) -> None:
        """Store a turn, replacing one with the same user and id; delete turns beyond the limits."""
        signals = {name: value for name, value in turn.signals.items() if math.isfinite(value)}
        user = _key(turn.user)
        row = (
            *(user, _key(turn.id), _key(turn.session), turn.at, turn.at if turn.outcome is not None else None),
            *(turn.outcome, turn.p_correct, *map(_text, (turn.domain, turn.tier, turn.route, turn.mode))),
            *(json.dumps(signals), _text(turn.question), _text(turn.answer)),
        )
        columns = "user, id, session, at, rated_at, outcome, p_correct, domain, tier, route, mode, signals, question"
        keep = MAX_TURNS if turn.user else MAX_ANONYMOUS_TURNS
        with self._transaction() as db:
            db.execute(f"INSERT OR REPLACE INTO turns ({columns}, answer) VALUES ({', '.join('?' * len(row))})", row)
            oldest = "SELECT seq FROM turns WHERE user = ? ORDER BY seq DESC LIMIT 1 OFFSET ?"
            db.execute(f"DELETE FROM turns WHERE user = ? AND seq <= ({oldest})", (user, user, keep))
            db.execute("DELETE FROM turns WHERE at < ?", (time.time() - MAX_AGE_DAYS * 86_400,))

    def recent(self, user: str, n: int = 5) -> tuple[Turn, ...]:
        """The user's last `n` turns of all sessions, newest first; empty for ""."""
        query = f"SELECT {_COLUMNS} FROM turns WHERE user = ? ORDER BY seq DESC LIMIT ?"
        return tuple(map(_turn, self._of(user, query, max(n, 0))))

    def failed(self, user: str) -> frozenset[str]:
        """Domains with an answer to this user that was rated wrong."""
        return frozenset(d for (d,) in self._of(user, "SELECT domain FROM turns WHERE user = ? AND outcome = 0"))

    def habit(self, user: str) -> dict[str, int]:
        """Number of this user's questions by domain."""
        return dict(self._of(user, "SELECT domain, count(*) FROM turns WHERE user = ? GROUP BY domain"))

    def _of(self, user: str, query: str, *arguments: int) -> list[tuple[Any, ...]]:
        if not user:
            return []
        with self._database() as db:
            return db.execute(query, (_key(user), *arguments)).fetchall()

    def rate(self, id: str, user: str, right: bool) -> Turn:
        """Store a rating of an answer, replacing an earlier rating.

        Raises `RequestError` if that user has no such answer.
        """
        query = f"UPDATE turns SET outcome = ?, rated_at = ? WHERE user = ? AND id = ? RETURNING {_COLUMNS}"
        with self._transaction() as db:  # times are taken inside it, so that they are ordered across processes
            row = db.execute(query, (right, time.time(), _key(user), _key(id))).fetchone()
        if row is None:
            raise RequestError(
                f"there is no answer '{id[:80]}' of this user to rate; send the id and user of the answer "
                f"(answers are kept for at most {MAX_AGE_DAYS} days)"
            )
        return _turn(row)

    def rated(self, since: float = 0.0, newest: int = 1_000_000) -> Iterator[Turn]:
        """The `newest` turns of all users rated at `since` or later, in the order of rating."""
        with self._database() as db:
            query = (
                "SELECT rated_at, seq FROM turns WHERE rated_at >= ? ORDER BY rated_at DESC, seq DESC LIMIT 1 OFFSET ?"
            )
            after = db.execute(query, (since, newest)).fetchone() or (since, -1)
        query = f"""SELECT rated_at, seq, {_COLUMNS} FROM turns WHERE (rated_at, seq) > (?, ?)
                    ORDER BY rated_at, seq LIMIT {_PAGE}"""
        while True:
            with self._database() as db:
                rows = db.execute(query, after).fetchall()
            yield from (_turn(row[2:]) for row in rows)
            if len(rows) < _PAGE:
                return
            after = rows[-1][:2]

    def ratings(self, since: float = 0.0) -> int:
        """Number of stored turns rated at `since` or later."""
        with self._database() as db:
            return int(db.execute("SELECT count(*) FROM turns WHERE rated_at >= ?", (since,)).fetchone()[0])

    def personal(self, user: str) -> bool:
        """Whether personal routing is on for this user."""
        return bool(self._of(user, "SELECT 1 FROM personal WHERE user = ?"))

    def set_personal(self, user: str, on: bool) -> None:
        """Switch personal routing on or off for this user; no effect for ""."""
        query = "INSERT OR IGNORE INTO personal VALUES (?)" if on else "DELETE FROM personal WHERE user = ?"
        if user:
            with self._transaction() as db:
                db.execute(query, (_key(user),))

    def forget(self, user: str) -> int:
        """Delete all data of a user, also from freed pages on disk; returns the number of turns.

        Freed pages are overwritten and the log is emptied. While another process is reading, its part of the log
        remains until the next checkpoint.
        """
        with self._transaction() as db:
            turns = db.execute("DELETE FROM turns WHERE user = ?", (_key(user),)).rowcount
            db.execute("DELETE FROM personal WHERE user = ?", (_key(user),))
        with self._database() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return turns

    def close(self) -> None:
        """Close the file; later calls raise `StateError`."""
        with self._lock:
            self._db.close()

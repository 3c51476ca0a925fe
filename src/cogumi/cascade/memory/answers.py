"""The file of the answer cache: one SQLite database in the state folder, shared by threads and processes.

It contains no executable data. Each row has a hash of its content, so a row changed on disk is never returned. A
damaged file is renamed with a warning; a file of another version is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import StateError
from cogumi.core.types import Decision, Reply, Usage

FILE = "answers.sqlite"
VERSION = 1
MAX_JUDGEMENTS = 40_000
"""Most judgements stored."""
APPLICATION = 0x636F6761  # "coga": marks this program's databases
_BUSY_SECONDS = 10.0
_SCHEMA = f"""
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, scope BLOB NOT NULL, key BLOB NOT NULL, used REAL NOT NULL,
    encoder TEXT NOT NULL, vector BLOB NOT NULL, digest BLOB NOT NULL, body TEXT NOT NULL, UNIQUE (scope, key));
CREATE INDEX by_use ON entries (used);
CREATE TABLE judged (
    id INTEGER PRIMARY KEY AUTOINCREMENT, entry INTEGER NOT NULL, basis BLOB NOT NULL, score REAL NOT NULL,
    bound REAL NOT NULL, right INTEGER NOT NULL, compared INTEGER NOT NULL);
CREATE INDEX by_entry ON judged (entry);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer."""

    id: int
    question: str
    reply: Reply


class AnswerFile:
    """Entries and judgements in `folder` (None: in memory only); not thread-safe.

    Raises `StateError` for an unusable folder and a file of another version or program; methods raise `sqlite3.Error`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / FILE if folder else None
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            self._db = self._open()
        except (OSError, sqlite3.OperationalError) as error:
            raise StateError(
                f"the cache {folder} cannot be used: {error}; check its permissions or name another folder"
            ) from error
        except sqlite3.DatabaseError as error:
            assert self._path is not None  # memory is never damaged
            moved = _aside(self._path)
            warnings.warn(
                f"the cache {self._path} is damaged ({error}): it was moved to {moved.name}, a new one was created",
                stacklevel=3,
            )
            self._db = self._open()
        self._version = -1

    def _open(self) -> sqlite3.Connection:
        path = self._path or ":memory:"
        db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                db.execute("PRAGMA journal_mode = WAL")
                with _transaction(db):
                    if not db.execute("SELECT 1 FROM sqlite_master").fetchone():  # still empty
                        for statement in _SCHEMA.split(";"):
                            db.execute(statement)
            found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if found != [APPLICATION, VERSION]:
                what = f"of version {found[1]}" if found[0] == APPLICATION else "of another program"
                raise StateError(
                    f"{self._path} is a file {what}; this program reads version {VERSION}: "
                    "move it away or name another folder"
                )
            if (problem := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(" ".join(problem.split()))
            db.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            db.close()
            raise
        return db

    def changed(self) -> bool:
        """Whether another process has written since the last call; True at the first call."""
        before, self._version = self._version, self._db.execute("PRAGMA data_version").fetchone()[0]
        return before != self._version

    def lookup(self, scope: bytes, key: bytes) -> Entry | None:
        """The entry with this key."""
        return self._entry("scope = ? AND key = ?", scope, key)

    def entry(self, scope: bytes, id: int) -> Entry | None:
        """The entry with this id, if it exists in this scope."""
        return self._entry("scope = ? AND id = ?", scope, id)

    def _entry(self, condition: str, *values: bytes | int) -> Entry | None:
        query = f"SELECT id, scope, key, encoder, vector, digest, body FROM entries WHERE {condition}"
        row = self._db.execute(query, values).fetchone()
        if row is None:
            return None
        id, *content, digest, body = row
        if _digest(*content, body) != digest:
            warnings.warn(f"an answer of the cache {self._path} was changed on disk and is deleted", stacklevel=4)
            self.remove(id)
            return None
        kept = json.loads(body)
        return Entry(id, kept["question"], _reply(kept["reply"]))

    def vectors(self, scope: bytes, encoder: str, width: int, after: int) -> tuple[list[int], NDArray[np.float32]]:
        """Ids above `after` in a scope, and their vectors [n, width] by that encoder."""
        query = "SELECT id, vector FROM entries WHERE scope = ? AND encoder = ? AND id > ? ORDER BY id"
        rows = [row for row in self._db.execute(query, (scope, encoder, after)) if len(row[1]) == 2 * width]
        found = np.frombuffer(b"".join(vector for _, vector in rows), np.float16).reshape(len(rows), width)
        return [id for id, _ in rows], found.astype(np.float32)

    def put(
        self, scope: bytes, key: bytes, question: str, reply: Reply, encoder: str, vector: NDArray[np.float32]
    ) -> int:
        """Store an answer and return its id; replaces an earlier answer with the same key."""
        body = json.dumps({"question": question, "reply": _plain(reply)})
        blob = vector.astype(np.float16).tobytes()
        row = (scope, key, time.time(), encoder, blob, _digest(scope, key, encoder, blob, body), body)
        query = (
            "INSERT OR REPLACE INTO entries (scope, key, used, encoder, vector, digest, body) VALUES (?,?,?,?,?,?,?)"
        )
        return int(self._db.execute(query, row).lastrowid or 0)

    def touch(self, id: int) -> None:
        """Set the time of last use of an entry to now."""
        self._db.execute("UPDATE entries SET used = ? WHERE id = ?", (time.time(), id))

    def remove(self, id: int) -> None:
        """Delete an entry."""
        self._db.execute("DELETE FROM entries WHERE id = ?", (id,))

    def evict(self, size: int) -> list[tuple[bytes, int]]:
        """Delete the least recently used entries if there are more than `size`, a hundredth of `size` at a time.

        Returns their scopes and ids.
        """
        if self._db.execute("SELECT count(*) FROM entries").fetchone()[0] <= size:
            return []
        with _transaction(self._db):
            excess = self._db.execute("SELECT count(*) FROM entries").fetchone()[0] - size
            last = max(excess, size // 100) if excess > 0 else 0  # another process may have evicted them
            query = "SELECT scope, id FROM entries ORDER BY used, id LIMIT ?"
            gone: list[tuple[bytes, int]] = self._db.execute(query, (last,)).fetchall()
            self._db.executemany("DELETE FROM entries WHERE id = ?", [(id,) for _, id in gone])
        return gone

    def judge(self, entry: int, basis: bytes, score: float, bound: float, right: bool, compared: bool) -> None:
        """Store a judgement; `compared`: from the cache's own comparison, not from a rating. Scores of another `basis`
        (encoder, check) are not comparable.
        """
        query = "INSERT INTO judged (entry, basis, score, bound, right, compared) VALUES (?, ?, ?, ?, ?, ?)"
        id = self._db.execute(query, (entry, basis, score, bound, right, compared)).lastrowid
        self._db.execute("DELETE FROM judged WHERE id <= ?", ((id or 0) - MAX_JUDGEMENTS,))

    def judgements(self, entry: int, basis: bytes) -> list[tuple[float, bool]]:
        """(score, right) of each judgement of an entry."""
        rows = self._db.execute("SELECT score, right FROM judged WHERE entry = ? AND basis = ?", (entry, basis))
        return [(score, bool(right)) for score, right in rows]

    def compared(self, basis: bytes, after: int) -> list[tuple[int, float, float, bool]]:
        """(id, score, bound, right) of the cache's own comparisons with ids above `after`, in order."""
        query = "SELECT id, score, bound, right FROM judged WHERE compared AND basis = ? AND id > ? ORDER BY id"
        return [(*row[:3], bool(row[3])) for row in self._db.execute(query, (basis, after))]

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM entries").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Atomic transaction that locks out other writers."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _aside(path: Path) -> Path:
    """Rename a damaged file and its log to an unused name in the same folder."""
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.damaged-{n}").exists())
    moved = path.with_name(f"{path.name}.damaged-{number}")
    path.replace(moved)
    for tail in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + tail).replace(moved.with_name(moved.name + tail))
    return moved


def _digest(*parts: bytes | str) -> bytes:
    """Hash of the parts with their lengths, so that different sequences of parts have different hashes."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def _plain(reply: Reply) -> dict[str, Any]:
    """A reply as JSON values, without tokens and usage; `accepted` is implied, because only such answers are stored."""
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "signals": dict(reply.signals),
        "decisions": [asdict(decision) for decision in reply.decisions],
        "tier": reply.tier,
        "route": reply.route,
        "p_correct": reply.p_correct,
    }


def _reply(value: dict[str, Any]) -> Reply:
    decisions = tuple(Decision(**decision) for decision in value["decisions"])
    return Reply(tokens=(), usage=Usage(), accepted=True, **(value | {"decisions": decisions}))

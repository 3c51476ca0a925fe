"""The file learned.json: the active correction, the candidate, and their history; shared by threads and processes."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi.confidence.recalibration import Correction
from cogumi.core.errors import StateError
from cogumi.core.files import write_json

FILE = "learned.json"
LOCK = "learned.lock"
HISTORY = 200  # events kept


class Learned(BaseModel):
    """Content of learned.json. Times are in seconds since 1970; `tests` counts the certification tests so far."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal[1] = 1
    layer: Correction | None = None
    promoted: float = 0.0
    canary: Correction | None = None
    started: float = 0.0
    fitted: float = 0.0
    since: float = 0.0
    tests: int = Field(0, ge=0)
    history: tuple[dict[str, Any], ...] = ()

    def with_event(self, event: str, changes: Mapping[str, Any], **figures: float | bool) -> Learned:
        """A copy with `changes` and one more event in its history."""
        entry = {"at": time.time(), "event": event, **figures}
        return self.model_copy(update={**changes, "history": (*self.history, entry)[-HISTORY:]})


class LearnedFile:
    """`state` as last read or saved; without a file, the initial state.

    An unreadable file is renamed. Raises `StateError` if `folder` is not writable.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / FILE
        self.state = Learned()
        self._loaded = 0, 0  # modification time and inode of the file that `state` was read from
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sqlite3.connect(folder / LOCK).close()
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> StateError:
        return StateError(f"{self._folder} cannot store corrections ({error}); name a folder that can be written")

    def refresh(self) -> bool:
        """Read the file if another process has changed it; returns whether it has."""
        try:
            stat = self._path.stat()
            found = stat.st_mtime_ns, stat.st_ino
        except OSError:
            found = 0, 0
        if found == self._loaded:
            return False
        self._loaded = found
        try:
            self.state = Learned.model_validate_json(self._path.read_bytes()) if found[1] else Learned()
        except (OSError, ValidationError) as error:
            aside = self._path.with_name(FILE + ".unreadable")
            with suppress(OSError):
                self._path.replace(aside)
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            warnings.warn(
                f"{self._path} cannot be read ({reason}); renamed to {aside.name}, learning starts again", stacklevel=2
            )
            self.state = Learned()
        return True

    def save(self, state: Learned) -> None:
        """Save a state; if the file cannot be written, keep it in this process only."""
        self.state = state
        try:
            write_json(self._path, state.model_dump(mode="json"))
            stat = self._path.stat()
            self._loaded = stat.st_mtime_ns, stat.st_ino
        except OSError as error:
            warnings.warn(
                f"{self._path} cannot be written ({error}); learned corrections are lost at exit", stacklevel=2
            )

    @contextmanager
    def exclusive_lock(self) -> Iterator[bool]:
        """Try to take the exclusive lock on learning; yields whether it succeeded. It ends with the process."""
        try:
            lock = sqlite3.connect(self._folder / LOCK, timeout=0.0, isolation_level=None)
        except sqlite3.Error as error:
            raise self._unwritable(error) from error
        with closing(lock):
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error:
                yield False
            else:
                yield True

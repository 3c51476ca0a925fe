"""API keys of a server: random, kept as SHA-256 in a file that only its owner can read (SPEC G6)."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi.core.errors import CogumiError
from cogumi.core.files import exclusive_lock, write_json

NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
SHOWN = 8
"""Characters of a key that lists show."""
Limit = Annotated[int, Field(ge=1)] | None


class Key(BaseModel):
    """A key without its secret; `requests` and `tokens` are allowed per minute (None: any number)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    prefix: str
    sha256: str
    created: str
    requests: Limit = None
    tokens: Limit = None


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keys: list[Key]


class KeyFile:
    """A file of keys. It is read again when it changes, so that a new or revoked key takes effect at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def listed(self) -> list[Key]:
        """All keys. Raises `CogumiError` if the file is missing or damaged."""
        try:
            found = self.path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                contents = _Contents.model_validate_json(self.path.read_bytes())
                self._keys = {key.sha256: key for key in contents.keys}
                self._seen = seen
        except FileNotFoundError as error:
            raise CogumiError(
                f"there is no key file {self.path}; make one: cogumi keys add NAME --keys FILE"
            ) from error
        except (OSError, ValidationError) as error:
            raise CogumiError(f"the key file {self.path} cannot be read: {_reason(error)}") from error
        return list(self._keys.values())

    def find(self, secret: str) -> Key | None:
        """The key with this secret. Raises `CogumiError` as `listed` does."""
        self.listed()
        return self._keys.get(_digest(secret))

    def add(self, name: str, requests: int | None = None, tokens: int | None = None) -> str:
        """Add a key and return its secret, which is not stored. Raises `CogumiError` for an invalid or used name."""
        if not NAME.fullmatch(name):
            raise CogumiError(f"{name!r} is not a name of a key; use 1 to 40 letters, digits, - and _")
        secret = f"cogumi-{secrets.token_urlsafe(32)}"
        with self._locked():
            keys = self.listed() if self.path.exists() else []
            if any(key.name == name for key in keys):
                raise CogumiError(f"there is a key {name!r} already; revoke it first, or choose another name")
            created = datetime.now(UTC).isoformat(timespec="seconds")
            prefix = secret[: len("cogumi-") + SHOWN]
            key = Key(
                name=name, prefix=prefix, sha256=_digest(secret), created=created, requests=requests, tokens=tokens
            )
            self._write([*keys, key])
        return secret

    def revoke(self, name: str) -> None:
        """Remove a key; running requests of it go on. Raises `CogumiError` if there is none of that name."""
        with self._locked():
            keys = self.listed()
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                names = ", ".join(key.name for key in keys) or "none"
                raise CogumiError(f"there is no key {name!r}; there are: {names}")
            self._write(left)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process changes keys in a folder at a time."""
        folder = self.path.absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive_lock(folder):
                yield
        except BlockingIOError as error:
            raise CogumiError(f"another process changes {self.path} now; try again") from error

    def _write(self, keys: list[Key]) -> None:
        write_json(self.path, {"keys": [key.model_dump() for key in keys]})
        self.path.chmod(0o600)


def _digest(secret: str) -> str:
    """Hash of a key. Keys have 256 random bits, so that no slow hash is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")

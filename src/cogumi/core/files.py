"""Files that are whole or absent: atomic writes, checksums, locks, and versioned indexes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cogumi.core.errors import BundleError

M = TypeVar("M", bound=BaseModel)


class FileEntry(BaseModel):
    """Size and SHA-256 (hexadecimal) of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


def plain(value: Any) -> Any:
    """The JSON form of a value: paths as text, arrays as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; arrays become lists, and what is not finite null."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Lock an existing file or folder for this process; yields the lock's descriptor.

    The lock ends with the process, however that ends, or with the last process that inherits the descriptor.
    Raises `BlockingIOError` if another process holds the lock.
    """
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    finally:
        os.close(lock)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and hash of each named file of a folder, in sorted order."""
    return {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=sha256(folder / name)) for name in sorted(names)
    }


def read_index(path: Path, model: type[M], version: int, what: str, absent: str, again: str) -> M:
    """What describes a shipped folder, if its `format` is `version`; `BundleError` for anything else.

    `what` it is a format of; what to say where it is `absent`, and how to have it `again`.
    """
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path.parent} {absent}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON; {again} again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != version:
        raise BundleError(
            f"{path.parent} has {what} format {found!r}, this cogumi reads {version}; upgrade cogumi, or {again} again"
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise BundleError(f"{path}: {where}: {problem['msg']}; {again} again") from error


def difference(folder: Path, files: Mapping[str, FileEntry]) -> str | None:
    """Say where a folder differs from its list of files, or None; sizes are looked at before any content."""
    for name, entry in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry.bytes:
            return f"{name} has {size} bytes instead of {entry.bytes}"
    for name, entry in files.items():
        if sha256(folder / name) != entry.sha256:
            return f"{name} has changed (its SHA-256 is another)"
    return None

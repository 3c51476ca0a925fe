"""Atomic writes, checksums, file locks and versioned index files."""

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


def to_json_types(value: Any) -> Any:
    """Convert a value to JSON types: paths to text, arrays to lists, non-finite numbers to null."""
    if isinstance(value, Mapping):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):
        return to_json_types(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; converted by `to_json_types`."""
    write_text(path, json.dumps(to_json_types(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def exclusive_lock(path: Path) -> Iterator[int]:
    """Lock an existing file or folder for this process; yields the lock's descriptor.

    The system releases the lock when this process and all processes that inherited the descriptor have ended.
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


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and hash of each named file of a folder, in sorted order."""
    return {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=sha256(folder / name)) for name in sorted(names)
    }


def read_index(path: Path, model: type[M], version: int, kind: str, missing: str, recreate: str) -> M:
    """Read and validate the JSON index of a shipped folder whose `format` must be `version`; else `BundleError`.

    For error messages: `kind` of folder, the message if the index is `missing`, and how to `recreate` the folder.
    """
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path.parent} {missing}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON; {recreate} again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != version:
        raise BundleError(
            f"{path.parent} has {kind} format {found!r}, this cogumi reads {version}; "
            f"upgrade cogumi, or {recreate} again"
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise BundleError(f"{path}: {where}: {problem['msg']}; {recreate} again") from error


def difference(folder: Path, files: Mapping[str, FileEntry]) -> str | None:
    """The first difference between a folder and its list of files, or None; all sizes are checked before any hash."""
    for name, entry in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry.bytes:
            return f"{name} has {size} bytes instead of {entry.bytes}"
    for name, entry in files.items():
        if sha256(folder / name) != entry.sha256:
            return f"{name} has changed (its SHA-256 differs)"
    return None

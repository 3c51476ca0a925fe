"""A finished step on disk: a folder with a `manifest.json` that is written last, and atomically.

The manifest names every file with its size and SHA-256, so an artifact is whole or it does not count
(DESIGN, "Stage contract").
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cogumi.errors import ArtifactError, BundleError
from cogumi.stage import CHECKPOINT
from cogumi.types import Artifact

M = TypeVar("M", bound=BaseModel)

MANIFEST = "manifest.json"
PENDING = "pending.json"


class FileEntry(BaseModel):
    """Size and SHA-256 (hexadecimal) of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Everything there is to know about an artifact; `seconds` is what its last run took."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    kind: str
    fingerprint: str
    parents: dict[str, str]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    files: dict[str, FileEntry]


def _plain(value: Any) -> Any:
    """The JSON form of a value: paths as text, arrays as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
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
    write_text(path, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file or folder that is there for this process alone; the lock goes with the process, however it ends.

    Raises `BlockingIOError` if another process holds it.
    """
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
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


def file_names(folder: Path) -> list[str]:
    """Posix names of an artifact's own files, sorted: no manifest, no trace of a run under way."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(n.as_posix() for n in names if n.parts[0] not in (MANIFEST, PENDING, CHECKPOINT))


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


def finish(
    folder: Path,
    *,
    kind: str,
    fingerprint: str,
    parents: Mapping[str, str],
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any],
    seconds: float = 0.0,
) -> Artifact:
    """Hash every file of `folder` and write its manifest: from here on the artifact counts as done."""
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        parents=dict(parents),
        metrics=_plain(metrics),
        environment=_plain(environment),
        seconds=round(seconds, 3),
        files=entries(folder, file_names(folder)),
    )
    write_json(folder / MANIFEST, manifest.model_dump())
    return load(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder; `ArtifactError` if there is none or it cannot be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} is not a finished artifact (it has no {MANIFEST}); build it first") from None
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(map(str, reason["loc"])) or "the file"
        raise ArtifactError(f"{folder / MANIFEST} cannot be used ({where}: {reason['msg']}); build it again") from error


def load(folder: Path) -> Artifact:
    """Open a finished artifact by its manifest alone; its files are not read."""
    manifest = read_manifest(folder)
    return Artifact(manifest.kind, folder, manifest.fingerprint, manifest.parents, manifest.metrics)


def verify(folder: Path) -> Artifact:
    """Open a finished artifact and check size and SHA-256 of its files; `ArtifactError` names the bad one."""
    if problem := difference(folder, read_manifest(folder).files):
        raise ArtifactError(f"{folder}: {problem}; build it again")
    return load(folder)

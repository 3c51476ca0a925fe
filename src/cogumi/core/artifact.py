"""A finished step on disk: a folder with a `manifest.json` that is written last, and atomically.

The manifest lists every file with its size and SHA-256, so an incomplete artifact is detected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cogumi.core.errors import ArtifactError
from cogumi.core.files import FileEntry, difference, file_entries, to_json_types, write_json
from cogumi.core.stage import CHECKPOINT
from cogumi.core.types import Artifact

MANIFEST = "manifest.json"
PENDING = "pending.json"


class Manifest(BaseModel):
    """Content of `manifest.json`; `seconds` is the duration of the last run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    kind: str
    fingerprint: str
    parents: dict[str, str]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    files: dict[str, FileEntry]


def file_names(folder: Path) -> list[str]:
    """Sorted POSIX names of an artifact's files, without the manifest, the pending marker and checkpoints."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(n.as_posix() for n in names if n.parts[0] not in (MANIFEST, PENDING, CHECKPOINT))


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
    """Hash every file of `folder` and write its manifest, which marks the artifact as finished."""
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        parents=dict(parents),
        metrics=to_json_types(metrics),
        environment=to_json_types(environment),
        seconds=round(seconds, 3),
        files=file_entries(folder, file_names(folder)),
    )
    write_json(folder / MANIFEST, manifest.model_dump())
    return load(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder; `ArtifactError` if it is missing or invalid."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} is not a finished artifact (it has no {MANIFEST}); build it first") from None
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(map(str, reason["loc"])) or "the file"
        raise ArtifactError(f"{folder / MANIFEST} cannot be used ({where}: {reason['msg']}); build it again") from error


def load(folder: Path) -> Artifact:
    """Open a finished artifact by reading its manifest only."""
    manifest = read_manifest(folder)
    return Artifact(manifest.kind, folder, manifest.fingerprint, manifest.parents, manifest.metrics)


def verify(folder: Path) -> Artifact:
    """Open a finished artifact and check size and SHA-256 of its files; `ArtifactError` names the first bad file."""
    if problem := difference(folder, read_manifest(folder).files):
        raise ArtifactError(f"{folder}: {problem}; build it again")
    return load(folder)

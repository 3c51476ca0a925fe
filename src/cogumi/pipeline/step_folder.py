"""The folder of a step: kept if the step is finished, continued if it was interrupted, recreated otherwise.

While a step runs, its folder has a `pending.json` with its fingerprint. The manifest is written last and marks the step
as finished.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cogumi.core import artifact
from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_json
from cogumi.core.stage import CHECKPOINT


def prepare(folder: Path, fingerprint: str) -> tuple[bool, str]:
    """Prepare the folder of a step; returns (finished, reason for running again or continuing, else "")."""
    reason = ""
    if (folder / artifact.MANIFEST).exists():
        try:
            if artifact.load(folder).fingerprint == fingerprint:
                artifact.verify(folder)
                return True, ""
            reason = "the recipe or an input changed"
        except ArtifactError as error:
            reason = str(error)
    elif _pending(folder) == fingerprint:
        for path in folder.iterdir():
            if path.name not in (artifact.PENDING, CHECKPOINT):
                _remove(path)
        return False, "continues where it was interrupted"
    if folder.exists():
        (folder / artifact.PENDING).unlink(missing_ok=True)  # first: a partly deleted folder must not be continued
        _remove(folder)
    write_json(folder / artifact.PENDING, {"fingerprint": fingerprint})
    return False, reason


def clean(folder: Path) -> None:
    """Remove the files that only an unfinished step needs."""
    for name in (artifact.PENDING, CHECKPOINT):
        _remove(folder / name)


def _pending(folder: Path) -> str | None:
    try:
        value = json.loads((folder / artifact.PENDING).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value.get("fingerprint") if isinstance(value, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

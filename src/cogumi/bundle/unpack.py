"""Opening a bundle's files, packed or not: llama.cpp maps files into memory, so packed ones go to disk first (SPEC D6).

Files unpacked into the cache folder stay there, in a folder named by their content hash. Several processes may use it
at once: a file is unpacked and checked elsewhere, then renamed into place; a damaged file is unpacked again. Partial
files of killed processes are never used, and removed later.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from cogumi.bundle.format import CALIBRATION, EMBEDDER, FEWSHOT, INDEX, MODIFIERS, VOCABULARY, open_bundle
from cogumi.bundle.packed import Archive, Progress, check_disk_space, errors_name, is_packed, no_progress
from cogumi.core.environment import cache_folder
from cogumi.core.errors import BundleError
from cogumi.core.files import difference

UNPACK_MODES = ("cached", "eager", "lazy")
"""cached: once, into the cache folder; eager: every time, into a temporary folder that is removed at the end; lazy:
into the cache folder, but modifiers and the sentence encoder only at first use."""
INDEX_FILES = (INDEX, CALIBRATION)
"""BundleFiles needed to recognise and check a bundle; unpacked first."""
STALE_SECONDS = 3600.0
"""Age in seconds after which a partial file counts as abandoned."""


class BundleFiles:
    """The files of a bundle, packed or not; `bundle` holds their paths, which exist after `file`.

    `mode` is one of `UNPACK_MODES` (None: the first). Raises `BundleError` for an invalid bundle or too little disk
    space.
    """

    def __init__(self, folder: Path, mode: str | None = None, progress: Progress = no_progress) -> None:
        mode = mode or UNPACK_MODES[0]
        if mode not in UNPACK_MODES:
            raise BundleError(f"unknown unpack mode '{mode}'; choose one of {', '.join(UNPACK_MODES)}")
        self._unpacked = _Unpacked(folder, mode == "eager") if is_packed(folder) else None
        self.lazy = self._unpacked is not None and mode == "lazy"
        if self._unpacked is None:
            self.bundle = open_bundle(folder)
            return
        try:
            self._unpacked.get(INDEX_FILES)
            with errors_name(folder, self._unpacked.folder):
                self.bundle = open_bundle(self._unpacked.folder, verified=self._unpacked.archive.files)
            names = self._unpacked.archive.files
            self._unpacked.get([name for name in names if not (self.lazy and _can_wait(name))], progress)
        except BaseException:
            self.close()
            raise

    def file(self, path: Path) -> Path:
        """The same path of the bundle, unpacked if necessary."""
        if self._unpacked is not None:
            self._unpacked.get([path.relative_to(self._unpacked.folder).as_posix()])
        return path

    def close(self) -> None:
        """Remove temporarily unpacked files; they must not be in use any more."""
        if self._unpacked is not None:
            self._unpacked.close()


class _Unpacked:
    """The files of an archive, each unpacked on request. Thread-safe."""

    def __init__(self, folder: Path, temporary: bool) -> None:
        self.archive, self._ready, self._lock = Archive(folder), set[str](), threading.Lock()
        if missing := [name for name in INDEX_FILES if name not in self.archive.files]:
            raise BundleError(
                f"{folder} is not a packed bundle (no {missing[0]}); look at it with: cogumi inspect {folder}"
            )
        kept = cache_folder() / "unpacked" / self.archive.fingerprint
        self._root, self._temporary = Path(mkdtemp(prefix="cogumi-")) if temporary else kept, temporary
        self.folder, self._parts = self._root / "files", self._root / "parts"
        try:
            for folder_to_make in (self.folder, self._parts):
                folder_to_make.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self._parts)
        except OSError as error:
            raise BundleError(
                f"cannot unpack to {self._root} ({error.strerror}); set COGUMI_CACHE to a folder"
            ) from error

    def get(self, names: Sequence[str], progress: Progress = no_progress) -> None:
        """Unpack and check those of the named files that are not in place yet."""
        with self._lock:
            files = {name: self.archive.files[name] for name in names if name not in self._ready}
            lacking = [name for name, entry in files.items() if difference(self.folder, {name: entry})]
            total, done = sum(files[name].bytes for name in lacking), 0
            check_disk_space(self._root, total)

            def count_bytes(count: int) -> None:
                nonlocal done
                done += count
                progress(done, total)

            for name in lacking:
                part, target = self._parts / uuid.uuid4().hex, self.folder / name
                self.archive.extract(name, part, count_bytes)
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
                stamp = self.archive.packed(name).stat().st_mtime_ns  # measurements are stored under this time
                os.utime(target, ns=(stamp, stamp))
            self._ready.update(names)

    def close(self) -> None:
        """Remove the files if they are temporary."""
        if self._temporary:
            shutil.rmtree(self._root, ignore_errors=True)


def _can_wait(name: str) -> bool:
    """Whether this file is not needed for the first answer."""
    return name.startswith(MODIFIERS) or name in (FEWSHOT, EMBEDDER, VOCABULARY)


def _remove_abandoned(parts: Path) -> None:
    """Remove abandoned partial files; another process may do the same at this time."""
    for part in parts.iterdir():
        try:
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
        except FileNotFoundError:
            continue

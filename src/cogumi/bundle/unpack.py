"""A bundle's files where they can be opened: llama.cpp maps them into memory, so what is packed goes to disk (SPEC D6).

What is unpacked into the cache folder stays there, under a name that only the same bytes can have. Several processes
may use it at once: a file comes into its place whole and checked, by one rename, and again if it was damaged since.
What a killed process left half done is never used, and swept away by a later one.
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
from cogumi.bundle.packed import Archive, Progress, check_room, is_packed, named, quiet
from cogumi.core.environment import cache_folder
from cogumi.core.errors import BundleError
from cogumi.core.files import difference

WAYS = ("cached", "eager", "lazy")
"""Once, into the cache folder; every time, into a temporary folder that is removed at the end; or into the cache
folder, but modifiers and the encoder of sentences only when they are first used."""
FIRST = (INDEX, CALIBRATION)
"""Files that say whether this is a bundle, and what belongs together."""
STALE = 3600.0
"""Seconds after which a file that is half unpacked is nobody's any more."""


class Files:
    """The files of a bundle, packed or not; `bundle` says where they lie, or will.

    `way` is one of `WAYS`, the first if none is named. Raises `BundleError` for what must not be opened or has no room.
    """

    def __init__(self, folder: Path, way: str | None = None, progress: Progress = quiet) -> None:
        way = way or WAYS[0]
        if way not in WAYS:
            raise BundleError(f"unknown way to unpack '{way}'; choose one of {', '.join(WAYS)}")
        self._unpacked = _Unpacked(folder, way == "eager") if is_packed(folder) else None
        self.lazy = self._unpacked is not None and way == "lazy"
        if self._unpacked is None:
            self.bundle = open_bundle(folder)
            return
        try:
            self._unpacked.get(FIRST)
            with named(self._unpacked.folder, folder):
                self.bundle = open_bundle(self._unpacked.folder, checked=self._unpacked.archive.files)
            names = self._unpacked.archive.files
            self._unpacked.get([name for name in names if not (self.lazy and _later(name))], progress)
        except BaseException:
            self.close()
            raise

    def file(self, path: Path) -> Path:
        """The same path of the bundle, there to be opened."""
        if self._unpacked is not None:
            self._unpacked.get([path.relative_to(self._unpacked.folder).as_posix()])
        return path

    def close(self) -> None:
        """Remove what was unpacked for this time only; nobody may use the files any more."""
        if self._unpacked is not None:
            self._unpacked.close()


class _Unpacked:
    """The files of an archive, each unpacked when asked for; several threads may ask."""

    def __init__(self, folder: Path, temporary: bool) -> None:
        self.archive, self._there, self._lock = Archive(folder), set[str](), threading.Lock()
        if missing := [name for name in FIRST if name not in self.archive.files]:
            raise BundleError(
                f"{folder} holds no {missing[0]}: it is no packed bundle; see what it is: cogumi inspect {folder}"
            )
        kept = cache_folder() / "unpacked" / self.archive.fingerprint
        self._root, self._temporary = Path(mkdtemp(prefix="cogumi-")) if temporary else kept, temporary
        self.folder, self._parts = self._root / "files", self._root / "parts"
        try:
            for place in (self.folder, self._parts):
                place.mkdir(parents=True, exist_ok=True)
            _sweep(self._parts)
        except OSError as error:
            raise BundleError(
                f"cannot unpack to {self._root} ({error.strerror}); set COGUMI_CACHE to a folder"
            ) from error

    def get(self, names: Sequence[str], progress: Progress = quiet) -> None:
        """Have these files in their places, whole and checked."""
        with self._lock:
            files = {name: self.archive.files[name] for name in names if name not in self._there}
            lacking = [name for name, entry in files.items() if difference(self.folder, {name: entry})]
            total, done = sum(files[name].bytes for name in lacking), 0
            check_room(self._root, total)

            def told(count: int) -> None:
                nonlocal done
                done += count
                progress(done, total)

            for name in lacking:
                part, target = self._parts / uuid.uuid4().hex, self.folder / name
                self.archive.extract(name, part, told)
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
                stamp = self.archive.packed(name).stat().st_mtime_ns  # what was measured of it before stays known
                os.utime(target, ns=(stamp, stamp))
            self._there.update(names)

    def close(self) -> None:
        """Remove the files if they were for this time only."""
        if self._temporary:
            shutil.rmtree(self._root, ignore_errors=True)


def _later(name: str) -> bool:
    """Whether a first answer can do without this file."""
    return name.startswith(MODIFIERS) or name in (FEWSHOT, EMBEDDER, VOCABULARY)


def _sweep(parts: Path) -> None:
    """Remove what was left half done long ago; another process may do the same just now."""
    for part in parts.iterdir():
        try:
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()
        except FileNotFoundError:
            continue

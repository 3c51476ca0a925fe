"""Archive of files, each compressed with zstd in independent frames, with checksums (SPEC D6).

    packed.json    format version; for each file its sizes, SHA-256 before and after packing, and frame lengths
    dictionary     zstd dictionary shared by frames, if it saves more than its own size
    <name>.zst     consecutive frames of `FRAME` bytes of the file; `zstd -d` reads it as well

Frames are independent, so several threads unpack one file. Frame headers are untrusted: the output of a frame must
match the size in packed.json, and no more memory than that is allocated.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import zstandard
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from cogumi.core.environment import usable_threads
from cogumi.core.errors import BundleError, CogumiError
from cogumi.core.files import FileEntry, exclusive_lock, read_index, sha256

FORMAT = 1
INDEX = "packed.json"
DICTIONARY = "dictionary"
SUFFIX = ".zst"
LEVEL = 10
"""Default zstd compression level, 1 to 22."""
FRAME = 1 << 20
"""Bytes of a file in one frame: it fits the processor's cache, and larger frames do not compress better."""
MAX_PENDING = 8
"""Frames processed at the same time."""
WRITE_BYTES = 64 << 10
"""Bytes per write: several times faster than a whole frame, which needs a contiguous buffer in the Linux kernel."""
MAX_DICTIONARY_BYTES = 128 << 10
_MAX_FRAME = FRAME + FRAME // 128 + 64
"""Maximum packed size of a frame; zstd adds less than this to incompressible data."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
"""Relative names only: not absolute, not hidden, no parent folders, on any operating system."""

CountBytes = Callable[[int], None]
"""Called with the number of bytes just processed."""
Progress = Callable[[int, int], None]
"""Called with the number of processed bytes and the total."""
T = TypeVar("T")
R = TypeVar("R")


class PackedFile(BaseModel):
    """One file: `bytes` and `sha256` of its content and of its packed form, and the length of each frame."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: NonNegativeInt
    sha256: str
    packed_bytes: NonNegativeInt
    packed_sha256: str
    frames: list[Annotated[int, Field(gt=0, le=_MAX_FRAME)]]
    dictionary: bool


class Index(BaseModel):
    """The content of packed.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    dictionary: FileEntry | None
    files: dict[str, PackedFile] = Field(min_length=1)


def no_progress(done: int, total: int) -> None:
    """A `Progress` that reports nothing."""


def map_in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work(item)` for all items in order, computed by several threads up to `MAX_PENDING` items ahead."""
    with ThreadPoolExecutor(usable_threads()) as workers:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(workers.submit(work, item))
            if len(waiting) > MAX_PENDING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def is_valid_name(name: str) -> bool:
    """Whether an archive may contain a file of this name: letters, digits, . _ - and / between them."""
    return _NAME.fullmatch(name) is not None


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed files."""
    return (folder / INDEX).is_file()


class Archive:
    """A packed folder, opened for reading; names, sizes and the dictionary are checked at opening, frames when read.

    Raises `BundleError` if a check fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = (
            folder,
            read_index(
                folder / INDEX,
                Index,
                FORMAT,
                "archive",
                f"is not packed: it has no {INDEX}; pack a bundle: cogumi pack",
                "copy or pack it",
            ),
        )
        root = folder.resolve()
        for name, file in self.index.files.items():
            if not is_valid_name(name) or not self.packed(name).resolve().is_relative_to(root):
                raise BundleError(f"{folder}: the path '{name}' leaves the folder; do not use this archive")
            if len(file.frames) != -(-file.bytes // FRAME) or sum(file.frames) != file.packed_bytes:
                raise BundleError(f"{folder / INDEX}: the frames of {name} do not add up; copy or pack it again")
            self._check_size(self.packed(name), file.packed_bytes)
        self._dictionary = self._read_dictionary()

    @property
    def files(self) -> dict[str, FileEntry]:
        """Unpacked files: name -> size and SHA-256."""
        return {name: FileEntry(bytes=file.bytes, sha256=file.sha256) for name, file in self.index.files.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of names and contents: archives of the same fingerprint hold the same files, byte for byte."""
        listed = "".join(f"{name} {file.sha256}\n" for name, file in sorted(self.index.files.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    def extract(self, name: str, target: Path, count_bytes: CountBytes = lambda count: None) -> None:
        """Unpack a file to a new path; if a check fails, no file is left there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("xb", buffering=0) as out:
                for content in self.read(name):
                    _write(out.fileno(), content)
                    count_bytes(len(content))
        except OSError as error:
            target.unlink(missing_ok=True)
            raise BundleError(
                f"cannot unpack {name} to {target} ({error.strerror}); free disk space, or use another disk"
            ) from error
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def extract_all(self, folder: Path, progress: Progress = no_progress) -> None:
        """Unpack every file into an empty folder and report progress."""
        total, done = sum(file.bytes for file in self.index.files.values()), 0
        check_disk_space(folder, total)

        def count_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for name in self.index.files:
            self.extract(name, folder / name, count_bytes)

    def read(self, name: str) -> Iterator[bytes]:
        """The content, a frame at a time; `BundleError`, at the latest after the last frame, if a checksum differs.

        Decompression, both checksums and the caller's work run concurrently.
        """
        file = self.index.files[name]
        before, after = hashlib.sha256(), hashlib.sha256()
        with self.packed(name).open("rb") as packed, ThreadPoolExecutor(2) as hashers:
            sizes = [FRAME] * (file.bytes // FRAME) + [file.bytes % FRAME]
            frames = ((packed.read(length), size) for length, size in zip(file.frames, sizes, strict=False))
            for frame, content in map_in_order(lambda pair: (pair[0], self._content(name, *pair)), frames):
                hashed = [hashers.submit(before.update, frame), hashers.submit(after.update, content)]
                yield content
                for task in hashed:
                    task.result()
        if before.hexdigest() != file.packed_sha256 or after.hexdigest() != file.sha256:
            raise self._damaged(name, "its SHA-256 differs")

    def packed(self, name: str) -> Path:
        """Path of a file's packed form."""
        return self.folder / (name + SUFFIX)

    def _content(self, name: str, frame: bytes, size: int) -> bytes:
        """The content of a frame, which must have `size` bytes."""
        dictionary = self._dictionary if self.index.files[name].dictionary else None
        try:
            if zstandard.frame_content_size(frame) != size:
                raise self._damaged(name, f"a frame does not contain {size} bytes")
            return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, reason: str) -> BundleError:
        return BundleError(f"{self.packed(name)} is damaged ({reason}); copy or pack it again")

    def _check_size(self, path: Path, expected: int) -> None:
        if not path.is_file():
            raise BundleError(f"{path} is missing; copy or pack it again")
        if (size := path.stat().st_size) != expected:
            raise BundleError(f"{path} has {size} bytes instead of {expected}; copy or pack it again")

    def _read_dictionary(self) -> Any:
        entry, path = self.index.dictionary, self.folder / DICTIONARY
        if entry is None:
            if used := [name for name, file in self.index.files.items() if file.dictionary]:
                raise BundleError(
                    f"{self.folder / INDEX}: {used[0]} needs a dictionary that is not listed; pack it again"
                )
            return None
        if entry.bytes > MAX_DICTIONARY_BYTES:
            raise BundleError(
                f"{path} is listed with {entry.bytes} bytes, but at most {MAX_DICTIONARY_BYTES} are read; pack it again"
            )
        self._check_size(path, entry.bytes)
        if sha256(path) != entry.sha256:
            raise BundleError(f"{path} has changed (its SHA-256 differs); copy or pack it again")
        return zstandard.ZstdCompressionDict(path.read_bytes(), dict_type=zstandard.DICT_TYPE_FULLDICT)


def _write(descriptor: int, content: bytes) -> None:
    """Write all bytes: on a nearly full disk `os.write` writes a part first and fails at the next call."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest[:WRITE_BYTES]) :]


def check_disk_space(folder: Path, needed: int) -> None:
    """Raise `BundleError` if the disk of a folder has fewer than `needed` bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise BundleError(f"unpacking to {folder} takes {needed:,} bytes, {free:,} are free; free disk space there")


@contextmanager
def errors_name(shown: Path, internal: Path) -> Iterator[None]:
    """Replace the `internal`, temporary path in error messages by the path `shown` to the user."""
    try:
        yield
    except CogumiError as error:
        raise type(error)(str(error).replace(str(internal), str(shown))) from error


@contextmanager
def staged(out: Path, source: Path) -> Iterator[Path]:
    """A new folder that is renamed to `out` on success; on failure it and the parent folders made for it are removed.

    Its name is always `<out>.part`, so that the next run replaces the rest of a killed run. Raises `BundleError` if
    `out` exists and is not empty, is being written by another run, lies in `source`, or cannot be written.
    """
    part = out.with_name(f"{out.name}.part")
    try:
        if out.resolve().is_relative_to(source.resolve()):
            raise BundleError(f"{out} lies in {source}; choose a path outside")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise BundleError(f"{out} already exists; choose another path, or remove it")
        missing = [folder for folder in part.parents if not folder.exists()]
        try:
            part.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(part), _renamed_when_done(part, out):
                yield part
        finally:
            for folder in missing:  # non-empty folders, which contain `out`, stay
                with suppress(OSError):
                    folder.rmdir()
    except BlockingIOError:
        raise BundleError(f"another run is writing {out}; wait for it, or choose another path") from None
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"cannot write {out} ({reason}); free disk space, or choose another path") from error


@contextmanager
def _renamed_when_done(part: Path, out: Path) -> Iterator[None]:
    """Empty the folder `part`, and rename it to `out` if the body succeeds."""
    try:
        for left in part.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with errors_name(out, part):
            yield
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)

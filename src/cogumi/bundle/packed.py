"""Files packed with zstd, each by itself and frame by frame, with a checksum of every byte (SPEC D6).

    packed.json    format version; of each file its sizes, its SHA-256 before and after, the length of each frame
    dictionary     what frames may refer to, where it saves more than it takes
    <name>.zst     the file in frames of `FRAME` bytes, one after the other; `zstd -d` reads it as well

Frames know nothing of each other, so several threads unpack one file. What a frame says of itself is not believed:
it must hold exactly as many bytes as packed.json says, and no more memory than that is ever given to it.
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
from cogumi.core.files import FileEntry, held, read_index, sha256

FORMAT = 1
INDEX = "packed.json"
DICTIONARY = "dictionary"
ENDING = ".zst"
LEVEL = 10
"""How hard zstd tries, 1 to 22, unless told otherwise."""
FRAME = 1 << 20
"""Bytes of a file in one frame: it stays in the processor's cache on its way, and larger ones are no smaller packed."""
AHEAD = 8
"""Frames that may be under way at a time."""
PIECE = 64 << 10
"""Bytes per write: several times faster than a frame at once, for which Linux would look for memory in one piece."""
DICTIONARY_BYTES = 128 << 10
_MOST = FRAME + FRAME // 128 + 64
"""Bytes that a frame may take; zstd adds less than this to what it cannot compress."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
"""Nothing that is absolute, hidden or climbs out of a folder on any system."""

Told = Callable[[int], None]
"""Is called with the number of bytes that were just done."""
Progress = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""
T = TypeVar("T")
R = TypeVar("R")


class PackedFile(BaseModel):
    """One file: `bytes` and `sha256` of its content, the same of its packed form, and the length of each frame."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: NonNegativeInt
    sha256: str
    packed_bytes: NonNegativeInt
    packed_sha256: str
    frames: list[Annotated[int, Field(gt=0, le=_MOST)]]
    dictionary: bool


class Index(BaseModel):
    """The content of packed.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    dictionary: FileEntry | None
    files: dict[str, PackedFile] = Field(min_length=1)


def quiet(done: int, total: int) -> None:
    """Tell nobody."""


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work(item)` of all items in their order, done by several threads a few items ahead."""
    with ThreadPoolExecutor(usable_threads()) as workers:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(workers.submit(work, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def may_be_named(name: str) -> bool:
    """Whether a file of an archive may have this name: letters, digits, . _ - and / between them."""
    return _NAME.fullmatch(name) is not None


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed files."""
    return (folder / INDEX).is_file()


class Archive:
    """A packed folder, opened for reading; everything but the frames themselves has been checked.

    Raises `BundleError` if it must not be used.
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
            if not may_be_named(name) or not self.packed(name).resolve().is_relative_to(root):
                raise BundleError(f"{folder}: the path '{name}' leaves the folder; do not use this archive")
            if len(file.frames) != -(-file.bytes // FRAME) or sum(file.frames) != file.packed_bytes:
                raise BundleError(f"{folder / INDEX}: the frames of {name} do not add up; copy or pack it again")
            self._check_size(self.packed(name), file.packed_bytes)
        self._dictionary = self._read_dictionary()

    @property
    def files(self) -> dict[str, FileEntry]:
        """What comes out: name -> size and SHA-256."""
        return {name: FileEntry(bytes=file.bytes, sha256=file.sha256) for name, file in self.index.files.items()}

    @property
    def fingerprint(self) -> str:
        """Archives of the same fingerprint hold the same files, byte for byte."""
        listed = "".join(f"{name} {file.sha256}\n" for name, file in sorted(self.index.files.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    def extract(self, name: str, target: Path, told: Told = lambda count: None) -> None:
        """Unpack a file to a path where there is none; it is whole and checked, or not there at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("xb", buffering=0) as out:
                for content in self.read(name):
                    _write(out.fileno(), content)
                    told(len(content))
        except OSError as error:
            target.unlink(missing_ok=True)
            raise BundleError(
                f"cannot unpack {name} to {target} ({error.strerror}); make room, or use another disk"
            ) from error
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def extract_all(self, folder: Path, progress: Progress = quiet) -> None:
        """Unpack every file into an empty folder, telling how many bytes of how many are done."""
        total, done = sum(file.bytes for file in self.index.files.values()), 0
        check_room(folder, total)

        def told(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for name in self.index.files:
            self.extract(name, folder / name, told)

    def read(self, name: str) -> Iterator[bytes]:
        """The content, a frame at a time; `BundleError`, after the last one at the latest, if it is not what it was.

        Decompression, both checksums and the caller's work on a frame go on at the same time.
        """
        file = self.index.files[name]
        before, after = hashlib.sha256(), hashlib.sha256()
        with self.packed(name).open("rb") as packed, ThreadPoolExecutor(2) as hashers:
            sizes = [FRAME] * (file.bytes // FRAME) + [file.bytes % FRAME]
            frames = ((packed.read(length), size) for length, size in zip(file.frames, sizes, strict=False))
            for frame, content in in_order(lambda pair: (pair[0], self._content(name, *pair)), frames):
                hashed = [hashers.submit(before.update, frame), hashers.submit(after.update, content)]
                yield content
                for one in hashed:
                    one.result()
        if before.hexdigest() != file.packed_sha256 or after.hexdigest() != file.sha256:
            raise self._damaged(name, "its SHA-256 is another")

    def packed(self, name: str) -> Path:
        """Where the packed form of a file lies."""
        return self.folder / (name + ENDING)

    def _content(self, name: str, frame: bytes, size: int) -> bytes:
        """What a frame holds, which must be `size` bytes."""
        dictionary = self._dictionary if self.index.files[name].dictionary else None
        try:
            if zstandard.frame_content_size(frame) != size:
                raise self._damaged(name, f"a frame does not hold {size} bytes")
            return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, why: str) -> BundleError:
        return BundleError(f"{self.packed(name)} is damaged ({why}); copy or pack it again")

    def _check_size(self, path: Path, wanted: int) -> None:
        if not path.is_file():
            raise BundleError(f"{path} is missing; copy or pack it again")
        if (size := path.stat().st_size) != wanted:
            raise BundleError(f"{path} has {size} bytes instead of {wanted}; copy or pack it again")

    def _read_dictionary(self) -> Any:
        entry, path = self.index.dictionary, self.folder / DICTIONARY
        if entry is None:
            if used := [name for name, file in self.index.files.items() if file.dictionary]:
                raise BundleError(
                    f"{self.folder / INDEX}: {used[0]} needs a dictionary that is not listed; pack it again"
                )
            return None
        if entry.bytes > DICTIONARY_BYTES:
            raise BundleError(f"{path} is listed with {entry.bytes} bytes, at most {DICTIONARY_BYTES} are read")
        self._check_size(path, entry.bytes)
        if sha256(path) != entry.sha256:
            raise BundleError(f"{path} has changed (its SHA-256 is another); copy or pack it again")
        return zstandard.ZstdCompressionDict(path.read_bytes(), dict_type=zstandard.DICT_TYPE_FULLDICT)


def _write(descriptor: int, content: bytes) -> None:
    """All of it: a disk that is nearly full takes a part first, and complains at the next."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest[:PIECE]) :]


def check_room(folder: Path, wanted: int) -> None:
    """Raise `BundleError` if the disk of a folder has less than so many bytes left."""
    if (free := shutil.disk_usage(folder).free) < wanted:
        raise BundleError(f"unpacking to {folder} takes {wanted:,} bytes, {free:,} are free; make room there")


@contextmanager
def named(path: Path, known: Path) -> Iterator[None]:
    """Have errors name the path that a user knows instead of one that is there for a while only."""
    try:
        yield
    except CogumiError as error:
        raise type(error)(str(error).replace(str(path), str(known))) from error


@contextmanager
def staged(out: Path, source: Path) -> Iterator[Path]:
    """A new folder that becomes `out` when all went well, and is removed otherwise, as are folders made above it.

    Its name is `<out>.part` whoever makes it, so that what a killed run left is replaced by the next. Raises
    `BundleError` if there is something at `out` already, or another run is at it, if it lies in the `source` of what is
    to be written, or if the disk does not take that.
    """
    part = out.with_name(f"{out.name}.part")
    try:
        if out.resolve().is_relative_to(source.resolve()):
            raise BundleError(f"{out} lies in {source}; name a place outside")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise BundleError(f"{out} is there already; name another place, or remove it")
        missing = [folder for folder in part.parents if not folder.exists()]
        try:
            part.mkdir(parents=True, exist_ok=True)
            with held(part), _filled(part, out):
                yield part
        finally:
            for folder in missing:  # those that hold `out` now stay
                with suppress(OSError):
                    folder.rmdir()
    except BlockingIOError:
        raise BundleError(f"another run is writing {out}; wait for it, or name another place") from None
    except OSError as error:
        why = error.strerror or error
        raise BundleError(f"cannot write {out} ({why}); make room, or name another place") from error


@contextmanager
def _filled(part: Path, out: Path) -> Iterator[None]:
    """Empty `part` for what is to be put there, which then becomes `out`."""
    try:
        for left in part.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with named(part, out):
            yield
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)

"""Where rows lie: a file, a folder, a pattern, a data set of the Hub; inside gzip, zstd, tar or zip (SPEC A1).

Everything is read as a stream and nothing is unpacked to disk.
"""

from __future__ import annotations

import glob
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from tarfile import EOFHeaderError, HeaderError  # type: ignore[attr-defined]
from typing import IO, Any, NamedTuple, Self, cast

import zstandard

from cogumi.core.errors import CogumiError, DataError
from cogumi.data.sources.hub import cached_files, is_hub_id

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".py")
"""Files of these names are read out of folders and archives; others in there are left out."""
_NO_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that the library `datasets` writes beside those with rows."""
_TEXTS = (".txt", ".md", ".py")
_PACKED = (".gz", ".zst", ".tgz", ".tar", ".zip")
_CHUNK = 1 << 16
_GZIP, _ZSTD, _ZIP, _TAR = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"ustar"


DAMAGED = (EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError, zipfile.BadZipFile)
"""What reading a damaged file raises, besides an `OSError` without a number."""


class Document(NamedTuple):
    """A file, or a member of an archive: its name, its place for messages, and its bytes. `problem`: it is refused."""

    name: str
    place: str
    stream: IO[bytes]
    problem: str = ""


def within(root: Path, path: Path) -> Path:
    """A path relative to a folder; an id of the Hub as it is."""
    return path if is_hub_id(path) else root / path


def problem_of_path(path: Path) -> str | None:
    """Why a path names nothing that could be read; None if it does."""
    if is_hub_id(path):
        try:
            cached_files(path)
        except CogumiError as error:
            return str(error)
    elif not path.exists() and not glob.glob(str(path), recursive=True):
        return f"there is no file {path}; put your own there"
    return None


def topic(path: Path) -> str:
    """What the rows of a path are about, as far as its name says: the file's or data set's name."""
    return path.parts[1] if is_hub_id(path) and len(path.parts) > 1 else path.name.split(".")[0]


def files_of(path: Path) -> list[Path]:
    """The file itself, the readable files of a folder, those of a pattern ("data/*.jsonl"), in order of names; or those
    of a data set ("hub:owner/name").

    In a folder with rows, texts are left out: they describe the rows. Raises `DataError` if there is no file.
    """
    if is_hub_id(path):
        return cached_files(path)
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and _readable(p.name)]
        if not found:
            raise DataError(f"{path} holds no file of these kinds: {', '.join((*SUFFIXES, *_PACKED))}")
        return [p for p in found if not p.name.casefold().endswith(_TEXTS)] or found
    if not path.exists() and glob.has_magic(str(path)):
        found = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not found:
            raise DataError(f"no file fits the pattern {path}: check it")
        return found
    return [path]


def _readable(name: str) -> bool:
    return not name.startswith(".") and name not in _NO_ROWS and name.casefold().endswith((*SUFFIXES, *_PACKED))


def documents(path: Path) -> Iterator[Document]:
    """The file's content, decompressed, or the readable members of an archive. Raises `OSError` and `DAMAGED`."""
    with open(path, "rb") as file:
        if file.read(4) == _ZIP:
            yield from _zip_members(path)
            return
        file.seek(0)
        name, stream = _decompressed(path.name, file)
        if stream.peek(512)[257:262] == _TAR:
            yield from _tar_members(path, stream)
        else:
            yield Document(name, path.name, stream)


def _decompressed(name: str, file: IO[bytes]) -> tuple[str, io.BufferedReader[Any]]:
    """A stream without its compression, and the name without its ending."""
    stream = io.BufferedReader(cast(io.RawIOBase, file))
    head = stream.peek(4)[:4]
    if head.startswith(_GZIP):
        return _without(name, (".gz", ".tgz")), io.BufferedReader(_Unpacked(stream, _gzip_member))
    if head.startswith(_ZSTD):
        return _without(name, (".zst",)), io.BufferedReader(_Unpacked(stream, _zstd_frame))
    return name, stream


def _gzip_member() -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor().decompressobj()


class _Unpacked(io.RawIOBase):
    """A compressed stream of one or more frames as a file. `new` makes what decompresses a frame.

    Unlike the libraries' readers it gives all bytes before a place where the stream is cut off, and raises `EOFError`
    there.
    """

    def __init__(self, source: IO[bytes], new: Callable[[], Any]) -> None:
        self._source, self._new, self._ready = source, new, memoryview(b"")
        self._frame = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data.lstrip(b"\0") if self._frame.eof else b""  # zeros may fill up a block
            packed = packed or self._source.read(_CHUNK)
            if not packed:
                if not self._frame.eof:
                    raise EOFError("the compressed stream is cut off")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(packed))
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _without(name: str, endings: tuple[str, ...]) -> str:
    return next((name[: -len(end)] for end in endings if name.casefold().endswith(end)), name)


class _Member(tarfile.TarInfo):
    """A member of an archive. Unlike the library's, a damaged header is an error, not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise EOFError(f"the archive ends without its end mark ({error})") from error


def _tar_members(path: Path, stream: IO[bytes]) -> Iterator[Document]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
        for member in archive:
            if not member.isfile() or not _readable(PurePosixPath(member.name).name):
                continue
            content = archive.extractfile(member)
            assert content is not None
            yield _member(path, member.name, content)


def _zip_members(path: Path) -> Iterator[Document]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _readable(PurePosixPath(member.filename).name):
                try:
                    content = archive.open(member)
                except RuntimeError as error:  # encrypted, or of an unknown compression
                    yield Document(member.filename, f"{path.name}/{member.filename}", io.BytesIO(), str(error))
                    continue
                with content:
                    yield _member(path, member.filename, content)


def _member(path: Path, name: str, content: IO[bytes]) -> Document:
    place, inside = f"{path.name}/{name}", PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        return Document(name, place, content, "the archive names a path outside of itself; this member is left out")
    plain, stream = _decompressed(inside.name, content)
    return Document(plain, place, stream)

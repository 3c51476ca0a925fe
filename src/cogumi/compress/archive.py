"""Stage `archive`: a bundle packed with zstd, without loss (SPEC D6); `cogumi pack` does the same.

Every file is compressed at level 10 both plainly and with a dictionary trained on all of them, and the smaller form
is kept; the dictionary itself counts, and goes where it does not pay. What was written is unpacked once, and
compared, before the index is written. Weights of 4 to 6 bits are close to random: they hardly get smaller.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import zstandard
from pydantic import BaseModel, ConfigDict, Field

from cogumi import bundle
from cogumi.archive import (
    DICTIONARY,
    DICTIONARY_BYTES,
    ENDING,
    FORMAT,
    FRAME,
    INDEX,
    Archive,
    Index,
    PackedFile,
    in_order,
)
from cogumi.artifact import entries, write_json
from cogumi.errors import BundleError
from cogumi.stage import Context
from cogumi.types import Artifact

VERSION = 1
KIND = "archive"

SAMPLE, SAMPLES = 4096, 3200
"""Bytes of a sample and their number: a dictionary wants about a hundred times its size to learn from."""
TRIAL = ".trial"
"""How the form with the dictionary ends until one of the two is chosen."""

Progress = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""


class Config(BaseModel):
    """`level`: how hard zstd tries, 1 to 22."""

    model_config = ConfigDict(extra="forbid")
    level: int = Field(10, ge=1, le=22)


def pack(
    folder: Path, names: Iterable[str], out: Path, level: int, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Pack the named files of a folder into the empty folder `out` and return the figures.

    `{bytes, packed_bytes, ratio, dictionary_bytes, files: {name: {bytes, packed_bytes, ratio, plain_bytes,
    with_dictionary_bytes, dictionary}}}`; `packed_bytes` in all counts the dictionary. Equal files give equal bytes.
    """
    names = sorted(names)
    total, done = 3 * sum((folder / name).stat().st_size for name in names), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    plain = {name: _packed(folder / name, out / (name + ENDING), level, None, told) for name in names}
    dictionary = _train([folder / name for name in names], level)
    trials: dict[str, PackedFile] = {}
    if dictionary is not None:
        trials = {name: _packed(folder / name, out / (name + TRIAL), level, dictionary, told) for name in names}
    better = {name: file for name, file in trials.items() if file.packed_bytes < plain[name].packed_bytes}
    saved = sum(plain[name].packed_bytes - file.packed_bytes for name, file in better.items())
    if dictionary is None or saved <= len(dictionary.as_bytes()):
        better = {}
    else:
        (out / DICTIONARY).write_bytes(dictionary.as_bytes())
    for name in trials:
        if name in better:
            (out / (name + TRIAL)).replace(out / (name + ENDING))
        else:
            (out / (name + TRIAL)).unlink()
    _finish(out, plain | better, told)
    return _figures(Archive(out), plain, trials)


def _train(paths: Iterable[Path], level: int) -> Any:
    """A dictionary learned from samples that lie evenly over all files; None if that is too little to learn from."""
    sizes = {path: path.stat().st_size for path in paths}
    stride, at = max(sum(sizes.values()) // SAMPLES, SAMPLE), 0
    samples: list[bytes | bytearray | memoryview[int]] = []
    for path, size in sizes.items():
        with path.open("rb") as file:
            while at < size:
                file.seek(at)
                samples.append(file.read(SAMPLE))
                at += stride
        at -= size
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, samples, level=level)
    except zstandard.ZstdError:
        return None


def _finish(out: Path, files: Mapping[str, PackedFile], told: Callable[[int], None]) -> None:
    """Write the index, and take it back if what it describes does not unpack to the same bytes."""
    dictionary = entries(out, [DICTIONARY])[DICTIONARY] if (out / DICTIONARY).is_file() else None
    write_json(out / INDEX, Index(format=FORMAT, dictionary=dictionary, files=dict(files)).model_dump())
    try:
        archive = Archive(out)
        for name in files:
            for content in archive.read(name):
                told(len(content))
    except BundleError:
        (out / INDEX).unlink()
        raise


def _figures(archive: Archive, plain: Mapping[str, PackedFile], trials: Mapping[str, PackedFile]) -> dict[str, Any]:
    """What it came to."""
    index = archive.index
    rows = {
        name: {
            "bytes": file.bytes,
            "packed_bytes": file.packed_bytes,
            "ratio": ratio(file.bytes, file.packed_bytes),
            "plain_bytes": plain[name].packed_bytes,
            "with_dictionary_bytes": trials[name].packed_bytes if name in trials else None,
            "dictionary": file.dictionary,
        }
        for name, file in index.files.items()
    }
    whole = sum(file.bytes for file in index.files.values())
    dictionary = index.dictionary.bytes if index.dictionary else 0
    packed = sum(file.packed_bytes for file in index.files.values()) + dictionary
    figures = {"bytes": whole, "packed_bytes": packed, "ratio": ratio(whole, packed), "dictionary_bytes": dictionary}
    return figures | {"files": rows}


def ratio(before: int, after: int) -> float:
    """How many times smaller it has become."""
    return round(before / after, 4) if after else 1.0


def _packed(source: Path, target: Path, level: int, dictionary: Any, told: Callable[[int], None]) -> PackedFile:
    """Write a file as frames; several threads compress them, and the result is the same for any number of threads."""
    target.parent.mkdir(parents=True, exist_ok=True)
    before, after, size = hashlib.sha256(), hashlib.sha256(), 0
    lengths = []

    def frame(content: bytes) -> tuple[bytes, bytes]:
        return content, zstandard.ZstdCompressor(level=level, dict_data=dictionary).compress(content)

    with source.open("rb") as read, target.open("wb") as write:
        for content, packed in in_order(frame, iter(lambda: read.read(FRAME), b"")):
            before.update(content)
            after.update(packed)
            write.write(packed)
            lengths.append(len(packed))
            size += len(content)
            told(len(content))
    return PackedFile(
        bytes=size,
        sha256=before.hexdigest(),
        packed_bytes=sum(lengths),
        packed_sha256=after.hexdigest(),
        frames=lengths,
        dictionary=dictionary is not None,
    )


def pack_bundle(
    folder: Path, out: Path, config: Config, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Verify a bundle and pack it into the empty folder `out`; returns the figures of `pack`."""
    bundle.open_bundle(folder)
    index = json.loads((folder / bundle.INDEX).read_bytes())
    return pack(folder, [*index["files"], bundle.INDEX], out, config.level, progress)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Bundle -> the same packed; metrics are the figures of `pack`."""
    return pack_bundle(inputs["bundle"].path, out, config, lambda done, total: context.progress(done, total, {}))

"""Stage `archive`: a bundle compressed losslessly with zstd (SPEC D6); `cogumi pack` does the same.

Every file is compressed both without and with a dictionary trained on all files, and the smaller form is kept. The
dictionary is kept only if it saves more than its own size. The output is unpacked and verified once. Weights of 4 to 6
bits are close to random and hardly compress.

A model folder (input `model`) can be packed too, for storage. With `sparse`, its safetensors files are also tried in
sparse form, which is smaller for pruned weights (`sparse.py`).

The `manifest.json` of a build is not packed: it describes paths and machine of that build, and the packed folder has
its own checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import zstandard
from pydantic import BaseModel, ConfigDict, Field

from cogumi.bundle.format import INDEX as BUNDLE_INDEX
from cogumi.bundle.format import open_bundle, standalone_index
from cogumi.bundle.packed import (
    DICTIONARY,
    FORMAT,
    FRAME,
    INDEX,
    LEVEL,
    MAX_DICTIONARY_BYTES,
    SUFFIX,
    Archive,
    CountBytes,
    Index,
    PackedFile,
    Progress,
    errors_name,
    is_valid_name,
    map_in_order,
    no_progress,
    staged,
)
from cogumi.compress.pack import sparse
from cogumi.core.artifact import file_names
from cogumi.core.errors import BundleError
from cogumi.core.files import file_entries, write_json
from cogumi.core.stage import Context
from cogumi.core.types import Artifact

VERSION = 1
KIND = "archive"
INPUTS: dict[str, str] = {}
OPTIONAL = {"bundle": "bundle", "model": "model"}

SAMPLE, SAMPLES = 4096, 3200
"""Bytes per sample and number of samples: a dictionary needs about a hundred times its size as training data."""
SEGMENT = 1024
"""Segment size (k) for dictionary training; searching for the best value took six times as long without gain."""
TENSORS = ".safetensors"
TRIAL = ".trial"
"""Suffix of the form with the dictionary until one of the two is chosen."""


class Config(BaseModel):
    """`level`: zstd compression level, 1 to 22. `sparse`: also try safetensors files in sparse form."""

    model_config = ConfigDict(extra="forbid")
    level: int = Field(LEVEL, ge=1, le=22)
    sparse: bool = False


def pack(
    folder: Path,
    names: Iterable[str],
    out: Path,
    config: Config,
    progress: Progress = no_progress,
    replaced: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Any]:
    """Pack the named files of a folder into the empty folder `out` and return the figures.

    `replaced` gives other files for some of the names.

    `{bytes, packed_bytes, ratio, dictionary_bytes, files: {name: {bytes, packed_bytes, ratio, plain_bytes,
    with_dictionary_bytes, dictionary}}}`; the total `packed_bytes` includes the dictionary. With `sparse` also
    `sparse: {name: {bytes, sparse_bytes, zeros, kinds, packed_bytes, zstd_alone_bytes}}`; `files` then lists the
    smaller form, under its own name or as `<name>.sparse`, whose `bytes` are those of the dense file. Equal files give
    equal bytes. `BundleError` for a file name that cannot be packed.
    """
    sources = {name: replaced.get(name, folder / name) for name in sorted(names)}
    if refused := [name for name in sources if not is_valid_name(name)]:
        raise BundleError(f"{folder / refused[0]} cannot be packed under that name; rename it or move it elsewhere")
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    tensors = sum(size for name, size in sizes.items() if config.sparse and name.endswith(TENSORS))
    total, done = 3 * sum(sizes.values()) + 2 * tensors, 0

    def count_bytes(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        progress(done, total)

    with TemporaryDirectory(dir=out) as scratch:
        plain = {
            name: _packed(path, out / (name + SUFFIX), config.level, None, count_bytes)
            for name, path in sources.items()
        }
        tried = _sparse(sources, sizes, plain, Path(scratch), out, config.level, count_bytes) if config.sparse else {}
        trials = _with_dictionary(sources, plain, out, config.level, count_bytes)
    files = _choose(plain, trials, out)
    _finish(out, files, count_bytes)
    progress(total, total)
    return _figures(Archive(out), sizes, plain, trials) | tried


def _sparse(
    sources: dict[str, Path],
    sizes: dict[str, int],
    plain: dict[str, PackedFile],
    scratch: Path,
    out: Path,
    level: int,
    count_bytes: CountBytes,
) -> dict[str, Any]:
    """Replace each safetensors file by its sparse form if that is smaller when packed.

    Advances the progress by twice the size of each file: once for the encoding, once for the compression.
    """
    tried: dict[str, Any] = {}
    for name in [name for name in sources if name.endswith(TENSORS)]:
        other = name + sparse.SUFFIX
        figures = sparse.encode_file(sources[name], scratch / "sparse", count_bytes)
        path = (scratch / "sparse").rename(scratch / str(len(tried)))
        packed = _packed(path, out / (other + SUFFIX), level, None, count_bytes)
        count_bytes(max(sizes[name] - packed.bytes, 0))
        tried[name] = figures | {"packed_bytes": packed.packed_bytes, "zstd_alone_bytes": plain[name].packed_bytes}
        loser = name if packed.packed_bytes < plain[name].packed_bytes else other
        (out / (loser + SUFFIX)).unlink()
        if loser == name:
            del sources[name], plain[name]
            sources[other], sizes[other], plain[other] = path, sizes.pop(name), packed
    return {"sparse": tried}


def _with_dictionary(
    sources: Mapping[str, Path], plain: Mapping[str, PackedFile], out: Path, level: int, count_bytes: CountBytes
) -> dict[str, PackedFile]:
    """Write every file packed with a dictionary beside its plain form; empty if no dictionary can be trained."""
    dictionary = _train(sources.values(), level)
    if dictionary is None:
        return {}
    (out / DICTIONARY).write_bytes(dictionary.as_bytes())
    return {name: _packed(path, out / (name + TRIAL), level, dictionary, count_bytes) for name, path in sources.items()}


def _choose(plain: Mapping[str, PackedFile], trials: Mapping[str, PackedFile], out: Path) -> dict[str, PackedFile]:
    """The smaller form of each file; the plain form of all files if the dictionary does not save its own size."""
    better = {name: file for name, file in trials.items() if file.packed_bytes < plain[name].packed_bytes}
    saved = sum(plain[name].packed_bytes - file.packed_bytes for name, file in better.items())
    if trials and saved <= (out / DICTIONARY).stat().st_size:
        (out / DICTIONARY).unlink()
        better = {}
    for name in trials:
        if name in better:
            (out / (name + TRIAL)).replace(out / (name + SUFFIX))
        else:
            (out / (name + TRIAL)).unlink()
    return dict(sorted((dict(plain) | better).items()))


def _train(paths: Iterable[Path], level: int) -> Any:
    """A dictionary trained on samples spread evenly over all files; None if there is too little data."""
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
        return zstandard.train_dictionary(MAX_DICTIONARY_BYTES, samples, k=SEGMENT, d=8, level=level)
    except zstandard.ZstdError:
        return None


def _finish(out: Path, files: Mapping[str, PackedFile], count_bytes: CountBytes) -> None:
    """Write the index and unpack every file as a check; if that fails, delete the index and raise `BundleError`."""
    dictionary = file_entries(out, [DICTIONARY])[DICTIONARY] if (out / DICTIONARY).is_file() else None
    write_json(out / INDEX, Index(format=FORMAT, dictionary=dictionary, files=dict(files)).model_dump())
    try:
        archive = Archive(out)
        for name in files:
            for content in archive.read(name):
                count_bytes(len(content))
    except BundleError:
        (out / INDEX).unlink()
        raise


def _figures(
    archive: Archive, sizes: Mapping[str, int], plain: Mapping[str, PackedFile], trials: Mapping[str, PackedFile]
) -> dict[str, Any]:
    """The figures that `pack` returns; `sizes` are those of the original files."""
    index = archive.index
    rows = {
        name: {
            "bytes": sizes[name],
            "packed_bytes": file.packed_bytes,
            "ratio": ratio(sizes[name], file.packed_bytes),
            "plain_bytes": plain[name].packed_bytes,
            "with_dictionary_bytes": trials[name].packed_bytes if name in trials else None,
            "dictionary": file.dictionary,
        }
        for name, file in index.files.items()
    }
    whole = sum(sizes.values())
    dictionary = index.dictionary.bytes if index.dictionary else 0
    packed = sum(file.packed_bytes for file in index.files.values()) + dictionary
    figures = {"bytes": whole, "packed_bytes": packed, "ratio": ratio(whole, packed), "dictionary_bytes": dictionary}
    return figures | {"files": rows}


def ratio(before: int, after: int) -> float:
    """Size before over size after; 1 for an empty output."""
    return round(before / after, 4) if after else 1.0


def _packed(source: Path, target: Path, level: int, dictionary: Any, count_bytes: CountBytes) -> PackedFile:
    """Compress a file frame by frame on several threads; the result does not depend on their number."""
    target.parent.mkdir(parents=True, exist_ok=True)
    before, after, size = hashlib.sha256(), hashlib.sha256(), 0
    lengths = []

    def frame(content: bytes) -> tuple[bytes, bytes]:
        return content, zstandard.ZstdCompressor(level=level, dict_data=dictionary).compress(content)

    with source.open("rb") as read, target.open("wb") as write:
        for content, packed in map_in_order(frame, iter(lambda: read.read(FRAME), b"")):
            before.update(content)
            after.update(packed)
            write.write(packed)
            lengths.append(len(packed))
            size += len(content)
            count_bytes(len(content))
    return PackedFile(
        bytes=size,
        sha256=before.hexdigest(),
        packed_bytes=sum(lengths),
        packed_sha256=after.hexdigest(),
        frames=lengths,
        dictionary=dictionary is not None,
    )


def pack_folder(folder: Path, out: Path, config: Config, progress: Progress = no_progress) -> dict[str, Any]:
    """Pack a bundle, which is verified first, or a model folder into the empty folder `out`; figures as from `pack`.

    Raises `BundleError` for a folder that is neither, and `DataError` for a safetensors file that is damaged.
    """
    if (folder / BUNDLE_INDEX).is_file():
        open_bundle(folder)
        index = standalone_index(folder)
        with TemporaryDirectory(dir=out) as scratch:
            alone = Path(scratch) / BUNDLE_INDEX
            write_json(alone, index)
            return pack(folder, [*index["files"], BUNDLE_INDEX], out, config, progress, {BUNDLE_INDEX: alone})
    return pack(folder, _model_files(folder), out, config, progress)


def _model_files(folder: Path) -> list[str]:
    """The files of a model folder; links and safetensors files of the wrong length raise an error."""
    if links := sorted(path for path in folder.rglob("*") if path.is_symlink()):
        raise BundleError(f"{links[0]} is a link, which may lead out of the folder; put the file itself there")
    names = file_names(folder) if folder.is_dir() else []
    models = [name for name in names if name.endswith(TENSORS)]
    if not models:
        raise BundleError(f"{folder} is neither a bundle nor a model's folder; name one such as runs/smollm2/bundle")
    for name in models:
        sparse.check_file(folder / name)
    return names


def unpack(folder: Path, out: Path, progress: Progress = no_progress) -> int:
    """Unpack an archive into the new folder `out`, all files or none; returns the number of bytes written."""
    archive = Archive(folder)
    with staged(out, folder) as part:
        archive.extract_all(part, progress)
        for name in archive.files:
            if name.endswith(TENSORS + sparse.SUFFIX):
                with errors_name(archive.packed(name), part / name):
                    sparse.expand_file(part / name, part / name.removesuffix(sparse.SUFFIX))
                (part / name).unlink()
        return sum((part / name).stat().st_size for name in file_names(part))


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """A bundle or a model folder."""
    return {} if "model" in roles else {"bundle": OPTIONAL["bundle"]}


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`bundle` or `model` -> the packed folder; metrics are the figures of `pack`."""
    source = inputs["model"] if "model" in inputs else inputs["bundle"]
    return pack_folder(source.path, out, config, lambda done, total: context.progress(done, total, {}))

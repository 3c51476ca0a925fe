"""Sparse storage of safetensors files of pruned models (SPEC D9); off by default.

An element is zero if all its bits are zero. -0.0 and NaN count as values, so that every type and the whole file are
restored bit for bit. A tensor is stored as its nonzero values and their positions: either a bit mask or the lengths of
alternating runs of zeros and values, whichever is shorter; or dense, if that is shorter than both. The result is itself
a safetensors file.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cogumi.bundle.packed import CountBytes, check_disk_space
from cogumi.core.errors import ArtifactError, DataError
from cogumi.core.files import sha256

FORMAT = 1
KEY = "sparse"
"""Key of the file's metadata under which the format is described."""
SUFFIX = ".sparse"
WIDTHS = (1, 2, 4)
"""Widths in bytes of a run length; a longer run is split by runs of length 0."""

Bytes = NDArray[np.uint8]
Kind = Literal["dense", "mask", "runs1", "runs2", "runs4"]


@dataclass(frozen=True, slots=True)
class Sparse:
    """One tensor: its values and, unless it is `dense`, their positions (`where`)."""

    kind: Kind
    values: Bytes
    where: Bytes


def encode(raw: Bytes, width: int) -> Sparse:
    """The shortest form of a tensor's bytes (1-d) with elements of `width` bytes: 1, 2, 4 or 8."""
    elements = raw.view(f"<u{width}")
    nonzero = elements != 0
    values = elements[nonzero].view(np.uint8)
    sizes: dict[Kind, int] = {"dense": len(raw) - len(values), "mask": -(-len(elements) // 8)}
    lengths = _runs(nonzero)
    sizes |= {_runs_of(w): w * int(len(lengths) + 2 * _splits(lengths, w).sum()) for w in WIDTHS}
    kind = min(sizes, key=lambda name: sizes[name])
    if kind == "dense":
        return Sparse(kind, raw, np.empty(0, np.uint8))
    where = np.packbits(nonzero) if kind == "mask" else _split_runs(lengths, int(kind[-1]))
    return Sparse(kind, values, where)


def decode(sparse: Sparse, count: int, width: int) -> Bytes:
    """The bytes of `count` elements of `width` bytes; ValueError if the stored tensor has another size."""
    if sparse.kind == "dense":
        if len(sparse.values) != count * width:
            raise ValueError("the length of a tensor does not match its shape")
        return sparse.values
    nonzero = np.empty(0, bool)
    if sparse.kind == "mask" and len(sparse.where) == -(-count // 8):
        nonzero = np.unpackbits(sparse.where, count=count).view(bool)
    elif sparse.kind != "mask":
        lengths = sparse.where.view(f"<u{sparse.kind[-1]}")
        if int(lengths.sum(dtype=np.uint64)) == count:
            nonzero = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    if len(nonzero) != count or int(nonzero.sum()) * width != len(sparse.values):
        raise ValueError("the values and positions of a tensor do not match its shape")
    elements = np.zeros(count, f"<u{width}")
    elements[nonzero] = sparse.values.view(f"<u{width}")
    return elements.view(np.uint8)


def _runs_of(width: int) -> Kind:
    kinds: dict[int, Kind] = {1: "runs1", 2: "runs2", 4: "runs4"}
    return kinds[width]


def _runs(nonzero: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Lengths of alternating runs of zeros and of values; the first run is of zeros and may be empty."""
    padded = np.concatenate([[False], nonzero])  # a leading zero, so that leading values end an empty run of zeros
    ends = np.flatnonzero(padded[1:] != padded[:-1])
    bounds = np.concatenate([[0], ends, [len(nonzero)]]).astype(np.int64)
    return bounds[1:] - bounds[:-1]


def _splits(lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """How often each run must be split so that its length fits `width` bytes."""
    splits: NDArray[np.int64] = np.maximum(lengths - 1, 0) // (256**width - 1)
    return splits


def _split_runs(lengths: NDArray[np.int64], width: int) -> Bytes:
    """The runs with longer ones split: the maximum length, a run of length 0, and so on, then the remainder."""
    most, splits = 256**width - 1, _splits(lengths, width)
    pieces = 1 + 2 * splits
    first = np.cumsum(pieces) - pieces
    offset = np.arange(int(pieces.sum())) - np.repeat(first, pieces)
    out = np.where(offset % 2 == 0, most, 0)
    out[first + 2 * splits] = lengths - splits * most
    return out.astype(f"<u{width}").view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """First and last byte of a tensor in the data of a file, and bytes per element."""

    begin: int
    end: int
    width: int


def _layout(header: str) -> list[_Tensor]:
    """The tensors of a safetensors header in the order of their data; ValueError if the header is invalid."""
    found = []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                (begin, end), count = entry["data_offsets"], math.prod(entry["shape"])
                width, rest = divmod(end - begin, count) if count else (1, 0)
                found.append(_Tensor(begin, end, width if width in (1, 2, 4, 8) and not rest else 1))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is invalid: {error!r}") from error
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    bounds = [0, *(tensor.end for tensor in found)]
    if any(tensor.begin != bound or tensor.end < bound for tensor, bound in zip(found, bounds, strict=False)):
        raise ValueError("its tensors overlap or leave gaps")
    return found


def _opened(source: Path) -> tuple[Bytes, str, list[_Tensor]]:
    """Bytes (memory-mapped), header and tensors of a safetensors file; `DataError` if it is invalid or truncated."""
    data = np.memmap(source, np.uint8, "r") if source.stat().st_size else np.empty(0, np.uint8)
    try:
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = data[8 : 8 + length].tobytes().decode("utf-8")
        tensors = _layout(header)
        if 8 + length + (tensors[-1].end if tensors else 0) != len(data):
            raise ValueError("its length does not match its header")
    except ValueError as error:
        raise DataError(f"{source} is not a valid safetensors file ({error}); copy or write it again") from error
    return data, header, tensors


def check_file(source: Path) -> None:
    """Raise `DataError` for an invalid safetensors file, or one whose length does not match its header."""
    _opened(source)


def encode_file(source: Path, target: Path, count_bytes: CountBytes = lambda count: None) -> dict[str, Any]:
    """Write the sparse form of a safetensors file; `count_bytes(bytes)` is called after every tensor.

    Returns `{bytes, sparse_bytes, zeros, kinds}`: sizes before and after, the share of bytes omitted as zeros, and the
    number of tensors by form. Raises `DataError` for an invalid file.
    """
    data, header, tensors = _opened(source)
    begin = 8 + len(header.encode())
    count_bytes(begin)
    stored: dict[str, Bytes] = {}
    kinds = []
    for number, tensor in enumerate(tensors):
        sparse = encode(np.array(data[begin + tensor.begin : begin + tensor.end]), tensor.width)
        stored |= {f"{number}.values": sparse.values, f"{number}.where": sparse.where}
        kinds.append(sparse.kind)
        count_bytes(tensor.end - tensor.begin)
    about = {"format": FORMAT, "header": header, "sha256": sha256(source), "kinds": kinds}
    part = target.with_name(target.name + ".part")
    save_file(stored, part, {KEY: json.dumps(about)})  # a single entry, because their order is not deterministic
    part.replace(target)
    values = sum(len(values) for name, values in stored.items() if name.endswith(".values"))
    before = tensors[-1].end if tensors else 0
    return {
        "bytes": len(data),
        "sparse_bytes": target.stat().st_size,
        "zeros": round(1 - values / before, 4) if before else 0.0,
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def expand_file(source: Path, target: Path) -> None:
    """Restore the file that was given to `encode_file`, byte for byte; `ArtifactError`, and no file, on failure."""
    part = target.with_name(target.name + ".part")
    try:
        with safe_open(source, "numpy") as stored:
            about = json.loads((stored.metadata() or {}).get(KEY, "{}"))
            if about.get("format") != FORMAT:
                raise ArtifactError(f"{source} has sparse format {about.get('format')!r}, this cogumi reads {FORMAT}")
            header, kinds = about["header"].encode(), about["kinds"]
            tensors, digest = _layout(about["header"]), hashlib.sha256()
            check_disk_space(target.parent, 8 + len(header) + (tensors[-1].end if tensors else 0))
            with part.open("wb") as out:
                for piece in (len(header).to_bytes(8, "little"), header):
                    out.write(piece)
                    digest.update(piece)
                for number, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
                    values, where = (stored.get_tensor(f"{number}.{name}") for name in ("values", "where"))
                    count = (tensor.end - tensor.begin) // tensor.width
                    raw = decode(Sparse(kind, values, where), count, tensor.width).data
                    out.write(raw)
                    digest.update(raw)
        if digest.hexdigest() != about["sha256"]:
            raise ValueError("its SHA-256 does not match")
        part.replace(target)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ArtifactError(f"{source} is damaged ({error}); copy or pack it again") from error
    finally:
        part.unlink(missing_ok=True)

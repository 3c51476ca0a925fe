"""Safetensors files of pruned models without their zeros, for storage only (SPEC D9); off unless asked for.

An element of a tensor is zero if all its bits are: -0.0 and every NaN are values, so any type comes back bit for bit,
and so does the whole file. Of each tensor are stored its values, one after the other, and where they stand: one bit
per element, or the lengths of the runs of zeros and values by turns, whichever is shorter; or the tensor as it is,
where even that is shorter. The result is a safetensors file itself.
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

from cogumi.bundle.packed import Told, check_room
from cogumi.core.errors import ArtifactError, DataError
from cogumi.core.files import sha256

FORMAT = 1
KEY = "sparse"
"""Where the metadata of the file says what it is."""
ENDING = ".sparse"
WIDTHS = (1, 2, 4)
"""Bytes that the length of a run may take; a longer run is cut by runs of length 0."""

Bytes = NDArray[np.uint8]
Kind = Literal["dense", "mask", "runs1", "runs2", "runs4"]


@dataclass(frozen=True, slots=True)
class Sparse:
    """One tensor: its values and, unless it is `dense`, where they stand."""

    kind: Kind
    values: Bytes
    where: Bytes


def encode(raw: Bytes, width: int) -> Sparse:
    """The shortest form of a tensor's bytes (1-d), of which each element takes `width`: 1, 2, 4 or 8."""
    elements = raw.view(f"<u{width}")
    there = elements != 0
    values = elements[there].view(np.uint8)
    sizes: dict[Kind, int] = {"dense": len(raw) - len(values), "mask": -(-len(elements) // 8)}
    lengths = _runs(there)
    sizes |= {_runs_of(w): w * int(len(lengths) + 2 * _cuts(lengths, w).sum()) for w in WIDTHS}
    kind = min(sizes, key=lambda name: sizes[name])
    if kind == "dense":
        return Sparse(kind, raw, np.empty(0, np.uint8))
    where = np.packbits(there) if kind == "mask" else _cut(lengths, int(kind[-1]))
    return Sparse(kind, values, where)


def decode(sparse: Sparse, count: int, width: int) -> Bytes:
    """The bytes of `count` elements; ValueError if that is not what the form holds."""
    if sparse.kind == "dense":
        if len(sparse.values) != count * width:
            raise ValueError("a tensor is not as long as its shape says")
        return sparse.values
    there = np.empty(0, bool)
    if sparse.kind == "mask" and len(sparse.where) == -(-count // 8):
        there = np.unpackbits(sparse.where, count=count).view(bool)
    elif sparse.kind != "mask":
        lengths = sparse.where.view(f"<u{sparse.kind[-1]}")
        if int(lengths.sum(dtype=np.uint64)) == count:
            there = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    if len(there) != count or int(there.sum()) * width != len(sparse.values):
        raise ValueError("what is stored of a tensor does not add up to it")
    elements = np.zeros(count, f"<u{width}")
    elements[there] = sparse.values.view(f"<u{width}")
    return elements.view(np.uint8)


def _runs_of(width: int) -> Kind:
    kinds: dict[int, Kind] = {1: "runs1", 2: "runs2", 4: "runs4"}
    return kinds[width]


def _runs(there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Lengths of the runs of zeros and of values by turns; the first is of zeros, and may be empty."""
    around = np.concatenate([[False], there])  # as if there were a zero before: a run of values ends an empty one
    ends = np.flatnonzero(around[1:] != around[:-1])
    bounds = np.concatenate([[0], ends, [len(there)]]).astype(np.int64)
    return bounds[1:] - bounds[:-1]


def _cuts(lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """How often each run must be cut to fit so many bytes."""
    cuts: NDArray[np.int64] = np.maximum(lengths - 1, 0) // (256**width - 1)
    return cuts


def _cut(lengths: NDArray[np.int64], width: int) -> Bytes:
    """The runs, longer ones cut: the longest there is, one of length 0, and so on, then the rest."""
    most, cuts = 256**width - 1, _cuts(lengths, width)
    pieces = 1 + 2 * cuts
    first = np.cumsum(pieces) - pieces
    inside = np.arange(int(pieces.sum())) - np.repeat(first, pieces)
    out = np.where(inside % 2 == 0, most, 0)
    out[first + 2 * cuts] = lengths - cuts * most
    return out.astype(f"<u{width}").view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor lies in the data of a file, and what an element takes."""

    begin: int
    end: int
    width: int


def _layout(header: str) -> list[_Tensor]:
    """The tensors of a safetensors header in the order of their data; ValueError if it is none."""
    found = []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                (begin, end), count = entry["data_offsets"], math.prod(entry["shape"])
                width, rest = divmod(end - begin, count) if count else (1, 0)
                found.append(_Tensor(begin, end, width if width in (1, 2, 4, 8) and not rest else 1))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is none ({error!r})") from error
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    bounds = [0, *(tensor.end for tensor in found)]
    if any(tensor.begin != bound or tensor.end < bound for tensor, bound in zip(found, bounds, strict=False)):
        raise ValueError("its tensors do not lie one after the other")
    return found


def _opened(source: Path) -> tuple[Bytes, str, list[_Tensor]]:
    """A safetensors file's bytes (mapped), header and tensors; `DataError` if it is none or not all there."""
    data = np.memmap(source, np.uint8, "r") if source.stat().st_size else np.empty(0, np.uint8)
    try:
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = data[8 : 8 + length].tobytes().decode("utf-8")
        tensors = _layout(header)
        if 8 + length + (tensors[-1].end if tensors else 0) != len(data):
            raise ValueError("its length is not what its header says")
    except ValueError as error:
        raise DataError(f"{source} is no safetensors file ({error}); copy or write it again") from error
    return data, header, tensors


def check_file(source: Path) -> None:
    """Raise `DataError` if this is no safetensors file, or not as long as its header says."""
    _opened(source)


def encode_file(source: Path, target: Path, told: Told = lambda count: None) -> dict[str, Any]:
    """Write a safetensors file without its zeros; `told` hears of all its bytes, tensor by tensor.

    Returns `{bytes, sparse_bytes, zeros, kinds}`: sizes before and after, the share of bytes that were left out as
    zeros, and how many tensors took which form. Raises `DataError` for a file that is none.
    """
    data, header, tensors = _opened(source)
    begin = 8 + len(header.encode())
    told(begin)
    stored: dict[str, Bytes] = {}
    kinds = []
    for number, tensor in enumerate(tensors):
        sparse = encode(np.array(data[begin + tensor.begin : begin + tensor.end]), tensor.width)
        stored |= {f"{number}.values": sparse.values, f"{number}.where": sparse.where}
        kinds.append(sparse.kind)
        told(tensor.end - tensor.begin)
    about = {"format": FORMAT, "header": header, "sha256": sha256(source), "kinds": kinds}
    part = target.with_name(target.name + ".part")
    save_file(stored, part, {KEY: json.dumps(about)})  # one entry: several would come in any order
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
    """Write the file that `encode_file` was given, byte for byte; `ArtifactError`, and no file, if that fails."""
    part = target.with_name(target.name + ".part")
    try:
        with safe_open(source, "numpy") as stored:
            told = json.loads((stored.metadata() or {}).get(KEY, "{}"))
            if told.get("format") != FORMAT:
                raise ArtifactError(f"{source} has sparse format {told.get('format')!r}, this cogumi reads {FORMAT}")
            header, kinds = told["header"].encode(), told["kinds"]
            tensors, digest = _layout(told["header"]), hashlib.sha256()
            check_room(target.parent, 8 + len(header) + (tensors[-1].end if tensors else 0))
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
        if digest.hexdigest() != told["sha256"]:
            raise ValueError("its SHA-256 is another")
        part.replace(target)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ArtifactError(f"{source} is damaged ({error}); copy or pack it again") from error
    finally:
        part.unlink(missing_ok=True)

"""A GGUF file in another type: llama.cpp's quantizer, applied to the dequantized weights of the file (SPEC M6).

Works for every architecture that llama.cpp knows. Keys are copied, and so are tensors that have their new type already;
all others lose precision a second time, so that the result is worse than the same type made from the original weights.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cogumi.compress.gguf.gguf_header import Header
from cogumi.compress.gguf.type_mixture import check_type
from cogumi.core.amounts import size
from cogumi.core.errors import ExportError
from cogumi.engine.llama.binding.quantize import mixture, quantize_file

K_BLOCK = 256
"""Values in a block of a K type: other row widths get another type."""


def requantized_types(header: Header, type: str) -> dict[str, str]:
    """The type (`q5_0`, `f32`) that each tensor of the file gets, without any work.

    Raises `ExportError` for an unknown type, one that needs an importance matrix, and a file of an architecture or
    type that llama.cpp cannot dequantize.
    """
    check_type(type)
    return {name: chosen.lower() for name, chosen in mixture(header.path, type).items()}


def requantized_bytes(header: Header, types: Mapping[str, str]) -> int:
    """Bytes of the file with tensors of these types, up to their padding."""
    before = sum(int(tensor.n_bytes) for tensor in header.tensors.values())
    after = sum(_bytes(int(header.tensors[name].n_elements), type) for name, type in types.items())
    return header.path.stat().st_size - before + after


def _bytes(weights: int, type: str) -> int:
    values, bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type.upper()]]
    return weights // int(values) * int(bytes)


def matrix_types(header: Header, types: Mapping[str, str]) -> dict[str, int]:
    """Number of matrices of each type, most frequent first."""
    return dict(Counter(types[name] for name, t in header.tensors.items() if len(t.shape) > 1).most_common())


def replaced_note(type: str, matrices: Mapping[str, int]) -> str:
    """A line about the matrices whose rows do not fill the blocks of a K type, and what they are instead, or ''."""
    other = {name: n for name, n in matrices.items() if not name.endswith("_k")}
    if "_k" not in type or not other:
        return ""
    instead = ", ".join(f"{n} {name}" for name, n in other.items())
    return (
        f"{type}: the rows of {sum(other.values())} of {sum(matrices.values())} matrices do not fill blocks of "
        f"{K_BLOCK} values, and are stored as another type ({instead})"
    )


def requantize(header: Header, out: Path, type: str, threads: int) -> None:
    """Write the file in another type to `out`, atomically; the bytes do not depend on `threads`.

    Raises the errors of `requantized_types`, and `ExportError` if the disk has no room, before anything is written.
    """
    needed, free = requantized_bytes(header, requantized_types(header, type)), shutil.disk_usage(out.parent).free
    if free < needed:
        raise ExportError(f"{header.path} as {type} takes {size(needed)}, {out.parent} has {size(free)} free")
    part = out.with_name(f"{out.name}.part")
    try:
        quantize_file(header.path, part, type, threads)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)

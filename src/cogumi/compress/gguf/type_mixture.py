"""The stored type of each tensor of a model, determined by the model's shape alone (SPEC D1, D5).

llama.cpp's own quantizer chooses the types in a dry run over a file with a header and no weights. The file is sparse,
so that it takes no disk space for a model of any size.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES

from cogumi.compress.gguf.layout import F16, F32, Q8_0, Llama, Tensor
from cogumi.core.errors import ExportError
from cogumi.core.registry import nearest

FILE_TYPES = {"f32": LlamaFileType.ALL_F32} | {
    t.name[7:].lower(): t for t in LlamaFileType if t.name.startswith("MOSTLY_")
}
"""File types by llama.cpp's names: mixtures of tensor types, except the `PLAIN` ones."""
TENSOR_TYPES = {t.name.lower(): t for t in GGMLQuantizationType if not re.fullmatch(r"I\d+|F64|Q8_1|Q8_K", t.name)}
"""Types of a single tensor."""
PLAIN = {"f32": F32, "f16": F16, "q8_0": Q8_0}
"""File types with one tensor type for all matrices of any width; they need no dry run."""
NONE: Mapping[str, str] = MappingProxyType({})
OVERRIDES = "types.json"
"""The file in which stages `awq` and `gptq` write the tensors with another type than the rest: pattern -> type."""


def stored_tensors(
    llama: Llama, type: str, overrides: Mapping[str, str] = NONE, importance: bool = False
) -> list[Tensor]:
    """All tensors of a model with their stored types, in file order; `sum(t.nbytes)` is the size of the weights.

    `overrides` sets the type of matrices by patterns of their names (`blk.0.*`); the first matching pattern wins.
    `importance`: whether there will be an importance matrix. Raises `ExportError` for unknown or impossible types and
    for patterns without a match.
    """
    check_type(type)
    if type in PLAIN:
        tensors = [tensor.stored(PLAIN[type]) for tensor in llama.tensors()]
    else:
        chosen = types_of(llama, type, importance)
        tensors = [replace(tensor, type=chosen[tensor.name]) for tensor in llama.tensors()]
    check_overrides(overrides)
    names = {re.sub(r"\d+", "*", t.name) for t in tensors if len(t.shape) == 2}
    for pattern in overrides:
        if not any(fnmatchcase(t.name, pattern) for t in tensors if len(t.shape) == 2):
            raise ExportError(f"types: '{pattern}' matches no matrix of this model; {nearest(pattern, names)}")
    return [_overridden(tensor, overrides) for tensor in tensors]


def check_type(type: str) -> None:
    """`ExportError` for an unknown file type."""
    if type not in FILE_TYPES:
        raise ExportError(f"unknown type {type!r}; known: {', '.join(FILE_TYPES)}")


def check_overrides(overrides: Mapping[str, str]) -> None:
    """`ExportError` for an unknown tensor type."""
    for pattern, type in overrides.items():
        if type not in TENSOR_TYPES:
            raise ExportError(f"types: unknown type '{type}' for '{pattern}'; {nearest(type, TENSOR_TYPES)}")


def _overridden(tensor: Tensor, overrides: Mapping[str, str]) -> Tensor:
    chosen = next((type for pattern, type in overrides.items() if fnmatchcase(tensor.name, pattern)), None)
    if chosen is None or len(tensor.shape) == 1:
        return tensor
    block, width = GGML_QUANT_SIZES[TENSOR_TYPES[chosen]][0], tensor.shape[1]
    if width % block:
        raise ExportError(f"types: {tensor.name} has rows of {width} values, and {chosen} takes {block} at a time")
    return replace(tensor, type=TENSOR_TYPES[chosen])


def types_of(llama: Llama, type: str, importance: bool = False) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor, by GGUF name, that llama.cpp's quantizer chooses for a file type (`q4_k_m`, ...).

    Raises `ExportError` for a file type that the model cannot have, or that needs an importance matrix without one.
    """
    from cogumi.engine.llama.binding.quantize import mixture

    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        _write_header(llama, header)
        return {name: GGMLQuantizationType[chosen] for name, chosen in mixture(header, type, importance).items()}


def _write_header(llama: Llama, path: Path) -> None:
    writer = GGUFWriter(path, llama.kind)
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(LlamaFileType.ALL_F32)
    llama.write(writer)
    size = 0
    for tensor in llama.tensors():
        tensor.announce(writer)
        size += -(-tensor.nbytes // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    end = path.stat().st_size
    os.truncate(path, -(-end // writer.data_alignment) * writer.data_alignment + size)

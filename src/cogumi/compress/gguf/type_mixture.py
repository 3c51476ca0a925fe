"""Which type each tensor of a model is kept in, told from its shape alone (SPEC D1, D5).

llama.cpp's own quantizer is asked, in a dry run over a file that has a header and no weights: sparse, so that it takes
no room on disk whatever the model's size.
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
"""What a file may be, named as llama.cpp names it: a mixture of types for all but the plain ones."""
TENSOR_TYPES = {t.name.lower(): t for t in GGMLQuantizationType if not re.fullmatch(r"I\d+|F64|Q8_1|Q8_K", t.name)}
"""What a single tensor may be."""
PLAIN = {"f32": F32, "f16": F16, "q8_0": Q8_0}
"""Files with one type for all matrices, whatever their width; nobody need be asked about those."""
NONE: Mapping[str, str] = MappingProxyType({})
OVERRIDES = "types.json"
"""The file in which a step (`awq`, `gptq`) says which tensors need a type of their own: pattern -> type."""


def stored_tensors(
    llama: Llama, type: str, overrides: Mapping[str, str] = NONE, importance: bool = False
) -> list[Tensor]:
    """Every tensor of a model in the type it is kept in, in file order; `sum(t.nbytes)` is what the weights take.

    `overrides` gives the matrices that a pattern matches (`blk.0.*`) a type of their own; the first that matches
    counts. `importance`: whether there will be an importance matrix. Raises `ExportError` for what cannot be.
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
    """`ExportError` for an unknown type of file."""
    if type not in FILE_TYPES:
        raise ExportError(f"unknown type {type!r}; known: {', '.join(FILE_TYPES)}")


def check_overrides(overrides: Mapping[str, str]) -> None:
    """`ExportError` for an unknown type of a tensor."""
    for pattern, type in overrides.items():
        if type not in TENSOR_TYPES:
            raise ExportError(f"types: unknown type '{type}' for '{pattern}'; {nearest(type, TENSOR_TYPES)}")


def _overridden(tensor: Tensor, overrides: Mapping[str, str]) -> Tensor:
    said = next((type for pattern, type in overrides.items() if fnmatchcase(tensor.name, pattern)), None)
    if said is None or len(tensor.shape) == 1:
        return tensor
    block, width = GGML_QUANT_SIZES[TENSOR_TYPES[said]][0], tensor.shape[1]
    if width % block:
        raise ExportError(f"types: {tensor.name} has rows of {width} values, and {said} takes {block} at a time")
    return replace(tensor, type=TENSOR_TYPES[said])


def types_of(llama: Llama, type: str, importance: bool = False) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor, by its GGUF name, in a model that llama.cpp's quantizer makes `type` (`q4_k_m`, ...).

    Raises `ExportError` for a type that llama.cpp cannot give it, and for one that needs an importance matrix where
    there is none.
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

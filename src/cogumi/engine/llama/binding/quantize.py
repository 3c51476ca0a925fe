"""llama.cpp's quantizer: the types it chooses per tensor, and quantization of files and of rows."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as c
from llama_cpp._ggml import libggml as ggml
from numpy.typing import NDArray

from cogumi.core.errors import ExportError
from cogumi.engine.llama.binding.backend import captured_log, errors, reason

_CHOICE = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^]]*\], type = +(?P<old>\w+), size = +[\d.]+ MiB"
    r"(?: -> +[\d.]+ MiB \((?P<new>\w+)\))?"
)
"""Log line of a dry run for each tensor: its type, and the chosen type if different."""

_TYPES = {name.removeprefix("GGML_TYPE_"): value for name, value in vars(c).items() if name.startswith("GGML_TYPE_")}
_TYPES |= {"BF16": 30, "TQ1_0": 34, "TQ2_0": 35}  # ggml.h; missing in llama_cpp
for _name in ("COUNT", "I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"):  # ggml aborts the process for these
    del _TYPES[_name]

ggml.ggml_row_size.restype = ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_validate_row_data.restype = ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool


def _parameters(type: str) -> Any:
    known = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_").lower(): value
        for name, value in vars(c).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    if type not in known:
        raise ExportError(f"unknown GGUF type {type!r}; use one of {', '.join(sorted(known))}")
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = known[type]
    return parameters


def mixture(header: Path, type: str, importance: bool = False) -> dict[str, str]:
    """The ggml type (F32, Q4_K, ...) that llama.cpp's quantizer chooses for each tensor of a GGUF file.

    No weight is read, so the file may be sparse. `importance`: choose as if an importance matrix were given. Raises
    `ExportError` for an unknown type, a type that needs an importance matrix, and shapes that the type does not allow.
    """
    parameters = _parameters(type)
    parameters.dry_run = True
    if importance:
        parameters.imatrix = (c.llama_model_imatrix_data * 1)()  # an empty list: only its presence matters
    errors.clear()
    with captured_log() as messages:
        status = c.llama_model_quantize(os.fsencode(header), b"", ctypes.byref(parameters))
    if status:
        raise ExportError(f"llama.cpp could not quantize {header} to {type} ({reason()})")
    log = "".join(messages)
    if "will require an imatrix" in log:
        raise ExportError(f"type {type} needs an importance matrix; give one (stage 'importance'), or a larger type")
    return {match["name"]: (match["new"] or match["old"]).upper() for match in _CHOICE.finditer(log)}


def quantize_file(source: Path, out: Path, type: str, threads: int) -> None:
    """Quantize a GGUF file of any type to `out`; weights that are quantized already are dequantized first.

    Raises `ExportError` for an unknown type, and for a file that llama.cpp cannot read or dequantize.
    """
    parameters = _parameters(type)
    parameters.nthread, parameters.allow_requantize = threads, True
    errors.clear()
    if c.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters)):
        raise ExportError(f"llama.cpp could not quantize {source} to {type} ({reason()})")


def quantize_rows(
    rows: NDArray[np.float32], type: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize float rows (n, width) to a ggml type such as F16, Q8_0, Q4_K or Q6_K; returns (n, bytes per row).

    The width must be a multiple of the type's block size (32, or 256 for K types). `importance` (width): weight of the
    error in each column. Calls from several threads run in parallel.
    """
    number = _TYPES.get(type)
    if number is None:
        raise ExportError(f"unknown ggml type {type!r}; use one such as Q8_0, Q4_K or Q6_K")
    n, width = rows.shape
    if width % ggml.ggml_blck_size(number):
        raise ExportError(f"rows of {width} values do not fit {type} blocks; use a type with smaller blocks")
    if importance is None and ggml.ggml_quantize_requires_imatrix(number):
        raise ExportError(f"type {type} needs an importance matrix; give one (stage 'importance'), or a larger type")
    out = np.empty((n, ggml.ggml_row_size(number, ctypes.c_int64(width))), np.uint8)
    source = np.ascontiguousarray(rows, np.float32)
    columns = None if importance is None else np.ascontiguousarray(importance, np.float32)
    ggml.ggml_quantize_chunk(
        number,
        ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(n),
        ctypes.c_int64(width),
        None if columns is None else ctypes.c_void_p(columns.ctypes.data),
    )
    if not ggml.ggml_validate_row_data(number, ctypes.c_void_p(out.ctypes.data), ctypes.c_size_t(out.nbytes)):
        raise ExportError(f"values are out of range for {type}; use a type with a wider range")
    return out

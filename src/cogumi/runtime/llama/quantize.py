"""GGUF weights in other types, by llama.cpp's quantizers."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as c
from llama_cpp._ggml import libggml as ggml
from numpy.typing import NDArray

from cogumi.errors import ExportError
from cogumi.runtime.llama.backend import complaints, reason


def quantize(source: Path, target: Path, type: str) -> None:
    """Write `source` (an f32 or f16 GGUF) as `target` in a named type such as q8_0 or q4_k_m, atomically."""
    known = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_").lower(): value
        for name, value in vars(c).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    if type not in known:
        raise ExportError(f"unknown GGUF type {type!r}; use one of {', '.join(sorted(known))}")
    params = c.llama_model_quantize_default_params()
    params.ftype = known[type]
    partial = target.with_name(target.name + ".partial")
    complaints.clear()
    status = c.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
    if status:
        partial.unlink(missing_ok=True)
        raise ExportError(f"llama.cpp could not quantize {source} to {type} ({reason()})")
    os.replace(partial, target)


def quantize_rows(rows: NDArray[np.float32], type: str) -> NDArray[np.uint8]:
    """The bytes (n, bytes per row) of float rows (n, width) in a ggml type such as Q8_0, Q4_K or Q6_K.

    The width must be a multiple of the type's block (32, or 256 for K types).
    """
    number = getattr(c, f"GGML_TYPE_{type}", None)
    if number is None:
        raise ExportError(f"unknown ggml type {type!r}; use one such as Q8_0, Q4_K or Q6_K")
    n, width = rows.shape
    ggml.ggml_row_size.restype = ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    if width % ggml.ggml_blck_size(number):
        raise ExportError(f"rows of {width} values cannot be cut into {type} blocks; use a narrower type")
    out = np.empty((n, ggml.ggml_row_size(number, ctypes.c_int64(width))), np.uint8)
    source = np.ascontiguousarray(rows, np.float32)
    ggml.ggml_quantize_chunk(
        number,
        ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(n),
        ctypes.c_int64(width),
        None,
    )
    return out

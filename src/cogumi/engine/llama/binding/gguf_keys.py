"""The keys of a GGUF file that say what it is, read by ggml where llama.cpp does not open the file as a model."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from llama_cpp._ggml import libggml as ggml

from cogumi.core.model_files import not_a_model, split_problem

_BOOL, _STRING = 7, 8  # gguf.h


class _Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ggml, name)
    function.restype, function.argtypes = result, arguments
    return function


_open = _function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _Params)
_close = _function("gguf_free", None, ctypes.c_void_p)
_find = _function("gguf_find_key", ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p)
_type = _function("gguf_get_kv_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_string = _function("gguf_get_val_str", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
_bool = _function("gguf_get_val_bool", ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64)


def problem_of(path: Path) -> str:
    """Why a file that llama.cpp refused is no model: another kind of file, a part of one; empty if it is damaged."""
    if problem := split_problem(path):
        return problem
    opened = _open(os.fsencode(path), _Params(True, None))
    if not opened:
        return ""
    try:
        keys = {name: _value(opened, name) for name in ("general.architecture", "general.type")}
        own = f"{keys['general.architecture']}.attention.causal"
        keys |= {name: _value(opened, name) for name in (own, "tokenizer.ggml.tokens")}
    finally:
        _close(opened)
    return not_a_model(path, {name: value for name, value in keys.items() if value is not None})


def _value(opened: Any, name: str) -> str | bool | None:
    """A text or truth value; True for a key of another type, None for one that the file lacks."""
    at = _find(opened, name.encode())
    if at < 0:
        return None
    if _type(opened, at) == _STRING:
        return str(_string(opened, at).decode("utf-8", "replace"))
    return bool(_bool(opened, at)) if _type(opened, at) == _BOOL else True

"""A GGUF file mapped into memory, with its tokenizer and adapters."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as c
from llama_cpp._ggml import libggml as ggml

from cogumi.core.environment import beyond_memory
from cogumi.core.errors import BundleError
from cogumi.engine.llama.binding.backend import AMX, errors, reason
from cogumi.engine.llama.binding.gguf_keys import problem_of
from cogumi.engine.llama.binding.tokenizer import Tokenizer, Weights

_GGML_TYPE_BF16 = 30  # ggml.h; the Python package does not name it
_BLOCK = 256
"""llama.cpp's AMX kernels compute wrong products with rows of one quantized block: 32 values, or 256 in K types."""


class Model:
    """A GGUF file mapped into memory.

    Raises `BundleError` if llama.cpp cannot use the file.

    `repack`: llama.cpp keeps a second copy of weights of some types (Q4_0, Q4_K, Q8_0, ..) in the fastest layout for
    this processor. Without it only the mapped file is used, whose pages the system may drop. Narrow models do without
    on processors with AMX (see `_BLOCK`).
    """

    def __init__(self, path: Path, *, vocabulary_only: bool = False, repack: bool = True) -> None:
        if not path.is_file():
            raise BundleError(f"{path} does not exist; build or copy the model first")
        if repack and not vocabulary_only and (excess := beyond_memory(path.stat().st_size)):
            raise BundleError(
                f"{path} {excess}; take a smaller model or type, or --no-repack, which reads it from disk, slowly"
            )
        errors.clear()
        params = c.llama_model_default_params()
        params.vocab_only = vocabulary_only
        params.use_extra_bufts = repack
        pointer = c.llama_model_load_from_file(os.fsencode(path), params)
        if pointer and repack and AMX and not vocabulary_only and c.llama_model_n_embd(pointer) <= _BLOCK:
            c.llama_model_free(pointer)
            params.use_extra_bufts = False
            pointer = c.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            why = reason()
            problem = f"{path} is not a complete GGUF model ({why}); export or copy it again"
            if "unknown model architecture" in why:
                problem = f"{path} cannot be served: this version of llama.cpp does not know it ({why})"
            raise BundleError(problem_of(path) or problem)
        self.path = path
        self.weights = Weights(pointer)
        if self._own("attention.causal") == "false" or c.llama_model_has_encoder(pointer):
            raise BundleError(problem_of(path) or f"{path} is an encoder-decoder model; give a chat model")
        self.tokenizer = Tokenizer(self.weights, path)
        self.width = int(c.llama_model_n_embd(pointer))
        self.bytes = int(c.llama_model_size(pointer))

    def describe(self) -> dict[str, Any]:
        """What the file says about itself: type, sizes, tokens. Only its metadata is needed."""
        pointer, buffer = self.weights.pointer, ctypes.create_string_buffer(256)
        c.llama_model_desc(pointer, buffer, len(buffer))
        names = ("general.name", "general.license", "general.architecture")
        found = {name.split(".")[1]: self._text(name) for name in names}
        tokens = self.tokenizer.settings
        return {
            **{name: text for name, text in found.items() if text},
            "type": buffer.value.decode("utf-8", "replace"),
            "context": self.trained_context,
            "width": self.width,
            "layers": int(c.llama_model_n_layer(pointer)),
            "vocabulary": self.tokenizer.size,
            "bos_token": tokens["bos_token"],
            "eos_token": tokens["eos_token"],
            "chat_template": tokens["chat_template"] is not None,
        }

    def _text(self, key: str) -> str:
        """A text of the file's metadata; empty if there is none."""
        buffer = ctypes.create_string_buffer(256)
        found = c.llama_model_meta_val_str(self.weights.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if found >= 0 else ""

    def load_adapter(self, path: Path) -> Any:
        """Load a LoRA GGUF for contexts of this model; it lives as long as the model.

        With f32 or f16 factors of a rank divisible by 4, llama.cpp sums products in an order that depends on the batch
        size (differences of about 1e-5); with any other rank, and with q8_0 or q4_0 factors of rank 32, results are
        bit-identical in any batch.
        """
        if not path.is_file():
            raise BundleError(f"adapter {path} does not exist; build or copy it first")
        errors.clear()
        adapter = c.llama_adapter_lora_init(self.weights.pointer, os.fsencode(path))
        if not adapter:
            raise BundleError(f"{path} is not an adapter for {self.path.name} ({reason()}); use one trained on it")
        return adapter

    def free_adapter(self, adapter: Any) -> None:
        """Free a loaded adapter; no context may be using it."""
        c.llama_adapter_lora_free(adapter)

    def cache_bytes(self, cache: str) -> int:
        """Bytes of one token in a KV cache of that type."""
        model = self.weights.pointer
        key, value = (self._head(name) * int(c.llama_model_n_head_kv(model)) for name in ("key", "value"))
        row = ggml.ggml_row_size
        row.restype = ctypes.c_size_t
        of_key, of_value = cache_types(cache)
        one = row(of_key, ctypes.c_int64(key)) + row(of_value, ctypes.c_int64(value))
        return int(c.llama_model_n_layer(model)) * int(one)

    def supports_cache(self, cache: str) -> bool:
        """Whether the head widths are multiples of the block size of that cache type."""
        heads = (self._head(name) for name in ("key", "value"))
        return not any(n % ggml.ggml_blck_size(kind) for n, kind in zip(heads, cache_types(cache), strict=True))

    def _head(self, name: str) -> int:
        """Width of one attention head's keys or values."""
        known = self._number(f"attention.{name}_length")
        return known or self.width // int(c.llama_model_n_head(self.weights.pointer))

    @property
    def trained_context(self) -> int | None:
        """The context that the model was trained for, also with the vocabulary only; None if the file has none."""
        return self._number("context_length")

    def _number(self, name: str) -> int | None:
        """A number of the architecture in the file's metadata; None if it has none of that name."""
        return int(found) if (found := self._own(name)) else None

    def _own(self, name: str) -> str:
        """A value of the architecture in the file's metadata, as text; empty if it has none of that name."""
        return self._text(f"{self._text('general.architecture')}.{name}")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load only the tokenizer of a GGUF file. Raises `BundleError` if the file has none."""
    return Model(path, vocabulary_only=True).tokenizer


def cache_types(name: str) -> tuple[int, int]:
    """llama.cpp's types of keys and values for a cache type name; `BundleError` for an unknown name."""
    on_cpu = not c.llama_supports_gpu_offload()
    types = {
        "f16": (c.GGML_TYPE_F16, _GGML_TYPE_BF16 if on_cpu else c.GGML_TYPE_F16),
        "q8_0": (c.GGML_TYPE_Q8_0, c.GGML_TYPE_Q8_0),
        "q4_0": (c.GGML_TYPE_Q4_0, c.GGML_TYPE_Q4_0),
    }
    if name not in types:
        raise BundleError(f"unknown cache type {name!r}; use one of {', '.join(types)}")
    return types[name]

"""A GGUF file as a Hugging Face folder that can be trained: its own dequantized weights in fp32 (SPEC M2).

The weights go from the file into model.safetensors a block of rows at a time, so that memory holds one block. Rows of
a Llama's queries and keys go back from llama.cpp's rotary order to Hugging Face's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.compress.gguf.gguf_header import Header, llama3_rope
from cogumi.compress.gguf.gguf_tokenizer import read_vocabulary, write_tokenizer
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary, warn_of_lost_text
from cogumi.compress.gguf.layout import ABOUT, Llama, Tensor, halves_order
from cogumi.core.amounts import size
from cogumi.core.errors import ExportError
from cogumi.core.files import write_json
from cogumi.core.shapes import ARCHITECTURES

BLOCK = 1 << 24
"""Values that are dequantized at a time."""
FP32 = 4


def write_folder(
    header: Header, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Vocabulary:
    """Write config.json, the tokenizer files and model.safetensors (fp32, last); returns the tokenizer.

    `progress` counts bytes. Raises `ExportError` for a model that torch would not run as llama.cpp does, and if the
    disk has no room, before anything is written.
    """
    shape, vocabulary = header.shape, read_vocabulary(header)
    warn_of_lost_text(vocabulary)
    needed = sum(FP32 * prod(tensor.shape) for tensor in _stored(shape))
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < needed:
        raise ExportError(f"the weights of {header.path} take {size(needed)} as fp32, {out} has {size(free)} free")
    write_json(out / "config.json", config_of(header, vocabulary))
    write_tokenizer(vocabulary, shape.context, out)
    _write_weights(header, shape, out / "model.safetensors", progress)
    return vocabulary


def config_of(header: Header, vocabulary: Vocabulary) -> dict[str, Any]:
    """The config.json of a file's model, in the notation of transformers."""
    shape = header.shape
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind == shape.kind)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": shape.kind,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
        "rope_scaling": llama3_rope(shape) if shape.stretch else None,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocabulary,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "dtype": "float32",
    }
    if header.about:
        config[ABOUT] = header.about
    return config


def _stored(shape: Llama) -> list[Tensor]:
    """The tensors that a safetensors file holds, in order."""
    return [tensor for tensor in shape.tensors() if tensor.source]


def _write_weights(header: Header, shape: Llama, path: Path, progress: Callable[[int, int], None]) -> None:
    tensors, at = _stored(shape), 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        end = at + FP32 * prod(tensor.shape)
        entries[tensor.source] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    part, done = path.with_name(f"{path.name}.partial"), 0
    with part.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            rows, width = tensor.shape[0], prod(tensor.shape[1:])
            unit = rows // tensor.heads if tensor.heads else 1
            step = max(BLOCK // (width * unit), 1) * unit
            for start in range(0, rows, step):
                values = _rows(header, tensor, start, min(start + step, rows))
                file.write(values.tobytes())
                done += values.nbytes
                progress(done, at)
    os.replace(part, path)


def _rows(header: Header, tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    values = header.rows(tensor, start, stop)
    if not np.isfinite(values).all():
        raise ExportError(f"{header.path}: {tensor.name} holds NaN or infinity; download the file again")
    heads = tensor.heads * (stop - start) // tensor.shape[0]
    return np.ascontiguousarray(halves_order(values, heads) if heads else values)

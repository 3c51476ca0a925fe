"""Convert llama2.c checkpoints and their tokenizers to GGUF, for tests on a published tiny model.

Format: https://github.com/karpathy/llama2.c, run.c (version 0: seven int32, then f32 weights, all layers of a kind
together). Its query and key rows are already in llama.cpp's rotary order, so nothing is permuted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, TokenType

from cogumi.compress.gguf.export import LARGEST, writing
from cogumi.compress.gguf.layout import F32, Array, Llama, Tensor
from cogumi.compress.gguf.type_mixture import FILE_TYPES, stored_tensors
from cogumi.core.errors import ExportError
from cogumi.engine.llama.binding.quantize import quantize_rows

_HEADER = struct.Struct("<7i")  # width, feed forward, layers, heads, key-value heads, vocabulary, context
_LATER = 0x616B3432  # "ak42": opens versions 1 and 2
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def convert(checkpoint: Path, vocabulary: Path, out: Path, type: str = "f32", head: int | None = None) -> None:
    """Write a llama2.c checkpoint and its tokenizer as the GGUF file `out`, as a file of `type`, atomically.

    `head` pads the attention heads with zeros, which does not change the output of the model: llama.cpp keeps
    keys and values quantized only if the head size is a multiple of 32. Raises `ExportError` for files that are cut
    short or of another format, and for a `head` that the heads do not divide.
    """
    llama, weights = _read_checkpoint(checkpoint)
    wide = replace(llama, head=head or llama.head)
    if wide.head < llama.head or wide.head % llama.head:
        raise ExportError(f"heads of {llama.head} cannot be widened to {head}; give a multiple of {llama.head}")
    tensors = stored_tensors(wide, type)
    writer = GGUFWriter(None, "llama")
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    wide.write(writer)
    _add_vocabulary(writer, vocabulary, llama.vocabulary)
    with writing(writer, tensors, out):
        for tensor in tensors:
            values = _widen(weights[tensor.name], tensor.name, llama, wide.head)
            writer.write_tensor_data(_encode(values, tensor, checkpoint))


def _read_checkpoint(path: Path) -> tuple[Llama, dict[str, Array]]:
    """Shape and weights of a checkpoint; the weights, by GGUF name, are memory-mapped."""
    header = _read(path, _HEADER.size)
    if len(header) < _HEADER.size:
        raise ExportError(f"{path} is cut short or no llama2.c checkpoint; copy it again")
    width, feed_forward, layers, heads, kv_heads, rows, context = _HEADER.unpack(header)
    if width == _LATER:
        raise ExportError(f"{path} is a llama2.c checkpoint of a later version; export it as version 0")
    positive = min(width, feed_forward, layers, heads, kv_heads, abs(rows), context) > 0
    if not positive or width % (2 * heads) or heads % kv_heads:
        raise ExportError(f"{path} is no llama2.c checkpoint (its header makes no sense); give one of version 0")
    llama = Llama(
        hidden=width,
        feed_forward=feed_forward,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head=width // heads,
        vocabulary=abs(rows),
        context=context,
        epsilon=1e-5,
        theta=10000.0,
        tied=rows > 0,
    )
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in _file_order(llama))
    if (size := path.stat().st_size) != expected:
        raise ExportError(f"{path} has {size} bytes, its header asks for {expected}; it is cut short or foreign")
    values: Array = np.memmap(path, np.dtype("<f4"), "r", _HEADER.size)
    weights: dict[str, Array] = {}
    start = 0
    for name, shape in _file_order(llama):
        block = values[start : start + math.prod(shape)].reshape(shape)
        start += block.size
        if name.startswith("blk."):
            weights |= {name.format(i): layer for i, layer in enumerate(block)}
        else:
            weights[name] = block
    return llama, weights


def _file_order(llama: Llama) -> Iterator[tuple[str, tuple[int, ...]]]:
    """GGUF name and shape of each part of a checkpoint; a part of all layers ("blk.{}") is contiguous."""
    n, width, feed_forward = llama.layers, llama.hidden, llama.feed_forward
    query, key = llama.heads * llama.head, llama.kv_heads * llama.head
    yield "token_embd.weight", (llama.vocabulary, width)
    yield "blk.{}.attn_norm.weight", (n, width)
    yield "blk.{}.attn_q.weight", (n, query, width)
    yield "blk.{}.attn_k.weight", (n, key, width)
    yield "blk.{}.attn_v.weight", (n, key, width)
    yield "blk.{}.attn_output.weight", (n, width, query)
    yield "blk.{}.ffn_norm.weight", (n, width)
    yield "blk.{}.ffn_gate.weight", (n, feed_forward, width)
    yield "blk.{}.ffn_down.weight", (n, width, feed_forward)
    yield "blk.{}.ffn_up.weight", (n, feed_forward, width)
    yield "output_norm.weight", (width,)
    yield "cosines and sines", (2, llama.context, llama.head // 2)  # llama.cpp computes its own
    if not llama.tied:
        yield "output.weight", (llama.vocabulary, width)


def _widen(weight: Array, name: str, llama: Llama, head: int) -> Array:
    """Pad every head of an attention matrix to `head` with zeros without changing the function of the model.

    Pair i of d/2 rotates by theta ** (-2i / d), so in heads k times as wide it belongs at index k * i. llama.cpp
    divides scores by sqrt(head); scaling the query by sqrt(k) compensates for that.
    """
    times, kind = head // llama.head, name.split(".")[-2]
    if times == 1 or kind not in ("attn_q", "attn_k", "attn_v", "attn_output"):
        return weight
    if kind == "attn_output":
        columns = weight.reshape(-1, llama.heads, llama.head)
        return np.pad(columns, ((0, 0), (0, 0), (0, head - llama.head))).reshape(len(weight), -1)
    if kind == "attn_v":
        rows = weight.reshape(llama.kv_heads, llama.head, -1)
        return np.pad(rows, ((0, 0), (0, head - llama.head), (0, 0))).reshape(-1, llama.hidden)
    pairs = weight.reshape(-1, llama.head // 2, 2, llama.hidden)
    wide = np.zeros((len(pairs), head // 2, 2, llama.hidden), np.float32)
    wide[:, ::times] = pairs * np.float32(math.sqrt(times)) if kind == "attn_q" else pairs
    return wide.reshape(-1, llama.hidden)


def _encode(values: Array, tensor: Tensor, checkpoint: Path) -> Array:
    if not np.isfinite(values).all():
        raise ExportError(f"{checkpoint}: {tensor.name} holds NaN or infinity; copy the checkpoint again")
    if tensor.type == F32:
        return np.ascontiguousarray(values)
    if np.abs(values).max() > LARGEST:
        type = tensor.type.name.lower()
        raise ExportError(f"{checkpoint}: {tensor.name} holds values too large for {type}; convert as f32")
    return quantize_rows(values, tensor.type.name)


def _add_vocabulary(writer: GGUFWriter, path: Path, size: int) -> None:
    """Add the `tokenizer.*` keys: SentencePiece with byte fallback, pieces merged by their scores."""
    pieces, scores = _read_vocabulary(path, size)
    first = len(_SPECIAL) + len(_BYTES)
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * len(_BYTES) + [TokenType.NORMAL] * (size - first)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*_SPECIAL, *_BYTES, *(piece.replace(" ", "▁") for piece in pieces[first:])])
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)  # stories are delimited by <s>: run.c also stops at the next one
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def _read_vocabulary(path: Path, size: int) -> tuple[list[str], list[float]]:
    """Pieces and scores of a tokenizer.bin: int32 longest piece, then score (f32), length (int32), bytes of each."""
    data, start = _read(path), 4
    pieces, scores = [], []
    try:
        for _ in range(size):
            score, length = struct.unpack_from("<fi", data, start)
            start += 8 + length
            pieces.append(data[start - length : start].decode("utf-8"))
            scores.append(score)
    except (struct.error, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is no llama2.c tokenizer of {size} pieces ({error}); copy it again") from error
    if start != len(data) or tuple(pieces[3:259]) != _BYTES:
        raise ExportError(f"{path} is no llama2.c tokenizer of {size} pieces; give the one of this checkpoint")
    return pieces, scores


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; copy checkpoint and tokenizer first") from error

"""Size of a GGUF file to the byte, computed before there are any weights (SPEC D1).

A file consists of its keys, a header per tensor, and the tensors, each padded to `ALIGNMENT` bytes. The size of the
keys is measured by writing them to a temporary file; llama.cpp's quantizer chooses the type of each tensor
(`compress.gguf.type_mixture`). Only a vocabulary that does not exist yet is estimated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES

from cogumi.compress.gguf.gguf_header import EMBEDDING, HEAD
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.layout import Llama, Tensor
from cogumi.compress.gguf.type_mixture import NONE, TENSOR_TYPES, stored_tensors
from cogumi.core.facts import FP32_PACKED
from cogumi.core.shapes import ModelShape

ALIGNMENT = 32
"""Every tensor of a GGUF file begins at a multiple of this."""
DUMMY_VOCABULARY = 32
"""Vocabulary size with which types and key sizes are computed: neither depends on it, so results can be cached."""
ZSTD = {"F32": FP32_PACKED, "F16": 0.92, "Q8_0": 0.96, "Q4_0": 0.96, "Q4_K": 0.98, "Q2_K": 0.96, "IQ4_NL": 0.98}
"""Compressed size (zstd level 10) of normally distributed weights, as a share; other types are incompressible."""
ZSTD_TEXT = 0.4
"""Compressed size of the keys, as a share; they are mostly the vocabulary's text."""
FIXED = 4 + 8
"""Bytes per id of a vocabulary besides its text: the token type and the text's length. A merge has the length only."""
VOCABULARIES = {"llama": (8.33, 2.189, 10.58), "qwen2": (9.03, 0.998, 10.03), "own": (3.87, 0.745, 5.59)}
"""Measured: bytes of text per id, merges per id, bytes of text per merge (Llama 3, Qwen2, the tiny recipe)."""
TEMPLATE = 3000
"""Bytes of a typical chat template and of all other tokenizer keys except ids and merges."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file: `keys` bytes of keys and headers, and its tensors with their stored types."""

    keys: int
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return _padded(self.keys) + sum(_padded(tensor.nbytes) for tensor in self.tensors)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def packed(self) -> int:
        """Estimated size after zstd, from the compression of random weights."""
        left = sum(ZSTD.get(tensor.type.name, 1.0) * tensor.nbytes for tensor in self.tensors)
        return int(left + ZSTD_TEXT * self.keys)

    @property
    def read(self) -> int:
        """Bytes read per token: all weights, except that an untied embedding contributes a single row."""
        read = [tensor.nbytes for tensor in self._multiplied]
        embedding = [t.nbytes // t.shape[0] for t in self.tensors if t.name == EMBEDDING]
        return sum(read) + (sum(embedding) if len(read) < len(self.tensors) else 0)

    def of_types(self, types: Collection[str]) -> int:
        """Bytes of the weights with these types, without an untied embedding."""
        return sum(tensor.nbytes for tensor in self._multiplied if tensor.type.name in types)

    @property
    def _multiplied(self) -> list[Tensor]:
        own_head = any(tensor.name == HEAD for tensor in self.tensors)
        return [tensor for tensor in self.tensors if not own_head or tensor.name != EMBEDDING]


def model_file(
    shape: ModelShape, type: str, vocabulary: int, types: Mapping[str, str] = NONE, importance: bool = False
) -> GgufFile:
    """The file that stage `gguf` writes for a model of this shape, with `vocabulary` bytes of tokenizer keys.

    `type`, `types`, `importance` and the errors raised are as in `type_mixture.stored_tensors`.
    """
    llama = replace(_llama(shape), vocabulary=DUMMY_VOCABULARY)
    tensors = _tensors(llama, type, tuple(types.items()), importance)
    ends = (EMBEDDING, HEAD)
    known = (replace(t, shape=(shape.vocabulary, t.shape[1])) if t.name in ends else t for t in tensors)
    return GgufFile(_keys(llama) + vocabulary, tuple(known))


def adapter_file(shape: ModelShape, ranks: Mapping[str, int], type: str = "f32", layers: int | None = None) -> GgufFile:
    """The file of a LoRA on this shape: A [rank, in] and B [out, rank] of every target in `layers` layers (all if
    None); `ranks` by target name.
    """
    shape = replace(shape, layers=layers or shape.layers)
    return _adapter(replace(_llama(shape), vocabulary=DUMMY_VOCABULARY), tuple(ranks.items()), type)


def bits(type: str) -> float:
    """Bits per weight of a tensor of that type."""
    weights, bytes = GGML_QUANT_SIZES[TENSOR_TYPES[type]]
    return float(8 * bytes / weights)


def vocabulary_bytes(vocabulary: Vocabulary, rows: int) -> int:
    """Bytes of the tokenizer's keys in a file with `rows` ids."""
    empty = _written("llama", lambda writer: None, ())
    return _written("llama", lambda writer: vocabulary.write(writer, rows), ()) - empty


def typical_vocabulary(family: str, rows: int) -> int:
    """Estimated bytes of the tokenizer's keys for `rows` ids of a vocabulary like one of `VOCABULARIES`."""
    text, merges, merge = VOCABULARIES[family]
    return int(rows * (FIXED + text + merges * (8 + merge))) + TEMPLATE


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _llama(shape: ModelShape) -> Llama:
    """The shape as a `Llama`; the values added do not affect any size."""
    return shape if isinstance(shape, Llama) else Llama(**asdict(shape), epsilon=1e-5, theta=10_000.0)


@lru_cache(maxsize=256)
def _tensors(llama: Llama, type: str, types: tuple[tuple[str, str], ...], importance: bool) -> tuple[Tensor, ...]:
    return tuple(stored_tensors(llama, type, dict(types), importance))


@lru_cache(maxsize=256)
def _adapter(llama: Llama, ranks: tuple[tuple[str, int], ...], type: str) -> GgufFile:
    stored, rank_of = TENSOR_TYPES[type], dict(ranks)
    tensors = []
    for weight in llama.tensors():
        rank = rank_of.get(weight.source.split(".")[-2]) if len(weight.shape) == 2 else None
        if rank:
            rows, columns = weight.shape
            tensors.append(Tensor("", f"{weight.name}.lora_a", (rank, columns)).stored(stored))
            tensors.append(Tensor("", f"{weight.name}.lora_b", (rows, rank)).stored(stored))

    def keys(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, 1.0)

    return GgufFile(_written(llama.kind, keys, tensors), tuple(tensors))


@lru_cache(maxsize=256)
def _keys(llama: Llama) -> int:
    """Bytes of a model's keys, without those of its tokenizer, and of its tensors' headers."""

    def keys(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        llama.write(writer)

    return _written(llama.kind, keys, llama.tensors())


def _written(kind: str, keys: Callable[[GGUFWriter], None], tensors: Sequence[Tensor]) -> int:
    """Bytes of a file with these keys and these tensors' headers, without the tensors' data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.gguf"
        writer = GGUFWriter(path, kind)
        keys(writer)
        for tensor in tensors:
            tensor.announce(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.stat().st_size

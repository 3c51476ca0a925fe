"""Models of real shapes with synthetic weights, to measure speed without a download (SPEC H4).

A synthetic model is a chain. Its layers are computed in full but add little to the embedding of the last token t, and
the head's row of one token, the successor of t, has the direction of t's embedding: greedy decoding runs through all
ordinary tokens from successor to successor, with a margin of about 20 nats. A draft is the same chain in a smaller
shape, in which some tokens have a wrong successor. So drafts of any acceptance rate can be made, and drafting,
verification and look-up take the same time as with trained weights. A model with tied embeddings has no chain: it
repeats its last token.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from cogumi.compress.gguf.export import writing
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.layout import Llama, Tensor
from cogumi.compress.gguf.type_mixture import FILE_TYPES, TENSOR_TYPES, stored_tensors
from cogumi.core.shapes import KNOWN, ModelShape
from cogumi.engine.llama.binding.quantize import quantize_rows

Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]

VERSION = 2
END = 0
"""The token that ends an answer; no chain contains it."""
BLOCK, BOOK = 256, 4096
"""Values per block of all K types, and size of the codebook of quantized random blocks of which all rows consist."""
MARGIN = 25.0
"""Logit of the successor; the next best is about 2 to 5."""
SMALL = 0.02
"""Scale of a layer's contribution to the residual stream."""
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that byte-level BPE writes as themselves; the others are written as characters from 256 on."""


def _llama(shape: ModelShape) -> Llama:
    return Llama(**asdict(shape), epsilon=1e-5, theta=500_000.0)


def _untied(layers: int, hidden: int, ff: int, heads: int, kv_heads: int, ids: int) -> Llama:
    return _llama(ModelShape(hidden, ff, layers, heads, kv_heads, 64, ids, 131_072, tied=False))


SHAPES = {
    "1b": _llama(replace(KNOWN["Llama-3.2-1B"], vocabulary=32_768, tied=False)),  # a chain needs an untied head
    "8b": _llama(KNOWN["Llama-3.1-8B"]),
    "draft": _untied(12, 1024, 2816, 16, 4, 32_768),
    "pico": _untied(2, 256, 512, 4, 2, 1024),
}


def drafting_for(shape: str) -> Llama:
    """The shape of a draft: `draft` with the vocabulary of `shape`, or a quarter of the layers of a small shape."""
    target, draft = SHAPES[shape], SHAPES["draft"]
    if target.layers > draft.layers:
        return replace(draft, vocabulary=target.vocabulary)
    return replace(target, layers=max(target.layers // 4, 1))


def chain(vocabulary: int) -> Ids:
    """All ordinary ids in the order of decoding; the chain is a cycle."""
    return np.random.default_rng(vocabulary).permutation(np.arange(END + 1, vocabulary))


def make_model(folder: Path, shape: str, type: str = "q4_k_m") -> Path:
    """The chain in a named shape, in a type that needs no importance matrix; cached in `folder`."""
    return make_weights(folder, shape, SHAPES[shape], type)


def make_draft(folder: Path, shape: str, accept: float, type: str = "q4_k_m") -> Path:
    """A draft for `shape` with acceptance rate `accept`."""
    return make_weights(folder, f"draft-{accept:g}-for-{shape}", drafting_for(shape), type, accept)


def make_adapter(folder: Path, shape: str, size: int) -> Path:
    """A LoRA of about `size` bytes for every projection of a shape, too small in effect to change the chain."""
    rank = max(size // (4 * sum(sum(t.shape) for t in _projections(SHAPES[shape]))), 1)
    rank += rank % 4 == 0  # see Model.load_adapter
    return make_lora(folder, shape, SHAPES[shape], rank)


def make_lora(folder: Path, name: str, llama: Llama, rank: int, type: str = "f32") -> Path:
    """A LoRA of that rank and type for every projection, too small in effect to change greedy answers."""
    path = folder / f"{name}-adapter-{rank}-{type}-{digest(llama)}.gguf"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(None, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    tensors = []
    for t in _projections(llama):
        tensors.append(Tensor("", f"{t.name}.lora_a", (rank, t.shape[1])).stored(TENSOR_TYPES[type]))
        tensors.append(Tensor("", f"{t.name}.lora_b", (t.shape[0], rank)).stored(TENSOR_TYPES[type]))
    generator = np.random.default_rng(rank)
    with writing(writer, tensors, path):
        for t in tensors:
            values = generator.standard_normal(t.shape, np.float32) * np.float32(SMALL / t.shape[1] ** 0.5)
            writer.write_tensor_data(quantize_rows(values, t.type.name))
    return path


def _projections(llama: Llama) -> list[Tensor]:
    return [t for t in llama.tensors() if t.name.startswith("blk.") and len(t.shape) == 2]


def digest(*parts: object) -> str:
    """A short hash of the parameters of a file, for its name."""
    return hashlib.sha256(repr((VERSION, BOOK, MARGIN, SMALL, parts)).encode()).hexdigest()[:8]


def make_weights(folder: Path, name: str, llama: Llama, type: str, accept: float = 1.0) -> Path:
    """The chain in any shape, with the right successor for a share `accept` of the tokens; cached in `folder`."""
    path = folder / f"{name}-{type}-{digest(llama, accept)}.gguf"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(None, "llama")
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    llama.write(writer)
    _vocabulary(llama.vocabulary).write(writer, llama.vocabulary)
    tensors = stored_tensors(llama, type)
    generator = np.random.default_rng(len(name))
    embedding, head = _ends(llama, accept, generator)
    drawn: dict[tuple[str, Type], Bytes] = {}
    with writing(writer, tensors, path):
        for t in tensors:
            kind = t.name.split(".")[-2]
            if len(t.shape) == 1:
                scale = MARGIN / llama.hidden if llama.tied and kind == "output_norm" else 1.0
                writer.write_tensor_data(np.full(t.shape, scale, np.float32))
            elif kind in ("token_embd", "output"):
                writer.write_tensor_data(_rows(t, head if kind == "output" else embedding))
            else:  # all layers share the bytes of one, which does not change the time to read and compute them
                if (kind, t.type) not in drawn:
                    drawn[kind, t.type] = _rows(t, generator.integers(0, BOOK, (t.shape[0], t.shape[1] // BLOCK)))
                writer.write_tensor_data(drawn[kind, t.type])
    _book.cache_clear()
    return path


def _ends(llama: Llama, accept: float, generator: np.random.Generator) -> tuple[Ids, Ids]:
    """Codebook indices of the rows of the embedding and of the head, (vocabulary, blocks per row).

    The head's row of a token is the embedding of its predecessor. A random share 1 - `accept` of the tokens exchange
    their successors, so that each of them has a wrong one.
    """
    n, blocks = llama.vocabulary, llama.hidden // BLOCK
    embedding = np.stack([generator.permutation(n) % BOOK for _ in range(blocks)], axis=1)
    order = chain(n)
    successors = np.roll(order, -1)
    wrong = generator.choice(len(order), round((1 - accept) * len(order)), replace=False)
    successors[wrong] = successors[np.roll(wrong, 1)]
    predecessors = np.arange(n)
    predecessors[successors] = order
    return embedding, embedding[predecessors]


@cache
def _book(type: Type, scale: float) -> Bytes:
    """The codebook of quantized blocks (`BOOK`, bytes per block), scaled by `scale`."""
    values = np.random.default_rng(BLOCK).standard_normal((BOOK, BLOCK), np.float32)
    return quantize_rows(values * np.float32(scale), type.name)


def _rows(tensor: Tensor, blocks: Ids) -> Bytes:
    """The bytes of a tensor whose rows consist of these blocks (rows, blocks per row)."""
    width = tensor.shape[1]
    kind = tensor.name.split(".")[-2]
    scales = {"token_embd": 1.0, "output": MARGIN / width, "attn_output": SMALL * width**-0.5}
    scales["ffn_down"] = scales["attn_output"]
    book = _book(tensor.type, scales.get(kind, width**-0.5))
    whole = book.view(f"V{book.shape[1]}").reshape(-1)  # a block as one item: much faster to copy
    return whole[blocks].view(np.uint8).reshape(tensor.shape[0], -1)


def _vocabulary(n: int) -> Vocabulary:
    """A vocabulary of all 256 bytes and synthetic words, so that any text can be encoded."""
    characters = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
    letters = "etaoinsrhldcumfp"
    pieces = ["Ġ" + "".join(letters[i >> shift & 15] for shift in range(16, -4, -4)) for i in range(n)]
    tokens = ["<|end|>", *characters, "Ġt", *pieces][:n]
    return Vocabulary(
        pre="gpt-2",
        tokens=dict(enumerate(tokens)),
        merges=("Ġ t",),
        control=frozenset({END}),
        defined=frozenset(),
        bos=None,
        eos=END,
        pad=None,
        unk=None,
        add_bos=False,
        add_eos=False,
        template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )

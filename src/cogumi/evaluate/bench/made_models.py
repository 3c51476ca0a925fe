"""Models of real shapes with made-up weights: speed can be shown without downloading any (SPEC H4).

A made-up model is a chain. Its layers are computed in full but add little to the embedding of the last token t, and
the head's row of one token, the follower of t, points where the embedding of t points: greedy decoding walks from
follower to follower through all ordinary tokens, with a margin of about 20 nats. A draft is the same chain in a
smaller shape, in which some tokens have a wrong follower. So a draft of any acceptance can be had, and drafting,
verifying and looking up cost what they cost with trained weights. A model whose head is its embedding has no chain: it
says its last token again and again.
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
"""The token that ends an answer; no chain reaches it."""
BLOCK, BOOK = 256, 4096
"""Values per block of all K types, and blocks that are drawn and quantized; every row is put together from those."""
MARGIN = 25.0
"""Logit of the follower; the best of the others has about 2 to 5."""
SMALL = 0.02
"""Size of what a layer adds to the embedding."""
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that byte-level BPE writes as themselves; the others are written as characters from 256 on."""


def _llama(shape: ModelShape) -> Llama:
    return Llama(**asdict(shape), epsilon=1e-5, theta=500_000.0)


def _made_up(layers: int, hidden: int, ff: int, heads: int, kv_heads: int, ids: int) -> Llama:
    return _llama(ModelShape(hidden, ff, layers, heads, kv_heads, 64, ids, 131_072, tied=False))


SHAPES = {
    "1b": _llama(replace(KNOWN["Llama-3.2-1B"], vocabulary=32_768, tied=False)),  # a chain needs a head of its own
    "8b": _llama(KNOWN["Llama-3.1-8B"]),
    "draft": _made_up(12, 1024, 2816, 16, 4, 32_768),
    "pico": _made_up(2, 256, 512, 4, 2, 1024),
}


def drafting_for(shape: str) -> Llama:
    """The shape of a draft: `draft` with the vocabulary of `shape`, or a quarter of the layers of a small shape."""
    target, draft = SHAPES[shape], SHAPES["draft"]
    if target.layers > draft.layers:
        return replace(draft, vocabulary=target.vocabulary)
    return replace(target, layers=max(target.layers // 4, 1))


def chain(vocabulary: int) -> Ids:
    """All ordinary ids in the order in which decoding walks through them; after the last comes the first."""
    return np.random.default_rng(vocabulary).permutation(np.arange(END + 1, vocabulary))


def make_model(folder: Path, shape: str, type: str = "q4_k_m") -> Path:
    """The chain in a named shape, in a type that needs no importance matrix; made once and kept in `folder`."""
    return make_weights(folder, shape, SHAPES[shape], type)


def make_draft(folder: Path, shape: str, accept: float, type: str = "q4_k_m") -> Path:
    """A draft for `shape` of which a share `accept` of the drafted tokens is right."""
    return make_weights(folder, f"draft-{accept:g}-for-{shape}", drafting_for(shape), type, accept)


def make_adapter(folder: Path, shape: str, size: int) -> Path:
    """A LoRA of about `size` bytes for every projection of a shape; small enough to leave the chain as it is."""
    rank = max(size // (4 * sum(sum(t.shape) for t in _projections(SHAPES[shape]))), 1)
    rank += rank % 4 == 0  # see Model.load_adapter
    return make_lora(folder, shape, SHAPES[shape], rank)


def make_lora(folder: Path, name: str, llama: Llama, rank: int, type: str = "f32") -> Path:
    """A LoRA of that rank and type for every projection, too small to change what greedy decoding says."""
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
    """Names files by what they were made of."""
    return hashlib.sha256(repr((VERSION, BOOK, MARGIN, SMALL, parts)).encode()).hexdigest()[:8]


def make_weights(folder: Path, name: str, llama: Llama, type: str, accept: float = 1.0) -> Path:
    """The chain in any shape, which follows itself in a share `accept` of the tokens."""
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
            else:  # all layers repeat the bytes of one: they are read and computed all the same
                if (kind, t.type) not in drawn:
                    drawn[kind, t.type] = _rows(t, generator.integers(0, BOOK, (t.shape[0], t.shape[1] // BLOCK)))
                writer.write_tensor_data(drawn[kind, t.type])
    _book.cache_clear()
    return path


def _ends(llama: Llama, accept: float, generator: np.random.Generator) -> tuple[Ids, Ids]:
    """Which blocks make each row of the embedding and of the head, (vocabulary, blocks per row).

    The head's row of a token is the embedding of the token before it. A share 1 - `accept` of the tokens, drawn at
    random, exchange their followers, so that each has a wrong one.
    """
    n, blocks = llama.vocabulary, llama.hidden // BLOCK
    embedding = np.stack([generator.permutation(n) % BOOK for _ in range(blocks)], axis=1)
    order = chain(n)
    followers = np.roll(order, -1)
    wrong = generator.choice(len(order), round((1 - accept) * len(order)), replace=False)
    followers[wrong] = followers[np.roll(wrong, 1)]
    before = np.arange(n)
    before[followers] = order
    return embedding, embedding[before]


@cache
def _book(type: Type, scale: float) -> Bytes:
    """The blocks (`BOOK`, bytes per block), times `scale`."""
    values = np.random.default_rng(BLOCK).standard_normal((BOOK, BLOCK), np.float32)
    return quantize_rows(values * np.float32(scale), type.name)


def _rows(tensor: Tensor, blocks: Ids) -> Bytes:
    """The bytes of a tensor whose rows are made of these blocks (rows, blocks per row)."""
    width = tensor.shape[1]
    kind = tensor.name.split(".")[-2]
    scales = {"token_embd": 1.0, "output": MARGIN / width, "attn_output": SMALL * width**-0.5}
    scales["ffn_down"] = scales["attn_output"]
    book = _book(tensor.type, scales.get(kind, width**-0.5))
    whole = book.view(f"V{book.shape[1]}").reshape(-1)  # a block as one item: much faster to copy
    return whole[blocks].view(np.uint8).reshape(tensor.shape[0], -1)


def _vocabulary(n: int) -> Vocabulary:
    """All 256 bytes and made-up pieces, so that any text can be read."""
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
        add_bos=False,
        add_eos=False,
        template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )

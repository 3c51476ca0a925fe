"""GGUF files that are no whole text model: parts of a split model, and an embedding model."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter


def split(source: Path, name: Path, count: int) -> list[Path]:
    """Divide a model into `count` files as llama.cpp names them: only the first one has the keys."""
    reader = GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(name, architecture, split_max_tensors=-(-len(reader.tensors) // count))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    _finish(writer)
    return sorted(name.parent.glob(f"{name.stem}-0*-of-0*.gguf"))


def embedding_model(path: Path) -> Path:
    """A BERT of two layers with random weights, as llama.cpp's converter writes it."""
    draw, hidden, layers = np.random.default_rng(0), 64, 2
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *("▁" + chr(97 + i) for i in range(26)), *map(chr, range(97, 123))]
    writer = GGUFWriter(path, "bert")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_block_count(layers)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", 1)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_token_type_count(2)
    for number, name in enumerate(("padding", "unknown", "cls", "seperator")):  # the key is spelled so
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)

    def add(name, *shape):
        writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))

    def norm(name):
        add(f"{name}.weight", hidden)
        add(f"{name}.bias", hidden)

    def linear(name, rows, columns):
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows)

    add("token_embd.weight", len(tokens), hidden)
    add("token_types.weight", 2, hidden)
    add("position_embd.weight", 64, hidden)
    norm("token_embd_norm")
    for block in (f"blk.{i}" for i in range(layers)):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{block}.{name}", hidden, hidden)
        linear(f"{block}.ffn_up", 2 * hidden, hidden)
        linear(f"{block}.ffn_down", hidden, 2 * hidden)
        norm(f"{block}.attn_output_norm")
        norm(f"{block}.layer_output_norm")
    _finish(writer)
    return path


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

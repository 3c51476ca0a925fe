"""Export a model with the shape of a published one and measure it.

Usage: `python tests/support/real_shape.py Llama-3.1-8B /tmp/folder q4_k_m q5_k_m`.

Writes a bf16 checkpoint in shards whose weights repeat random numbers, with Llama 3's own vocabulary, exports it in
a separate process for each type, prints size, seconds and peak memory as JSON, and removes its files.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np

from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.layout import Llama
from cogumi.core.shapes import KNOWN, ModelShape

SHARD = 5 * 10**9
"""Bytes of a shard, as the Hub has them."""
PERIOD = (1 << 24) + 1
"""Numbers drawn; an odd count, so that no two rows of a matrix are alike."""


def checkpoint(folder: Path, shape: ModelShape, zeros: bool = False) -> Path:
    """A Hugging Face folder of that shape; with all-zero weights, quantization takes almost no time."""
    from support.vocabularies import LLAMA_CONTROL, LLAMA_TEMPLATE, llama3_document

    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(llama3_document()), "utf-8")
    settings = {"bos_token": LLAMA_CONTROL[0], "eos_token": "<|eot_id|>", "chat_template": LLAMA_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "eos_token_id": 128009,
    }
    (folder / "config.json").write_text(json.dumps(config))
    drawn = np.random.default_rng(0).standard_normal(PERIOD, np.float32) * np.float32(0 if zeros else 0.02)
    numbers = (drawn.view(np.uint32) >> 16).astype(np.uint16)  # bf16 is the upper half of f32
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for tensor in Llama(**asdict(shape), epsilon=1e-5, theta=5e5).tensors():
        if sum(2 * prod(other) for other in shards[-1].values()) + 2 * prod(tensor.shape) > SHARD:
            shards.append({})
        shards[-1][tensor.source] = tensor.shape
    placed = {}
    for i, shapes in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shapes, numbers)
        placed |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], numbers: np.ndarray) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end // 2, len(numbers)):
            numbers[: end // 2 - start].tofile(file)


def exported(folder: Path, out: Path, type: str) -> dict[str, float]:
    """Bytes, seconds and peak resident bytes of an export in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(folder), str(out), type], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def _one(folder: str, out: str, type: str) -> None:
    began = time.perf_counter()
    export_model(Path(folder), Path(out), type)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"bytes": Path(out).stat().st_size, "seconds": time.perf_counter() - began, "peak_bytes": peak}))


def main(name: str, folder: Path, types: Sequence[str], zeros: bool) -> None:
    """Measure the exports, print the figures and remove the files."""
    try:
        checkpoint(folder, KNOWN[name], zeros)
        for type in types:
            print(
                json.dumps({"shape": name, "type": type, **exported(folder, folder / "model.gguf", type)}), flush=True
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        _one(*sys.argv[2:])
    else:
        zeros = "--zeros" in sys.argv
        name, folder, *types = (argument for argument in sys.argv[1:] if argument != "--zeros")
        main(name, Path(folder), types, zeros)

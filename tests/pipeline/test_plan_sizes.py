"""Planned sizes equal those of real files and the published sizes of models."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.compress.gguf.file_sizes import (
    VOCABULARIES,
    ZSTD,
    adapter_file,
    model_file,
    typical_vocabulary,
    vocabulary_bytes,
)
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.gguf.planned_files import weights_of_gguf
from cogumi.compress.gguf.type_mixture import stored_tensors
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.errors import ExportError
from cogumi.core.shapes import KNOWN
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.binding.quantize import quantize_rows
from cogumi.evaluate.bench.roofline import weight_bytes
from cogumi.evaluate.bench.synthetic_models import SHAPES, make_weights
from cogumi.pipeline.plan.bundle_memory import CACHES, REPACKED, Serving, memory
from support.pico import make_adapter, make_model, make_tokenizer
from support.public_data import public_data
from support.real import llama3, qwen2

PUBLISHED = {
    "Llama-3.2-1B": 807_694_464,
    "Llama-3.2-3B": 2_019_377_696,
    "Llama-3.1-8B": 4_920_739_232,
    "Qwen2.5-0.5B": 397_808_192,
}
"""Bytes of the `-Instruct-Q4_K_M.gguf` files that are given out of these models."""
TYPES = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k")


def planned(folder, type):
    llama = Llama.load(folder)
    return model_file(llama, type, vocabulary_bytes(Vocabulary.load(folder), llama.vocabulary))


def wide_qwen(folder):
    make_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=530,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=4,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Rows of complete K-quant blocks (256) in both architectures, and rows (64) that need another type."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": make_model(root / "llama", hidden=256),
        "qwen2": wide_qwen(root / "qwen2"),
        "narrow llama": llama3(root / "llama3", tied=False),
        "narrow qwen2": qwen2(root / "qwen"),
    }


@pytest.mark.parametrize(
    ("name", "type"),
    [
        *(("llama", type) for type in TYPES),
        *(("qwen2", type) for type in ("q8_0", "q5_k_m", "q4_k_m", "q3_k_m")),
        *((f"narrow {kind}", type) for kind in ("llama", "qwen2") for type in ("f16", "q8_0", "q4_k_m")),
    ],
)
def test_file_size_equals_the_plan(folders, tmp_path, name, type):
    out = tmp_path / "model.gguf"
    export_model(folders[name], out, type)
    file = planned(folders[name], type)
    assert file.bytes == out.stat().st_size
    assert file.read == weight_bytes(out)
    found = weights_of_gguf(out)
    assert (found.type, found.types) == (type, ())
    assert found.file.bytes == file.bytes


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
def test_adapter_size_equals_the_plan(folders, tmp_path, type):
    folder = make_adapter(tmp_path / "adapter", folders["llama"], rank=32)
    export_adapter(folder, folders["llama"], tmp_path / "adapter.gguf", type)
    shape = Llama.load(folders["llama"])
    assert (
        adapter_file(shape, dict.fromkeys(shape.linear, 32), type).bytes == (tmp_path / "adapter.gguf").stat().st_size
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_planned_sizes_equal_published_file_sizes(name):
    """Within 0.01%, although the size of their vocabularies is estimated."""
    shape = KNOWN[name]
    bytes = model_file(shape, "q4_k_m", typical_vocabulary(shape.kind, shape.vocabulary)).bytes
    assert bytes == pytest.approx(PUBLISHED[name], rel=1e-4)


@pytest.mark.parametrize("type", ["q4_k_m", "q8_0"])
def test_synthetic_model_of_a_published_shape_has_the_planned_size(tmp_path, type):
    llama = replace(SHAPES["draft"], layers=3, vocabulary=2048)
    path = make_weights(tmp_path, "some", llama, type)
    found = weights_of_gguf(path)
    assert (found.shape.layers, found.shape.hidden, found.shape.vocabulary, found.type) == (3, llama.hidden, 2048, type)
    assert found.file.bytes == path.stat().st_size


@given(
    st.sampled_from(["Llama-3.2-1B", "Qwen2.5-0.5B", "Llama-3.1-8B"]),
    st.sampled_from(TYPES),
    st.integers(2, 200_000),
    st.integers(1, 12),
)
@settings(max_examples=6, deadline=None)
def test_types_do_not_depend_on_the_vocabulary(name, type, ids, layers):
    shape = replace(KNOWN[name], vocabulary=ids, layers=layers)
    expected = stored_tensors(Llama(**{f: getattr(shape, f) for f in shape.__slots__}, epsilon=1e-5, theta=1e4), type)
    found = model_file(shape, type, 0).tensors
    assert [(t.name, t.shape, t.type) for t in found] == [(t.name, t.shape, t.type) for t in expected]


def test_vocabulary_size_is_estimated_from_published_ones():
    root = public_data("tokenizer_llama3")
    tokens = list(json.loads((root / "encoder.json").read_text("utf-8")))
    merges = [line for line in (root / "vocab.bpe").read_text("utf-8").split("\n") if line and line[0] != "#"]
    text = sum(len(token.encode()) for token in tokens) / len(tokens)
    merge = sum(len(line.encode()) for line in merges) / len(merges)
    assert (text, len(merges) / len(tokens), merge) == pytest.approx(VOCABULARIES["llama"], rel=0.005)


@pytest.mark.parametrize(
    "type", ["F32", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "Q4_0", "IQ4_NL"]
)
def test_estimated_zstd_ratio_holds_for_random_weights(type):
    values = (np.random.default_rng(0).standard_normal((64, 4096)) * 0.02).astype(np.float32)
    plain = {"F32": np.float32, "F16": np.float16}
    raw = (values.astype(plain[type]) if type in plain else quantize_rows(values, type)).tobytes()
    left = len(zstandard.ZstdCompressor(level=10).compress(raw)) / len(raw)
    assert left == pytest.approx(ZSTD.get(type, 1.0), abs=0.02)


def test_damaged_and_foreign_files_are_refused_in_one_line(folders, tmp_path):
    whole = tmp_path / "model.gguf"
    export_model(folders["llama"], whole, "q8_0")
    data = whole.read_bytes()
    adapter = make_adapter(tmp_path / "adapter", folders["llama"])
    export_adapter(adapter, folders["llama"], tmp_path / "adapter.gguf")
    cut = {"empty": b"", "text": b"no model" * 9, "header": data[:300], "keys": data[:5000], "tensors": data[:-5000]}
    for name, content in cut.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    for name in (*cut, "adapter", "missing"):
        with pytest.raises(ExportError) as caught:
            weights_of_gguf(tmp_path / f"{name}.gguf")
        assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="is an adapter, not a model"):
        weights_of_gguf(tmp_path / "adapter.gguf")
    foreign = data.replace(b"llama", b"gemma")
    (tmp_path / "foreign.gguf").write_bytes(foreign)
    with pytest.raises(ExportError, match="is a gemma; supported: llama, qwen2"):
        weights_of_gguf(tmp_path / "foreign.gguf")


# --- memory ---


@pytest.mark.parametrize("cache", CACHES)
def test_planned_cache_bytes_per_token_equal_the_engines(folders, tmp_path, cache):
    for name in ("llama", "qwen2"):
        export_model(folders[name], tmp_path / "model.gguf", "q8_0")
        shape = Llama.load(folders[name])
        assert Serving(cache=cache).cache_bytes(shape) == Model(tmp_path / "model.gguf").cache_bytes(cache)


CHILD = """
import re, sys
from pathlib import Path
from cogumi.cascade import opening
from cogumi.engine.protocol import final_reply
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.core.types import Request
path, repack = Path(sys.argv[1]), sys.argv[2] == "1"
engine = LlamaEngine(path, slots=1, context=1024, threads=1, repack=repack, lookup=False)
final_reply(engine.generate(Request(prompt=tuple(range(300, 400)), max_tokens=8)))
print(1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
engine.close()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_memory_of_an_open_model_equals_the_plan(tmp_path):
    """Includes repacked weights on processors that repack; with AMX llama.cpp repacks more types than are planned."""
    llama = replace(SHAPES["draft"], layers=6, vocabulary=8192)
    path = make_weights(tmp_path, "some", llama, "q4_k_m")
    plan = memory(Parts("some", weights_of_gguf(path)), Serving(context=1024))
    taken = {}
    for repack in (True, False):
        command = [sys.executable, "-c", CHILD, str(path), str(int(repack))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        taken[repack] = int(done.stdout)
        assert plan.total(repack) == pytest.approx(taken[repack], rel=0.1), (repack, plan, taken)
    assert plan.repacked == planned_repacking(llama)
    features = llama_cpp.llama_print_system_info()
    if b"AMX_INT8 = 1" in features:
        assert taken[True] - taken[False] > 0.9 * plan.repacked
    elif b"AVX2 = 1" in features:
        assert taken[True] - taken[False] == pytest.approx(plan.repacked, rel=0.1)


def planned_repacking(shape):
    """Independent count: every matrix of a repacked type except the embedding, whose rows are only looked up."""
    return sum(
        t.nbytes for t in stored_tensors(shape, "q4_k_m") if t.type.name in REPACKED and t.name != "token_embd.weight"
    )

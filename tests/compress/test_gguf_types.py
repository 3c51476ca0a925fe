"""Every GGUF type is byte for byte what llama.cpp's own quantizer writes, without an intermediate f32 file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.layout import Llama, Tensor
from cogumi.compress.gguf.type_mixture import TENSOR_TYPES, stored_tensors, types_of
from cogumi.compress.gguf.weights import Weights
from cogumi.core.errors import ExportError
from cogumi.core.files import sha256
from cogumi.engine.llama.binding.quantize import quantize_rows
from support.gguf import edit, llama, stock_quantize
from support.pico import make_model
from support.real import qwen2

TYPES = ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "q3_k_m", "q2_k"]
LOW = ["q2_k_s", "iq2_xxs"]
"""Types that need an importance matrix."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """8 query heads share 4 key-value heads; with 4 layers, mixed types differ between layers."""
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": make_model(root / "tied", hidden=256, layers=4),
        "untied": make_model(root / "untied", hidden=256, layers=1, tied=False),
        "qwen2": qwen2(root / "qwen2"),
        "narrow": make_model(root / "narrow", hidden=96),
    }


@pytest.fixture(scope="module")
def f32_files(folders) -> dict[str, Path]:
    """The same models as f32 files."""
    for folder in folders.values():
        export_model(folder, folder / "f32.gguf", "f32")
    return {name: folder / "f32.gguf" for name, folder in folders.items()}


def synthetic_importance(folder: Path) -> dict[str, np.ndarray]:
    """Column importances over a wide range, for every matrix except an embedding that is not tied to the head."""
    draw = np.random.default_rng(1)
    llama = Llama.load(folder)
    matrices = [t for t in llama.tensors() if len(t.shape) == 2 and (llama.tied or t.name != "token_embd.weight")]
    return {t.name: draw.lognormal(0, 2, t.shape[1]).astype(np.float32) for t in matrices}


def save_importance(folder: Path, out: Path) -> Path:
    save_arrays(synthetic_importance(folder), out, {"base_sha256": sha256(folder / "model.safetensors")})
    return out


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    stored = {t.name: t for t in GGUFReader(theirs).tensors}
    written = GGUFReader(ours).tensors
    assert {t.name for t in written} == set(stored)
    for tensor in written:
        assert tensor.tensor_type == stored[tensor.name].tensor_type, tensor.name
        assert np.array_equal(tensor.data, stored[tensor.name].data), tensor.name


@pytest.mark.parametrize(
    ("kind", "type"),
    [("untied", type) for type in TYPES]
    + [(kind, type) for kind in ("tied", "qwen2", "narrow") for type in ("q8_0", "q5_k_m", "q4_k_m", "q4_0")],
)
def test_every_type_equals_llama_cpps_quantizer(tmp_path, folders, f32_files, kind, type):
    export_model(folders[kind], tmp_path / "ours.gguf", type, threads=2)
    stock_quantize(f32_files[kind], tmp_path / "theirs.gguf", type)
    assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.gguf", "theirs.gguf"]


@pytest.mark.parametrize(
    ("kind", "type"),
    [("untied", type) for type in ("q6_k", "q5_k_m", "q4_k_m", "q5_0", "q3_k_m", "q2_k_s")] + [("tied", "q4_0")],
)
def test_types_with_an_importance_matrix_equal_llama_cpps_quantizer(tmp_path, folders, f32_files, kind, type):
    importance = save_importance(folders[kind], tmp_path / "importance.safetensors")
    export_model(folders[kind], tmp_path / "ours.gguf", type, importance=importance)
    stock_quantize(f32_files[kind], tmp_path / "theirs.gguf", type, synthetic_importance(folders[kind]))
    assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    if type not in LOW:
        export_model(folders[kind], tmp_path / "without.gguf", type)
        assert (tmp_path / "without.gguf").read_bytes() != (tmp_path / "ours.gguf").read_bytes()


@pytest.mark.parametrize("type", LOW)
def test_types_that_need_an_importance_matrix_are_refused_without(tmp_path, folders, type):
    with pytest.raises(ExportError, match=f"type {type} needs an importance matrix"):
        export_model(folders["untied"], tmp_path / "m.gguf", type)


def test_mixture_of_types_is_computed_from_the_shape(folders):
    llama = Llama.load(folders["tied"])
    types = types_of(llama, "q4_k_m")
    assert set(types) == {t.name for t in llama.tensors()}
    assert {types[f"blk.{i}.ffn_down.weight"].name for i in range(4)} == {"Q4_K", "Q6_K"}
    assert types["token_embd.weight"].name == "Q6_K"  # the tied embedding is also the head
    assert types_of(replace(llama, tied=False), "q4_k_m")["token_embd.weight"].name == "Q4_K"


def test_importance_matrix_changes_the_mixture_of_types(folders):
    llama = replace(Llama.load(folders["tied"]), layers=8)
    without, with_it = types_of(llama, "q4_0"), types_of(llama, "q4_0", importance=True)
    assert {name for name in without if without[name] != with_it[name]} == {"blk.0.ffn_down.weight"}


@pytest.mark.parametrize("type", ["f32", "q8_0", "q5_k_m", "q4_k_m"])
def test_planned_size_equals_the_size_written(tmp_path, folders, type):
    planned = stored_tensors(Llama.load(folders["tied"]), type)
    written = export_model(folders["tied"], tmp_path / "m.gguf", type)
    assert written == planned
    assert sum(t.nbytes for t in planned) == sum(t.n_bytes for t in GGUFReader(tmp_path / "m.gguf").tensors)


# --- types by tensor ---


def test_types_by_tensor_name_pattern(tmp_path, folders):
    types = {"blk.0.*": "q6_k", "blk.*.ffn_down.weight": "q8_0", "token_embd.weight": "bf16"}
    export_model(folders["tied"], tmp_path / "mixed.gguf", "q4_0", types)
    export_model(folders["tied"], tmp_path / "plain.gguf", "q4_0")
    plain = {t.name: t for t in GGUFReader(tmp_path / "plain.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "mixed.gguf").tensors:
        name = tensor.name
        if name.endswith("norm.weight"):
            assert tensor.tensor_type.name == "F32"
        elif name.startswith("blk.0."):
            assert tensor.tensor_type.name == "Q6_K"  # the first matching pattern applies
        elif name.endswith("ffn_down.weight"):
            assert tensor.tensor_type.name == "Q8_0"
        elif name == "token_embd.weight":
            assert tensor.tensor_type.name == "BF16"
        else:
            assert np.array_equal(tensor.data, plain[name].data)
    assert llama(tmp_path / "mixed.gguf").create_completion([7, 8], max_tokens=3)["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"blk.9.attn_q.weight": "q8_0"}, r"'blk.9.attn_q.weight' matches no matrix .* 'blk.\*.attn_q.weight'"),
        ({"blk.0.attn_norm.weight": "q8_0"}, "matches no matrix"),
        ({"blk.0.*": "q7_k"}, "unknown type 'q7_k' for 'blk.0.*'; did you mean 'q"),
    ],
)
def test_patterns_that_match_nothing_are_refused(tmp_path, folders, types, message):
    with pytest.raises(ExportError, match=message):
        export_model(folders["tied"], tmp_path / "m.gguf", "q4_0", types)
    assert not list(tmp_path.iterdir())


def test_type_whose_blocks_do_not_fit_the_rows_is_refused(tmp_path, folders):
    with pytest.raises(ExportError, match="rows of 64 values, and q6_k takes 256"):
        export_model(folders["qwen2"], tmp_path / "m.gguf", "q8_0", {"*attn_q.weight": "q6_k"})


# --- checkpoints of several files ---


def shard(folder: Path, out: Path, parts: int) -> Path:
    """The same model in several files, as large models are stored on the Hub."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    weights = load_file(folder / "model.safetensors")
    placed = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(placed.values()):
        save_file({name: weights[name] for name in placed if placed[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return out


@pytest.mark.parametrize("type", ["f32", "q4_k_m"])
def test_sharded_checkpoint_gives_the_same_file(tmp_path, folders, type):
    sharded = shard(folders["untied"], tmp_path / "sharded", 3)
    export_model(sharded, tmp_path / "shards.gguf", type)
    export_model(folders["untied"], tmp_path / "one.gguf", type)
    assert (tmp_path / "shards.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert Weights.load(folders["untied"]).sha256 == sha256(folders["untied"] / "model.safetensors")
    before = Weights.load(sharded).sha256
    name = "model-00002-of-00003.safetensors"
    save_file({n: w + 1 for n, w in load_file(sharded / name).items()}, sharded / name)
    assert Weights.load(sharded).sha256 != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m: (f / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors is missing"),
        (
            lambda f, m: edit(f / "model.safetensors.index.json", weight_map=m | {"lm_head.weight": "../x"}),
            "weight_map",
        ),
        (lambda f, m: edit(f / "model.safetensors.index.json", weight_map=[]), "weight_map"),
        (
            lambda f, m: edit(f / "model.safetensors.index.json", weight_map=m | {"more.weight": m["lm_head.weight"]}),
            "lacks more.weight, which model.safetensors.index.json lists",
        ),
    ],
)
def test_invalid_shard_index_is_refused(tmp_path, folders, change, message):
    sharded = shard(folders["untied"], tmp_path / "sharded", 3)
    change(sharded, json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"])
    with pytest.raises(ExportError, match=message):
        export_model(sharded, tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.glob("m.gguf*"))


# --- rows ---


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rows_are_quantized_independently(data):
    """So threads can split the rows of a tensor without changing bytes."""
    type = data.draw(st.sampled_from(["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16"]))
    rows = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(data.draw(st.integers(1, 6)), 256))
    rows = rows.astype(np.float32)
    columns = data.draw(st.sampled_from([None, np.linspace(0, 9, 256, dtype=np.float32)]))
    together = quantize_rows(rows, type, columns)
    assert np.array_equal(together, np.concatenate([quantize_rows(row[None], type, columns) for row in rows]))


def test_importance_reduces_the_weighted_error():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(64, 512)).astype(np.float32)
    columns = draw.lognormal(0, 2, 512).astype(np.float32)

    def cost(type: str, importance) -> float:
        values = dequantize(quantize_rows(rows, type, importance), TENSOR_TYPES[type.lower()])
        return float((columns * (values - rows) ** 2).sum())

    for type in ("Q4_0", "Q5_0", "Q4_K", "Q3_K"):
        assert cost(type, columns) < 0.95 * cost(type, None), type


@pytest.mark.parametrize(
    "type", [t for t in TENSOR_TYPES if not t.startswith(("iq1", "iq2"))]
)  # their lookup tables take long to build
def test_row_size_of_every_type_equals_the_planned_size(type):
    written = quantize_rows(np.ones((3, 512), np.float32), type.upper(), np.ones(512, np.float32))
    assert written.nbytes == Tensor("", "", (3, 512), type=TENSOR_TYPES[type]).nbytes


@pytest.mark.parametrize("type", ["I8", "Q8_K", "COUNT", "q8_0", "NONE"])
def test_input_that_would_abort_ggml_is_refused(type):
    with pytest.raises(ExportError, match=f"unknown ggml type '{type}'"):
        quantize_rows(np.ones((1, 256), np.float32), type)

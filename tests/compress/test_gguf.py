"""GGUF export: llama.cpp gives the same logits as torch, and files are reproducible."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from cogumi.compress.gguf.export import Config, export_adapter, export_model, run
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.layout import rotary_order
from cogumi.core.files import sha256
from cogumi.core.types import Artifact, Message, Request
from cogumi.models import folders, lora
from cogumi.models.tokenization import HFTokenizer
from support.gguf import F32_CACHE, edit, edit_weights, llama, llama_logits, some_ids, torch_logits
from support.pico import SENTENCES, SPECIALS, TEMPLATE, make_adapter, make_model
from support.train import context


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, pico) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), pico)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Hidden size 256, trained on SENTENCES: with random weights, near-ties flip under any rounding."""
    folder = make_model(tmp_path_factory.mktemp("trained"), hidden=256, scale=0.05)
    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = torch.tensor([text_ids(folder)])
    for _ in range(9):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def text_ids(folder: Path) -> list[int]:
    return HFTokenizer.load(folder).encode("\n".join(SENTENCES))


@pytest.fixture
def copy(tmp_path, pico) -> Path:
    """A copy of the pico model that a test may damage."""
    return Path(shutil.copytree(pico, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_f32_logits_equal_torch(tmp_path, tied):
    folder = make_model(tmp_path / "m", hidden=128, tied=tied)
    export_model(folder, tmp_path / "m.gguf", "f32")
    ids = some_ids()
    expected = torch_logits(LlamaForCausalLM.from_pretrained(folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()
    names = {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in names) != tied


def test_one_key_value_head_and_another_rope_theta(tmp_path):
    folder = make_model(tmp_path / "m", hidden=64)  # 2 query heads share it
    edit(
        folder / "config.json",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-3,
    )
    export_model(folder, tmp_path / "m.gguf", "f32")
    ids = some_ids()
    expected = torch_logits(LlamaForCausalLM.from_pretrained(folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("type", "agreement"), [("f16", 0.99), ("q8_0", 0.95), ("q4_k_m", 0.90)])
def test_quantized_types_agree_with_torch(tmp_path, trained, type, agreement):
    export_model(trained, tmp_path / "m.gguf", type)
    ids = text_ids(trained)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(trained), ids)
    got = llama_logits(tmp_path / "m.gguf", ids)
    assert (got.argmax(1) == expected.argmax(1)).mean() >= agreement
    types = [t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors]
    assert types.count({"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}[type]) >= 8
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


def test_checkpoints_saved_by_training_can_be_exported(tmp_path, pico):
    model = folders.build(folders.Shape(hidden=64, layers=1, heads=2), HFTokenizer.load(pico), seed=0)
    folders.save(model, pico, tmp_path)
    export_model(tmp_path, tmp_path / "m.gguf", "f32")
    got = llama_logits(tmp_path / "m.gguf", some_ids(20), **F32_CACHE)
    assert np.abs(got - torch_logits(model, some_ids(20))).max() < 1e-4
    peft = lora.attach(model, lora.LoraShape(rank=2), seed=0)
    lora.save(peft, tmp_path)
    export_adapter(tmp_path, tmp_path, tmp_path / "a.gguf")


def test_bfloat16_weights_are_exported(tmp_path, copy):
    edit_weights(copy, lambda w: w.update({name: value.bfloat16() for name, value in w.items()}))
    export_model(copy, tmp_path / "m.gguf", "f32")
    ids = some_ids(50)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(copy, dtype=torch.float32), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_rows_too_narrow_for_blocks_stay_f16(tmp_path):
    folder = make_model(tmp_path / "m", hidden=64)
    edit(folder / "config.json", intermediate_size=80)
    LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).save_pretrained(folder)
    export_model(folder, tmp_path / "m.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert llama(tmp_path / "m.gguf").create_completion([7, 8, 9], max_tokens=4)["usage"]["completion_tokens"]


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_k_m"])
def test_stock_llama_cpp_completes_a_chat(tmp_path, pico, type):
    export_model(pico, tmp_path / "m.gguf", type)
    model = llama(tmp_path / "m.gguf")
    assert model.metadata["tokenizer.chat_template"] == TEMPLATE
    assert model.metadata["llama.context_length"] == "1024"
    assert model.token_eos() == SPECIALS.index("<|end|>")
    assert model._model.add_bos_token() is False
    reply = model.create_chat_completion([{"role": "user", "content": "2 + 3?"}], max_tokens=4)
    prompt = HFTokenizer.load(pico).render(Request(messages=(Message("user", "2 + 3?"),)))
    assert reply["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
def test_same_input_same_bytes(tmp_path, pico, type):
    elsewhere = shutil.copytree(pico, tmp_path / "another name")
    export_model(pico, tmp_path / "a.gguf", type)
    export_model(elsewhere, tmp_path / "b.gguf", type)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@given(heads=st.integers(1, 4), half=st.integers(1, 8), columns=st.integers(1, 3))
def test_rotary_permutation_interleaves_the_halves(heads, half, columns):
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    ordered = rotary_order(rows, heads).reshape(heads, half, 2, columns)
    split = rows.reshape(heads, 2, half, columns)
    assert np.array_equal(ordered[:, :, 0], split[:, 0])
    assert np.array_equal(ordered[:, :, 1], split[:, 1])


def test_stage_writes_models_and_adapters(tmp_path, pico, adapter):
    inputs = {"model": Artifact("model", pico, ""), "adapter": Artifact("adapter", adapter, "")}
    model = run(Config(type="f16"), {"model": inputs["model"]}, tmp_path, context())
    lora = run(Config(), inputs, tmp_path, context())
    assert model["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert lora["bytes"] == (tmp_path / "adapter.gguf").stat().st_size
    assert (model["type"], lora["type"]) == ("f16", "f32")
    assert model["types"] == {"f16": 15}
    assert 16 < model["bits_per_weight"] < 16.2  # norms are f32
    assert model["base_fingerprint"] == lora["base_fingerprint"] == sha256(pico / "model.safetensors")
    assert model["tokenizer_sha256"] == lora["tokenizer_sha256"] == Vocabulary.load(pico).sha256

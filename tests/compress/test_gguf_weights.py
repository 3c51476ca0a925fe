"""GGUF -> model folder: the weights, ids and logits of the folder are those of the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.gguf_header import read_header
from cogumi.compress.gguf.gguf_tokenizer import tokenizer_sha256
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.gguf_weights import write_folder
from cogumi.compress.gguf.layout import halves_order, rotary_order
from cogumi.models.tokenization import HFTokenizer
from support.bare_bytes import MISSING, without_bytes
from support.gguf import F32_CACHE, edit, foreign_text, llama, llama_logits, some_ids, torch_logits
from support.pico import make_model
from support.real import llama3, qwen2
from support.vocabularies import real_vocabulary

FAMILIES = {
    "tied": lambda folder: make_model(folder, hidden=128),
    "own head": lambda folder: make_model(folder, hidden=128, tied=False),
    "llama 3": lambda folder: llama3(folder, tied=True),
    "qwen 2": qwen2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_f32_file_comes_back_unchanged(tmp_path, family):
    folder = FAMILIES[family](tmp_path / "one")
    export_model(folder, tmp_path / "one.gguf", "f32")
    write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    one, two = (Vocabulary.load(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert one.sha256 == tokenizer_sha256(read_header(tmp_path / "one.gguf"))
    export_model(tmp_path / "two", tmp_path / "two.gguf", "f32")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type", ["q8_0", "q4_1", "q4_k_m"])
def test_torch_computes_what_llama_cpp_computes_from_the_file(tmp_path, family, type):
    export_model(FAMILIES[family](tmp_path / "one"), tmp_path / "one.gguf", type)
    write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    ids = some_ids(200)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="float32")
    expected, got = torch_logits(model, ids), llama_logits(tmp_path / "one.gguf", ids, **F32_CACHE)
    spread = np.abs(expected).max()
    assert np.abs(got - expected).mean() < 0.01 * spread  # llama.cpp rounds activations to 8 bits
    again = tmp_path / "again.gguf"
    export_model(tmp_path / "two", again, "f32")  # the same weights without that rounding
    assert np.abs(llama_logits(again, ids, **F32_CACHE) - expected).max() < 2e-4 * spread


def test_weights_are_the_dequantized_ones_of_the_file(tmp_path):
    export_model(make_model(tmp_path / "one", hidden=128), tmp_path / "one.gguf", "q4_1")
    write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    found = load_file(tmp_path / "two" / "model.safetensors")
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "one.gguf").tensors}
    assert np.array_equal(found["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"])
    assert np.array_equal(
        rotary_order(found["model.layers.1.self_attn.k_proj.weight"], 2), stored["blk.1.attn_k.weight"]
    )


def test_rows_are_written_in_blocks_of_whole_heads(tmp_path, monkeypatch):
    export_model(make_model(tmp_path / "one", hidden=128), tmp_path / "one.gguf", "q8_0")
    header = read_header(tmp_path / "one.gguf")
    write_folder(header, tmp_path / "whole")
    monkeypatch.setattr("cogumi.compress.gguf.gguf_weights.BLOCK", 1000)  # a head has 32 rows of 128
    steps = []
    write_folder(header, tmp_path / "parts", lambda done, total: steps.append((done, total)))
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert len(steps) > 100
    assert steps[-1][0] == steps[-1][1] == 4 * header.parameters


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_rotary_order_is_undone(heads, half, width):
    rows = np.arange(heads * 2 * half * width).reshape(-1, width)
    assert np.array_equal(halves_order(rotary_order(rows, heads), heads), rows)
    assert np.array_equal(rotary_order(halves_order(rows, heads), heads), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_the_folder_equal_llama_cpp_on_the_file(tmp_path, family):
    export_model(FAMILIES[family](tmp_path / "one"), tmp_path / "one.gguf", "q8_0")
    write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    model, tokenizer = llama(tmp_path / "one.gguf", vocab_only=True), HFTokenizer.load(tmp_path / "two")
    for text in foreign_text(400):
        for special in (False, True):
            expected = model.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer.encode(text, special=special) == expected, text
    raw = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert raw.chat_template == tokenizer.template == model.metadata["tokenizer.chat_template"]
    assert raw("some text").input_ids == model.tokenize(b"some text", add_bos=True, special=False)


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_published_vocabularies_come_back(tmp_path, name):
    folder = real_vocabulary(tmp_path / "one", name, hidden=32, layers=1)
    export_model(folder, tmp_path / "one.gguf", "q8_0")
    write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    assert Vocabulary.load(folder) == Vocabulary.load(tmp_path / "two")
    model, tokenizer = llama(tmp_path / "one.gguf", vocab_only=True), HFTokenizer.load(tmp_path / "two")
    for text in foreign_text(300):
        assert tokenizer.encode(text) == model.tokenize(text.encode(), add_bos=False, special=False), text


def test_a_vocabulary_without_some_bytes_is_usable_both_ways(tmp_path):
    folder = without_bytes(make_model(tmp_path / "one"))
    assert Vocabulary.load(folder).missing_bytes == MISSING
    export_model(folder, tmp_path / "one.gguf", "q8_0")
    found = write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    assert found.missing_bytes == MISSING
    assert found == Vocabulary.load(folder)
    model, tokenizer = llama(tmp_path / "one.gguf", vocab_only=True), HFTokenizer.load(tmp_path / "two")
    for text in foreign_text(300):
        if not set(text.encode()) & set(MISSING):
            assert tokenizer.encode(text) == model.tokenize(text.encode(), add_bos=False, special=False), text


def test_the_description_of_a_model_goes_both_ways(tmp_path):
    folder = make_model(tmp_path / "one")
    about = {
        "general.name": "A model",
        "general.license": "apache-2.0",
        "general.languages": ["de", "en"],
        "general.base_model.count": 1,
    }
    edit(folder / "config.json", gguf_metadata=about)
    export_model(folder, tmp_path / "one.gguf", "q8_0")
    header = read_header(tmp_path / "one.gguf")
    assert header.about == about
    write_folder(header, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["gguf_metadata"] == about
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    model.save_pretrained(tmp_path / "three")  # as training does
    assert json.loads((tmp_path / "three" / "config.json").read_text())["gguf_metadata"] == about


def special(folder: Path) -> dict:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}


def test_special_tokens_are_those_of_the_file(tmp_path):
    folder = make_model(tmp_path / "one")
    edit(folder / "tokenizer_config.json", bos_token="<|system|>", unk_token="<|pad|>")
    export_model(folder, tmp_path / "one.gguf", "q8_0")
    write_folder(read_header(tmp_path / "one.gguf"), tmp_path / "two")
    expected = {"bos_token": "<|system|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|pad|>"}
    assert special(tmp_path / "two") == expected
    assert Vocabulary.load(tmp_path / "two").add_bos is False

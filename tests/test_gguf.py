"""GGUF export: llama.cpp computes what torch does and tokenizes as the tokenizer does, or it is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cogumi.artifact import sha256
from cogumi.compress.gguf import TYPES, Config, export_adapter, export_model, run
from cogumi.compress.layout import rotary_order
from cogumi.compress.vocabulary import Vocabulary
from cogumi.errors import ExportError
from cogumi.models import build, lora
from cogumi.models.text import HFTokenizer
from cogumi.types import Artifact, Message, Request
from helpers_gguf import edit, llama
from pico import SENTENCES, SPECIALS, TEMPLATE, make_adapter, make_model

F32_CACHE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, pico) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), pico)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Hidden 256, and sure of itself on SENTENCES: random weights leave near-ties that any rounding turns."""
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
    """A copy of the pico model to break."""
    return Path(shutil.copytree(pico, tmp_path / "copy"))


def edit_weights(folder: Path, change, name: str = "model.safetensors") -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name)


def llama_logits(path: Path, ids: list[int], **options) -> np.ndarray:
    """[ids, vocabulary] of stock llama.cpp."""
    model = llama(path, logits_all=True, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def torch_logits(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def some_ids(count: int = 300, vocabulary: int = 512) -> list[int]:
    return random.Random(1).choices(range(5, vocabulary), k=count)


# --- the model ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_f32_is_torch(tmp_path, tied):
    folder = make_model(tmp_path / "m", hidden=128, tied=tied)
    export_model(folder, tmp_path / "m.gguf", "f32")
    ids = some_ids()
    expected = torch_logits(LlamaForCausalLM.from_pretrained(folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()
    names = {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in names) != tied


def test_one_key_value_head_and_a_theta_of_its_own(tmp_path):
    folder = make_model(tmp_path / "m", hidden=64)  # 2 heads share 1
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
def test_smaller_types_agree_with_torch(tmp_path, trained, type, agreement):
    export_model(trained, tmp_path / "m.gguf", type)
    ids = text_ids(trained)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(trained), ids)
    got = llama_logits(tmp_path / "m.gguf", ids)
    assert (got.argmax(1) == expected.argmax(1)).mean() >= agreement
    types = [t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors]
    assert types.count({"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}[type]) >= 8
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


def test_what_training_saves_can_be_exported(tmp_path, pico):
    model = build.build(build.Shape(hidden=64, layers=1, heads=2), HFTokenizer.load(pico), seed=0)
    build.save(model, pico, tmp_path)
    export_model(tmp_path, tmp_path / "m.gguf", "f32")
    got = llama_logits(tmp_path / "m.gguf", some_ids(20), **F32_CACHE)
    assert np.abs(got - torch_logits(model, some_ids(20))).max() < 1e-4
    peft = lora.attach(model, lora.LoraShape(rank=2), seed=0)
    lora.save(peft, tmp_path)
    export_adapter(tmp_path, tmp_path, tmp_path / "a.gguf")


def test_q8_0_is_what_llama_cpp_makes(tmp_path, pico):
    from cogumi.runtime.llama.quantize import quantize

    export_model(pico, tmp_path / "f32.gguf", "f32")
    export_model(pico, tmp_path / "ours.gguf", "q8_0")
    quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "q8_0")
    ours, theirs = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    stored = {t.name: t for t in theirs.tensors}
    for tensor in ours.tensors:
        assert tensor.tensor_type == stored[tensor.name].tensor_type, tensor.name
        assert np.array_equal(tensor.data, stored[tensor.name].data), tensor.name


def test_bfloat16_weights_are_read(tmp_path, copy):
    edit_weights(copy, lambda w: w.update({name: value.bfloat16() for name, value in w.items()}))
    export_model(copy, tmp_path / "m.gguf", "f32")
    ids = some_ids(50)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(copy, dtype=torch.float32), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_narrow_rows_stay_f16(tmp_path):
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
def test_stock_llama_answers_a_chat(tmp_path, pico, type):
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
def test_rotary_order_pairs_the_halves(heads, half, columns):
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    ordered = rotary_order(rows, heads).reshape(heads, half, 2, columns)
    split = rows.reshape(heads, 2, half, columns)
    assert np.array_equal(ordered[:, :, 0], split[:, 0])
    assert np.array_equal(ordered[:, :, 1], split[:, 1])


# --- the adapter ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapter_is_peft(tmp_path, tied):
    from peft import PeftModel

    base = make_model(tmp_path / "m", hidden=128, tied=tied)
    folder = make_adapter(tmp_path / "a", base, rank=3)
    export_model(base, tmp_path / "m.gguf", "f32")
    export_adapter(folder, base, tmp_path / "a.gguf")
    ids = some_ids()
    model = LlamaForCausalLM.from_pretrained(base)
    bare = torch_logits(model, ids)
    expected = torch_logits(PeftModel.from_pretrained(model, folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, lora_path=str(tmp_path / "a.gguf"), **F32_CACHE)
    assert np.abs(expected - bare).max() > 0.1 * np.abs(bare).max()  # the adapter does something
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_adapter_on_the_output_layer_of_an_untied_model(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_model(tmp_path / "m", tied=False)
    export_model(base, tmp_path / "m.gguf", "f32")
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(
        tmp_path / "a", save_embedding_layers=False
    )
    export_adapter(tmp_path / "a", base, tmp_path / "a.gguf")
    ids = some_ids(100)
    expected = torch_logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "a"), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, lora_path=str(tmp_path / "a.gguf"), **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_adapter_files_are_reproducible(tmp_path, pico, adapter):
    export_adapter(adapter, pico, tmp_path / "a.gguf")
    export_adapter(Path(shutil.copytree(adapter, tmp_path / "elsewhere")), pico, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def rename(old: str, new: str):
    def change(weights):
        for name in [n for n in weights if old in n]:
            weights[name.replace(old, new)] = weights.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("layers.1.mlp.up_proj.lora", "embed_tokens.lora_embedding"), "embed_tokens.lora_embedding_A"),
        (
            rename("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"),
            "model.layers.7.mlp.up_proj.weight is no proj",
        ),
        (rename("layers.1.mlp.up_proj", "lm_head"), "model.lm_head.weight is no projection"),
        (rename("0.mlp.up_proj.lora_B", "0.mlp.down_proj.lora_X"), "down_proj.lora_X"),
        (
            lambda w: w.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
            "up_proj.weight lacks lora_B",
        ),
        (
            lambda w: w["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].fill_(torch.nan),
            "up_proj.lora_B",
        ),
    ],
)
def test_adapters_that_cannot_be_mapped_are_named(tmp_path, pico, adapter, change, message):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit_weights(folder, change, "adapter_model.safetensors")
    with pytest.raises(ExportError, match=re.escape(message)):
        export_adapter(folder, pico, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("a.gguf*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"0.*q_proj": 2}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 9}, "rank 4"),
    ],
)
def test_unknown_kinds_of_adapter_are_refused(tmp_path, pico, adapter, change, message):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit(folder / "adapter_config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_adapter(folder, pico, tmp_path / "a.gguf")


def test_adapter_of_another_width_is_refused(tmp_path, adapter):
    other = make_model(tmp_path / "other", hidden=64)
    with pytest.raises(ExportError, match=r"shape .* config.json asks for"):
        export_adapter(adapter, other, tmp_path / "a.gguf")


# --- refusals of models ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "lack model.layers.0.self_attn.q_proj.bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "lacks 'factor'"),
        (
            {"num_key_value_heads": 4},
            r"k_proj.weight has shape \(64, 128\), config.json asks for \(128, 128\)",
        ),
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        ({"tie_word_embeddings": False}, "lack lm_head.weight"),
        ({"vocab_size": 400}, "highest id is 511"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, copy, change, message):
    edit(copy / "config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_model(copy, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, copy, type, value):
    edit_weights(copy, lambda w: w["model.layers.1.mlp.down_proj.weight"].view(-1)[77:78].fill_(value))
    (tmp_path / "m.gguf").write_text("an earlier file")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        export_model(copy, tmp_path / "m.gguf", type)
    assert (tmp_path / "m.gguf").read_text() == "an earlier file"
    assert list(tmp_path.glob("m.gguf*")) == [tmp_path / "m.gguf"]


def test_values_beyond_f16_are_refused_there(tmp_path, copy):
    edit_weights(copy, lambda w: w["model.embed_tokens.weight"][3].fill_(7e4))
    with pytest.raises(ExportError, match=r"embed_tokens.weight holds values too large for f16; export as f32"):
        export_model(copy, tmp_path / "m.gguf", "f16")
    export_model(copy, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("keep", [0, 5, 500, 0.5, -1])
def test_weights_cut_short_are_refused(tmp_path, copy, keep):
    path = copy / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(ExportError, match="cut short or damaged"):
        export_model(copy, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(tmp_path, copy, name):
    (copy / name).unlink()
    with pytest.raises(ExportError, match=f"{re.escape(name)} is missing"):
        export_model(copy, tmp_path / "m.gguf")


def test_broken_json_and_missing_keys_are_named(tmp_path, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["hidden_size"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="lacks 'hidden_size'"):
        export_model(copy, tmp_path / "m.gguf")
    (copy / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"config\.json is not JSON"):
        export_model(copy, tmp_path / "m.gguf")


def test_a_full_disk_leaves_no_file(tmp_path, pico):
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the closest to a full disk without root
    try:
        with pytest.raises(OSError):
            export_model(pico, tmp_path / "m.gguf", "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.glob("m.gguf*"))


def test_unknown_types_are_refused(tmp_path, pico):
    with pytest.raises(ExportError, match=r"'q8'; known: f32, f16, .*q4_k_m"):
        export_model(pico, tmp_path / "m.gguf", "q8")
    with pytest.raises(ValidationError, match="unknown type 'q8'"):
        Config(type="q8")
    assert Config().type == "q8_0"
    assert {"f32", "f16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"} <= set(TYPES)


# --- the stage ---


def test_stage_writes_models_and_adapters(tmp_path, pico, adapter):
    inputs = {"model": Artifact("model", pico, ""), "adapter": Artifact("adapter", adapter, "")}
    model = run(Config(type="f16"), {"model": inputs["model"]}, tmp_path, None)
    lora = run(Config(), inputs, tmp_path, None)
    assert model["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert lora["bytes"] == (tmp_path / "adapter.gguf").stat().st_size
    assert (model["type"], lora["type"]) == ("f16", "f32")
    assert model["base_fingerprint"] == lora["base_fingerprint"] == sha256(pico / "model.safetensors")
    assert model["tokenizer_sha256"] == lora["tokenizer_sha256"] == Vocabulary.load(pico).sha256

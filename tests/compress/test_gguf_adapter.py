"""LoRA adapters as GGUF files: llama.cpp gives the same logits as peft, or the export is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.core.errors import ExportError
from support.gguf import F32_CACHE, edit, edit_weights, llama_logits, some_ids, torch_logits
from support.pico import make_adapter, make_model


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, pico) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), pico)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapter_logits_equal_peft(tmp_path, tied):
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
    assert np.abs(expected - bare).max() > 0.1 * np.abs(bare).max()  # the adapter has an effect
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


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {  # what peft is told -> None if the export equals peft, else a part of the refusal
    "plain": ({}, None),
    "all-linear": ({"target_modules": "all-linear"}, None),
    "ranks and alphas": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}, None),
    "some layers": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, None),
    "pattern of names": ({"target_modules": r".*\.layers\.1\..*(q_proj|up_proj)"}, None),
    "gaussian": ({"init_lora_weights": "gaussian"}, None),
    "dropout": ({"lora_dropout": 0.5}, None),
    "rank 1": ({"r": 1, "lora_alpha": 1}, None),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    "saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "saved norm": ({"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, "trainable_token_indices"),
    "bias": ({"bias": "all"}, "bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "dora": ({"use_dora": True}, "use_dora"),
    "rslora": ({"use_rslora": True}, "use_rslora"),
    "rank of one layer": ({"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, None),
    "alpha of one layer": ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, "alpha_pattern"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_adapter_equals_peft_or_is_refused_in_one_line(tmp_path, pico, name):
    from peft import LoraConfig, get_peft_model

    options, refusal = VARIANTS[name]
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(pico)
    adapted = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL} | options))
    with torch.no_grad():
        for weight in (p for p in adapted.parameters() if p.requires_grad):
            weight.add_(0.1 * torch.randn_like(weight))
    ids = some_ids(50)
    expected = torch_logits(adapted.eval(), ids)
    adapted.save_pretrained(tmp_path / "a")
    if refusal is not None:
        with pytest.raises(ExportError, match=refusal) as caught:
            export_adapter(tmp_path / "a", pico, tmp_path / "a.gguf")
        assert "\n" not in str(caught.value)
        return
    export_adapter(tmp_path / "a", pico, tmp_path / "a.gguf")
    export_model(pico, tmp_path / "m.gguf", "f32")
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
            "model.layers.7.mlp.up_proj.weight is not a proj",
        ),
        (rename("layers.1.mlp.up_proj", "lm_head"), "model.lm_head.weight is not a projection"),
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
def test_unmappable_adapter_tensors_are_refused_by_name(tmp_path, pico, adapter, change, message):
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
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.up_proj"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias: all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"alpha_pattern": {"0.*q_proj": 2}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 9}, "rank 4"),
    ],
)
def test_unsupported_adapter_types_are_refused(tmp_path, pico, adapter, change, message):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit(folder / "adapter_config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_adapter(folder, pico, tmp_path / "a.gguf")


def test_adapter_of_another_hidden_size_is_refused(tmp_path, adapter):
    other = make_model(tmp_path / "other", hidden=64)
    with pytest.raises(ExportError, match=r"shape .* config.json requires"):
        export_adapter(adapter, other, tmp_path / "a.gguf")

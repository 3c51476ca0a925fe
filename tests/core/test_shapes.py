"""`core.shapes`: parameter counts as published and as transformers builds them; unknown shapes are refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from cogumi.core.errors import ArtifactError
from cogumi.core.shapes import KNOWN, find_shape, known, shape_of
from cogumi.models.folders import load, parameters
from cogumi.models.lora import LoraShape, attach
from support.real import llama3, qwen2

PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}
TARGETS = tuple(KNOWN["Llama-3.2-1B"].linear)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name):
    assert find_shape(name, Path("/nowhere")).parameters == PUBLISHED[name]


@given(st.integers(1, 4), st.sampled_from([(2, 1), (4, 2), (4, 4)]), st.booleans(), st.booleans(), st.integers(8, 200))
@settings(max_examples=25, deadline=None)
def test_parameter_count_equals_the_transformers_model(layers, heads, tied, qwen, vocabulary):
    kind = Qwen2Config if qwen else LlamaConfig
    config = kind(
        vocab_size=vocabulary,
        hidden_size=32 * heads[0],
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.architectures = ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config.to_dict(), "here").parameters == parameters(model)


def test_shape_and_adapter_size_of_a_model_folder(tmp_path):
    for folder in (llama3(tmp_path / "llama", tied=False), qwen2(tmp_path / "qwen")):
        shape = find_shape(folder.name, tmp_path)
        model = load(folder)
        assert shape.parameters == parameters(model)
        adapted = attach(model, LoraShape(rank=6, ranks={"up_proj": 3}), 0)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert shape.adapter_parameters(dict.fromkeys(TARGETS, 6) | {"up_proj": 3}) == trained


def test_unknown_shape_is_refused_with_the_nearest_name(tmp_path):
    assert known("someone/Meta-Llama-3.1-8B-Instruct") == "Llama-3.1-8B"
    with pytest.raises(ArtifactError, match=r"neither a model folder .* did you mean 'Llama-3.1-8B'\?"):
        find_shape("meta-llama/Llama-3.1-80B", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(ArtifactError, match="GemmaForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"):
        find_shape(".", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        find_shape(".", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArtifactError, match="lacks 'hidden_size'"):
        find_shape(".", tmp_path)

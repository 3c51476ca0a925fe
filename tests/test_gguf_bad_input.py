"""GGUF export: what cannot be written faithfully is refused in one line, and nothing is left of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from cogumi.compress.gguf import Config, export_model
from cogumi.errors import ExportError
from helpers_gguf import edit, edit_weights
from pico import make_model


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture
def copy(tmp_path, pico) -> Path:
    """A copy of the pico model to break."""
    return Path(shutil.copytree(pico, tmp_path / "copy"))


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
    with pytest.raises(ValidationError, match=r"unknown type 'q6k' for 'blk\.0\.\*'; did you mean 'q6_k'"):
        Config(types={"blk.0.*": "q6k"})

"""GGUF export refuses models it cannot write faithfully, with a one-line error, and leaves no partial file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cogumi.compress.gguf.export import Config, export_model
from cogumi.core.errors import ExportError
from support.gguf import edit, edit_weights
from support.pico import make_model


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture
def copy(tmp_path, pico) -> Path:
    """A copy of the pico model that a test may damage."""
    return Path(shutil.copytree(pico, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "lack model.layers.0.self_attn.q_proj.bias"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 2, "num_key_value_heads": 1},
            "2 heads of 32 are not hidden_size 128 wide",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "lacks 'factor'"),
        (
            {"num_key_value_heads": 4},
            r"k_proj.weight has shape \(64, 128\), config.json requires \(128, 128\)",
        ),
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        ({"tie_word_embeddings": False}, "lack lm_head.weight"),
        ({"vocab_size": 400}, "highest id is 511"),
    ],
)
def test_configurations_that_do_not_match_the_weights_are_refused(tmp_path, copy, change, message):
    edit(copy / "config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_model(copy, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_or_infinite_weights_are_refused_by_name(tmp_path, copy, type, value):
    edit_weights(copy, lambda w: w["model.layers.1.mlp.down_proj.weight"].view(-1)[77:78].fill_(value))
    (tmp_path / "m.gguf").write_text("an earlier file")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        export_model(copy, tmp_path / "m.gguf", type)
    assert (tmp_path / "m.gguf").read_text() == "an earlier file"
    assert list(tmp_path.glob("m.gguf*")) == [tmp_path / "m.gguf"]


def test_values_outside_the_f16_range_are_refused_for_f16(tmp_path, copy):
    edit_weights(copy, lambda w: w["model.embed_tokens.weight"][3].fill_(7e4))
    with pytest.raises(ExportError, match=r"embed_tokens.weight holds values too large for f16; export as f32"):
        export_model(copy, tmp_path / "m.gguf", "f16")
    export_model(copy, tmp_path / "m.gguf", "f32")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("one"), hidden=32, layers=1)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), near_end=st.integers(0, 20))
@example(share=0.0, near_end=0)
@example(share=0.9999999, near_end=1)
def test_truncated_weights_are_refused(one_layer, share, near_end):
    """At any byte, and often in the header, which is a small part of the file."""
    path = one_layer / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (int(len(whole) * share), int(header * share), len(whole) - 1 - near_end):
        path.write_bytes(whole[:size])
        try:
            with pytest.raises(ExportError, match=r"model\.safetensors is truncated or damaged") as caught:
                export_model(one_layer, one_layer / "m.gguf", "q4_0")
        finally:
            path.write_bytes(whole)
        assert "\n" not in str(caught.value)
        assert not list(one_layer.glob("m.gguf*"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_changed_header_byte_is_refused_or_harmless(one_layer, data):
    """The only error is `ExportError`; a header that can still be read describes every required tensor."""
    path = one_layer / "model.safetensors"
    whole = path.read_bytes()
    at = data.draw(st.integers(0, 7 + int.from_bytes(whole[:8], "little")))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[at]))
    path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    with suppress(ExportError):
        export_model(one_layer, one_layer / "m.gguf", "q8_0")
    path.write_bytes(whole)
    (one_layer / "m.gguf").unlink(missing_ok=True)
    assert not list(one_layer.glob("m.gguf*"))


def test_integer_weights_are_refused(tmp_path, copy):
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(copy, lambda w: w.update({name: w[name].to(torch.int8)}))
    with pytest.raises(ExportError, match=r"down_proj.weight is I8; save the model as one of F32, F16, BF16"):
        export_model(copy, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_refused_by_name(tmp_path, copy, name):
    (copy / name).unlink()
    with pytest.raises(ExportError, match=f"{re.escape(name)} is missing"):
        export_model(copy, tmp_path / "m.gguf")


def test_broken_json_and_missing_keys_are_refused_by_name(tmp_path, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["hidden_size"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="lacks 'hidden_size'"):
        export_model(copy, tmp_path / "m.gguf")
    (copy / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"config\.json is not JSON"):
        export_model(copy, tmp_path / "m.gguf")


@pytest.mark.parametrize("type", ["f32", "q4_k_m"])
def test_full_disk_leaves_no_file(tmp_path, pico, type):
    """A file size limit of the process stands in for a full disk, because it needs no privileges."""
    (tmp_path / "m.gguf").write_text("an earlier file")
    script = f"""
import resource, signal
from pathlib import Path
from cogumi.compress.gguf.export import export_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export_model(Path({str(pico)!r}), Path({str(tmp_path / "m.gguf")!r}), {type!r})
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: ")
    assert len(done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "an earlier file"


def test_unknown_types_are_refused(tmp_path, pico):
    with pytest.raises(ExportError, match=r"'q8'; known: f32, f16, .*q4_k_m"):
        export_model(pico, tmp_path / "m.gguf", "q8")
    with pytest.raises(ValidationError, match="unknown type 'q8'"):
        Config(type="q8")
    with pytest.raises(ValidationError, match=r"unknown type 'q6k' for 'blk\.0\.\*'; did you mean 'q6_k'"):
        Config(types={"blk.0.*": "q6k"})

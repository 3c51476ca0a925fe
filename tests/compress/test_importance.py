"""Stage `importance`: the importance matrix is measured as defined and reduces the quantization error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cogumi.compress.gguf import export, importance
from cogumi.compress.gguf.importance import Config, measure, run
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.gguf.weights import IMPORTANCE
from cogumi.core.errors import DataError, ExportError
from cogumi.core.files import sha256
from cogumi.core.types import Artifact
from cogumi.data.examples import split_path, write_examples
from cogumi.models.folders import load
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows
from support.gguf import edit_weights
from support.pico import make_model
from support.train import context, example

QUESTIONS = [example(f"What is {a} plus {b}?", str(a + b), 1 + (a + b) % 5) for a in range(8) for b in range(8)]


@pytest.fixture(scope="module")
def model_and_examples(tmp_path_factory) -> dict[str, Artifact]:
    """A briefly trained model (random weights use all columns equally) and questions."""
    root = tmp_path_factory.mktemp("importance")
    folder = make_model(root / "model", hidden=256, scale=0.05)
    model, optimizer = load(folder), None
    rows = make_rows(QUESTIONS, HFTokenizer.load(folder), 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(12):
        ids = torch.tensor([row.ids[:12] for row in rows[step % 4 :: 4]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    write_examples(split_path(root / "data", "train"), QUESTIONS)
    return {"model": Artifact("model", folder, ""), "examples": Artifact("examples", root / "data", "")}


@pytest.fixture(scope="module")
def measured(model_and_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, run(Config(), model_and_examples, out, context())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_importance_is_the_mean_square_of_every_input(tmp_path, tied):
    folder = make_model(tmp_path, tied=tied)
    model, llama = load(folder), Llama.load(folder)
    rows = [Row(tuple(range(5, 5 + n)), 1) for n in (3, 9, 30)]  # padded to one length; padding must not count
    found = measure(model, llama, rows)
    assert not any(module._forward_hooks for module in model.modules())
    matrices = {t.name: t.shape for t in llama.tensors() if len(t.shape) == 2}
    expected = set(matrices) if tied else set(matrices) - {"token_embd.weight"}
    assert set(found) == expected
    assert all(found[name].shape == matrices[name][1:] for name in found)
    states = []
    with torch.no_grad():
        for row in rows:
            states.append(model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states)
        first = torch.cat([model.model.layers[0].input_layernorm(s[0][0]) for s in states])
        last = torch.cat([s[-1][0] for s in states])
    assert len(first) == 42
    for name in ("attn_q", "attn_k", "attn_v"):
        torch.testing.assert_close(found[f"blk.0.{name}.weight"], first.square().mean(0))
    torch.testing.assert_close(found["token_embd.weight" if tied else "output.weight"], last.square().mean(0))


def test_stage_writes_importance_and_metrics(model_and_examples, measured, tmp_path):
    out, metrics = measured
    assert metrics["rows"] == len(QUESTIONS)
    assert metrics["matrices"] == 2 * 7 + 1
    assert metrics["base_sha256"] == sha256(model_and_examples["model"].path / "model.safetensors")
    assert metrics["largest_over_mean"] > 1
    with safe_open(out / IMPORTANCE, framework="np") as file:
        assert file.metadata() == {"base_sha256": metrics["base_sha256"]}
    run(Config(), model_and_examples, tmp_path, context())
    assert (tmp_path / IMPORTANCE).read_bytes() == (out / IMPORTANCE).read_bytes()


def test_stage_refuses_an_empty_calibration_set(model_and_examples, tmp_path):
    write_examples(split_path(tmp_path / "none", "train"), [])
    with pytest.raises(DataError, match="no rows to calibrate on"):
        run(
            Config(),
            model_and_examples | {"examples": Artifact("examples", tmp_path / "none", "")},
            tmp_path,
            context(),
        )
    assert not (tmp_path / IMPORTANCE).exists()


def test_model_with_non_finite_activations_is_refused(model_and_examples, tmp_path):
    folder = Path(shutil.copytree(model_and_examples["model"].path, tmp_path / "broken"))
    edit_weights(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"].fill_(3e38))
    with pytest.raises(ExportError, match="NaN or infinite; use an earlier checkpoint"):
        run(Config(), model_and_examples | {"model": Artifact("model", folder, "")}, tmp_path, context())
    assert not (tmp_path / IMPORTANCE).exists()


@pytest.mark.parametrize("type", ["q4_k_m", "q5_0", "q4_0", "q3_k_m"])
def test_importance_reduces_the_quantization_error_of_outputs(model_and_examples, measured, tmp_path, type):
    """The squared output error of all layers on the calibration rows, from the mean square of each column."""
    columns = load_file(measured[0] / IMPORTANCE)
    errors = []
    export.export_model(model_and_examples["model"].path, tmp_path / "exact.gguf", "f32")
    exact = {t.name: t.data for t in GGUFReader(tmp_path / "exact.gguf").tensors}
    for matrix in (None, measured[0] / IMPORTANCE):
        export.export_model(model_and_examples["model"].path, tmp_path / "m.gguf", type, importance=matrix)
        tensors = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "m.gguf").tensors}
        errors.append(sum(float((c * (tensors[n] - exact[n]) ** 2).sum()) for n, c in columns.items()))
    assert errors[1] < errors[0]


def test_export_stage_uses_the_importance_matrix(model_and_examples, measured, tmp_path):
    inputs = {"model": model_and_examples["model"], "importance": Artifact("importance", measured[0], "")}
    metrics = export.run(export.Config(type="q2_k_s"), inputs, tmp_path, context())
    assert set(metrics["types"]) == {"q2_k", "q6_k"}
    with pytest.raises(ExportError, match="q2_k_s needs an importance matrix; give one"):
        export.run(export.Config(type="q2_k_s"), {"model": model_and_examples["model"]}, tmp_path, context())


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda c: c, {"base_sha256": "another"}, "was measured on another model"),
        (lambda c: c, {}, "was measured on another model"),
        (lambda c: {n: v for n, v in c.items() if n != "blk.1.ffn_up.weight"}, None, "blk.1.ffn_up.weight is missing"),
        (lambda c: c | {"blk.1.ffn_up.weight": np.ones(8, np.float32)}, None, "blk.1.ffn_up.weight is missing or dam"),
        (lambda c: c | {"token_embd.weight": c["token_embd.weight"] * np.nan}, None, "token_embd.weight is missing or"),
    ],
)
def test_importance_of_another_model_is_refused(model_and_examples, measured, tmp_path, change, metadata, message):
    base = {"base_sha256": measured[1]["base_sha256"]} if metadata is None else metadata
    save_file(change(load_file(measured[0] / IMPORTANCE)), tmp_path / IMPORTANCE, base)
    with pytest.raises(ExportError, match=message):
        export.export_model(
            model_and_examples["model"].path, tmp_path / "m.gguf", "q4_k_m", importance=tmp_path / IMPORTANCE
        )
    (tmp_path / IMPORTANCE).write_bytes((measured[0] / IMPORTANCE).read_bytes()[:-1])
    with pytest.raises(ExportError, match="missing or damaged"):
        export.export_model(
            model_and_examples["model"].path, tmp_path / "m.gguf", "q4_k_m", importance=tmp_path / IMPORTANCE
        )
    assert not list(tmp_path.glob("m.gguf*"))
    assert importance.KIND == "importance"

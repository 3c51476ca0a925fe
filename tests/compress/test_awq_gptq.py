"""Stages `awq` and `gptq` on a pico model trained on additions, and the maths of mixed precision."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import GPT2Config, GPT2LMHeadModel

from cogumi.compress.gguf import export
from cogumi.compress.oneshot import calibrated, equal_batches
from cogumi.compress.quantize import awq, gptq
from cogumi.compress.quantize.precision import (
    Setting,
    bits_per_weight,
    config_groups,
    levels,
    linears,
    rounded,
    sensitivities,
)
from cogumi.compress.quantize.search import Judge, Quantization, open_model, search
from cogumi.core.errors import ArtifactError, DataError, ExportError, RecipeError
from cogumi.core.files import sha256
from cogumi.core.stage import CHECKPOINT
from cogumi.core.types import Artifact
from cogumi.data.examples import split_path, write_examples
from cogumi.models.folders import Shape, load
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train import sft
from cogumi.train.loop import LoopConfig
from cogumi.train.losses import distillation
from cogumi.train.validation import TOKENS, applied, mean_figures
from support import pico, real
from support.gguf import edit_weights
from support.train import context, example, sums

EVEN = {"group": 32, "finer": 0.0, "coarser": 0.0}
SMALL = {"draw": {"rows": 40}, "probe": 20, "settings": [EVEN], "least": 0.01}
STAGES = {"awq": (awq, {"grid": 5}), "gptq": (gptq, {})}


def artifact(path):
    return Artifact("test", path, "0", {}, {})


def write_sums(path):
    rows = [
        example(f"{a} plus {b}", str(a + b), domain="math" if a < 7 else "reasoning")
        for a in range(10)
        for b in range(10)
    ]
    for name in ("train", "selection"):
        write_examples(split_path(path, name), rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Examples, and a model that answers most of them correctly."""
    root = tmp_path_factory.mktemp("quantization")
    pico.make_tokenizer(root / "tokenizer")
    write_sums(root / "data")
    (root / "model").mkdir()
    loop = LoopConfig(steps=150, batch=25, lr=0.01, muon_lr=0.02, evaluate_every=150, checkpoint_every=1000)
    inputs = {"examples": artifact(root / "data"), "tokenizer": artifact(root / "tokenizer")}
    shape = Shape(hidden=64, layers=1, heads=2, feed_forward=64)
    sft.run(sft.Config(shape=shape, loop=loop), inputs, root / "model", context())
    shutil.rmtree(root / "model" / CHECKPOINT)
    return root


def run(stage, trained, out, model="model", data="data", **config):
    """The metrics of a stage on small settings."""
    module, more = STAGES[stage]
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"model": artifact(trained / model), "examples": artifact(trained / data)}
    return module.run(module.Config(**{**SMALL, **more, **config}), inputs, out, context())


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """Both stages at four bits in groups of 32: (folder, metrics) by name."""
    root = tmp_path_factory.mktemp("done")
    return {name: (root / name, run(name, trained, root / name)) for name in STAGES}


def logits(folder, ids=range(5, 45)):
    with torch.no_grad():
        return load(folder).eval()(torch.tensor([list(ids)])).logits


def max_distinct_values(folder, group=32):
    """The largest number of different weights in any group of any linear layer."""
    groups = [layer.weight.reshape(-1, group) for layer in linears(load(folder)).values()]
    return max(len(set(row.tolist())) for group in groups for row in group[:50])


# The maths


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from([4, 8, 16]), st.floats(-3, 3))
def test_rounding_error_is_at_most_one_step_and_zeros_stay_zero(seed, bits, group, shift):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) + shift
    weight[0, :3] = 0
    found = rounded(weight, bits, group)
    step = (weight.reshape(3, -1, group).amax(-1).clamp(min=0) - weight.reshape(3, -1, group).amin(-1).clamp(max=0)) / (
        2**bits - 1
    )
    assert ((found - weight).abs().reshape(3, -1, group) <= 1.0001 * step[..., None]).all()
    assert (found[0, :3] == 0).all()
    assert all(len(set(row.tolist())) <= 2**bits for row in found.reshape(-1, group))


def test_rounding_equals_llm_compressor(trained):
    model, plain = load(trained / "model").eval(), load(trained / "model").eval()
    setting = Setting(**EVEN)
    level = dict.fromkeys(linears(model), "middle")
    rows = [Row(tuple(range(5, 25)), 10)]
    calibrated(model, [QuantizationModifier(config_groups=config_groups(level, setting))], rows, context())
    ids = torch.tensor([list(range(5, 45))])
    with torch.no_grad():
        reference = model(ids).logits
        for layer in linears(plain).values():
            layer.weight.data = rounded(layer.weight.data, 4, 32)
        assert torch.allclose(reference, plain(ids).logits, atol=1e-3)
        model.apply(disable_quantization)
        assert not torch.allclose(reference, model(ids).logits, atol=1e-1)


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 1000)), min_size=1, max_size=30),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_levels_respect_their_shares_and_follow_cost_per_weight(found, finer, coarser):
    costs = {str(i): cost for i, (cost, _) in enumerate(found)}
    sizes = {str(i): size for i, (_, size) in enumerate(found)}
    setting = Setting(finer=finer, coarser=coarser)
    level = levels(costs, sizes, setting)
    total, cost_per_weight = sum(sizes.values()), {name: costs[name] / sizes[name] for name in costs}
    by = {kind: [n for n in costs if level[n] == kind] for kind in ("finer", "middle", "coarser")}
    for kind, share in (("finer", finer), ("coarser", coarser)):
        assert sum(sizes[n] for n in by[kind]) <= share * total + 1e-9
    for finer_level, coarser_level in (("finer", "middle"), ("middle", "coarser"), ("finer", "coarser")):
        assert (
            not by[finer_level]
            or not by[coarser_level]
            or min(cost_per_weight[n] for n in by[finer_level]) >= max(cost_per_weight[n] for n in by[coarser_level])
        )


def test_bits_per_weight_include_scales_and_zero_points():
    sizes, setting = {"a": 100, "b": 300}, Setting(group=128)
    assert bits_per_weight({"a": "middle", "b": "middle"}, sizes, setting) == pytest.approx(4 + 20 / 128)
    mixed = bits_per_weight({"a": "finer", "b": "coarser"}, sizes, setting)
    assert mixed == pytest.approx(0.25 * (6 + 22 / 32) + 0.75 * (3 + 19 / 128))


def test_sensitivity_is_the_divergence_from_rounding_one_linear_layer(trained):
    model, original = load(trained / "model").eval(), load(trained / "model").eval()
    rows = sums(HFTokenizer.load(trained / "model"))
    found = sensitivities(model, rows, 32, context())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert set(found) == set(linears(model))
    assert all(s.divergence > 0 for s in found.values())
    name = max(found, key=lambda n: found[n].divergence)
    layer = linears(model)[name]
    layer.weight.data = rounded(layer.weight.data, 4, 32)
    divergence = mean_figures(applied(model), rows, distillation(original))["loss"]
    assert found[name].divergence == pytest.approx(divergence, rel=1e-3)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_batches_contain_every_row_once_without_padding(sizes):
    rows = [Row(tuple(range(i, i + size)), 0) for i, size in enumerate(sizes)]
    batches = [batch["input_ids"] for batch in equal_batches(rows)]
    assert sorted(tuple(ids) for batch in batches for ids in batch.tolist()) == sorted(row.ids for row in rows)
    assert all(batch.numel() <= max(TOKENS, batch.shape[1]) for batch in batches)


# The stages


@pytest.mark.parametrize("kind", ["trained", "llama3", "qwen2"])
def test_awq_rescales_weights_without_changing_the_logits(trained, done, tmp_path, kind):
    """Also with biases, and with grouped-query attention, where value scales cannot fold into the output projection."""
    if kind == "trained":
        before, after = trained / "model", done["awq"][0]
    else:
        before = tmp_path / kind / "model"
        _ = real.llama3(before, tied=False) if kind == "llama3" else real.qwen2(before)
        write_sums(tmp_path / kind / "data")
        after = tmp_path / "out"
        run("awq", tmp_path / kind, after)
    old_logits, new_logits = logits(before), logits(after)
    assert (new_logits - old_logits).abs().max() < 1e-4 * old_logits.abs().max()
    old, new = load(before).state_dict(), load(after).state_dict()
    changed = [name for name in old if not torch.allclose(old[name], new[name], rtol=0.01)]
    assert any("norm" in name for name in changed)
    assert any("proj" in name for name in changed)
    assert not list(after.glob("*.yaml"))


def test_awq_writes_rounded_weights_when_configured(trained, done, tmp_path):
    metrics = run("awq", trained, tmp_path, round=True)
    assert metrics["written"]["divergence"] == pytest.approx(metrics["rounded"]["divergence"], rel=0.05)
    assert max_distinct_values(tmp_path) <= 16 < max_distinct_values(done["awq"][0])


def test_gptq_writes_quantized_weights_and_diverges_less_than_plain_rounding(done):
    folder, metrics = done["gptq"]
    assert max_distinct_values(folder) <= 16
    assert metrics["written"]["nats"] == pytest.approx(metrics["rounded"]["nats"], abs=1e-5)
    assert metrics["rounded"]["divergence"] < metrics["rounded_plainly"]["divergence"]


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_and_report_of_a_stage(done, stage):
    folder, metrics = done[stage]
    assert metrics["model_sha256"] == sha256(folder / "model.safetensors")
    assert metrics["rows"] == 40
    assert len(metrics["sensitivity"]) == 7
    assert metrics["before"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert metrics["before"]["exact"] > 0.3
    assert set(metrics["domains"]) == {"math", "reasoning"}
    assert metrics["quality_ratio"] == pytest.approx(np.exp(metrics["before"]["nats"] - metrics["rounded"]["nats"]))
    assert metrics["exact_ratio"] == pytest.approx(metrics["rounded"]["exact"] / metrics["before"]["exact"])
    text = (folder / "report.md").read_text()
    assert "| 0 |" in text
    assert "down_proj" in text
    assert (folder / "sensitivity.png").stat().st_size > 1000


@pytest.mark.parametrize("stage", STAGES)
def test_runs_are_reproducible_silent_and_write_only_to_their_folder(
    trained, done, tmp_path, monkeypatch, capfd, stage
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.manual_seed(123)
    run(stage, trained, tmp_path / "out")
    assert sha256(tmp_path / "out/model.safetensors") == done[stage][1]["model_sha256"]
    assert not os.listdir(tmp_path / "here")
    assert capfd.readouterr() == ("", "")


def run_search(trained, sizes, bits, least=0.97):
    """Search over settings with these group sizes; each group size is rounded to its number of `bits`."""
    folder = trained / "model"
    original = open_model(folder)
    judge = Judge.load(original, trained / "data", HFTokenizer.load(folder))

    def calibrate(model, groups):
        for layer in linears(model).values():
            layer.weight.data = rounded(layer.weight.data, bits[groups["middle"]["weights"]["group_size"]], 32)

    config = Quantization(settings=[Setting(group=size, finer=0, coarser=0) for size in sizes], least=least)
    return search(config, folder, judge(original), dict.fromkeys(linears(original), 1.0), calibrate, judge)


def test_search_stops_at_the_first_setting_that_is_good_enough(trained):
    bits = {64: 1, 32: 8, 16: 8}
    best, attempts = run_search(trained, (64, 32, 16), bits)
    assert [attempt["enough"] for attempt in attempts] == [False, True]
    assert best.setting.group == 32
    assert attempts[1]["quality_ratio"] >= 0.97 > min(attempts[0]["quality_ratio"], attempts[0]["exact_ratio"])
    assert len(run_search(trained, (16, 64), bits)[1]) == 1


def test_search_keeps_the_best_setting_when_none_is_good_enough(trained):
    best, attempts = run_search(trained, (64, 32, 16), {64: 1, 32: 3, 16: 1}, least=1.0)
    assert len(attempts) == 3
    assert not any(attempt["enough"] for attempt in attempts)
    assert best.setting.group == 32
    assert best.figures["loss"] == min(attempt["nats"] for attempt in attempts)


def test_gguf_export_uses_finer_types_for_sensitive_tensors(trained, done, tmp_path):
    """The widths here do not fill blocks of 256: Q8_0 stands in for Q6_K, and Q4_0 for Q3_K."""
    metrics = run("gptq", trained, tmp_path / "mixed", settings=[{"group": 32, "finer": 0.2, "coarser": 0.2}])
    types = json.loads((tmp_path / "mixed/types.json").read_text())
    assert types == metrics["types"]
    assert {"q8_0", "q4_0"} == set(types.values())
    inputs = {"model": artifact(tmp_path / "mixed"), "types": artifact(tmp_path / "mixed")}
    first = min(types)
    (tmp_path / "out").mkdir()
    export.run(export.Config(type="q5_0", types={first: "f16"}), inputs, tmp_path / "out", context())
    found = {t.name: t.tensor_type.name.lower() for t in GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert {name: found[name] for name in types} == {**types, first: "f16"}
    others = {name for name in found if name.endswith("weight") and "blk" in name and "norm" not in name} - set(types)
    assert others
    assert all(found[name] == "q5_0" for name in others)


# Bad input


def spoil(trained, tmp_path, what):
    """A copy of the test folder with one fault."""
    shutil.copytree(trained, tmp_path / "world")
    model = tmp_path / "world/model"
    if what == "empty":
        split_path(tmp_path / "world/data", "train").write_text("")
    elif what == "nan":
        edit_weights(
            model, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].view(-1)[7].fill_(float("nan"))
        )
    elif what == "cut":
        data = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "gpt2":
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512)).save_pretrained(model)
    return tmp_path / "world"


@pytest.mark.parametrize(
    ("what", "error", "message", "config"),
    [
        ("empty", DataError, "no rows to calibrate on", {}),
        ("nan", ArtifactError, r"layers\.0\.mlp\.up_proj\.weight holds NaN", {}),
        ("cut", ArtifactError, "holds no model that can be loaded", {}),
        ("gpt2", ExportError, "GPT2LMHeadModel; supported: LlamaForCausalLM, Qwen2ForCausalLM", {}),
        ("group", RecipeError, "groups of 48 .* 64 inputs .* divides 64", {"settings": [EVEN, {"group": 48}]}),
    ],
)
def test_bad_input_is_refused_and_leaves_no_files(trained, tmp_path, what, error, message, config):
    bad = spoil(trained, tmp_path, what)
    before = {path.name: sha256(path) for path in (bad / "model").iterdir()}
    with pytest.raises(error, match=message):
        run("awq", bad, tmp_path / "out", **config)
    assert not os.listdir(tmp_path / "out")
    assert before == {path.name: sha256(path) for path in (bad / "model").iterdir()}


@settings(max_examples=20)
@given(st.floats(0.51, 1), st.floats(0.5, 1))
def test_shares_that_sum_to_more_than_one_are_refused(finer, coarser):
    with pytest.raises(ValueError, match="at most 1"):
        Setting(finer=finer, coarser=coarser)

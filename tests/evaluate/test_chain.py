"""The report of a compression chain: no loss for a copy, small loss for quantization, large loss for damage."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import RecipeError
from cogumi.core.types import Artifact
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.evaluate import chain
from cogumi.models.folders import Shape, build, save
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss
from support import pico
from support.train import context, example


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pico model trained on a few facts: unchanged, quantized, and damaged."""
    root = tmp_path_factory.mktemp("chain")
    pico.make_tokenizer(root)
    names = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal"]
    asked = [example(f"Who has the {thing} of {a}?", a) for a in names for thing in ("hat", "cup", "box", "pen")]
    tokenizer = HFTokenizer.load(root)
    model = build(Shape(hidden=64, layers=2, heads=2, feed_forward=128), tokenizer, 0)
    torch.set_num_threads(1)
    rows = make_rows(asked, tokenizer, 128)
    train(model, rows, answer_loss, LoopConfig(steps=60, batch=16, lr=0.01, muon_lr=0.02), root, context())
    (root / "model").mkdir()
    save(model, root, root / "model")
    shutil.copytree(root / "model", root / "damaged")
    weights = load_file(root / "damaged/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -3
    save_file(weights, root / "damaged/model.safetensors")
    (root / "data").mkdir()
    for split in SPLITS:
        write_examples(split_path(root / "data", split), asked if split == "heldout" else [])
    found = {"data": Artifact("examples", root / "data", "d")}
    for name, folder, type in (("before", "model", "f32"), ("small", "model", "q8_0"), ("broken", "damaged", "f32")):
        (root / name).mkdir()
        export_model(root / folder, root / name / "model.gguf", type)
        found[name] = Artifact("gguf", root / name, name, metrics={"type": type})
    return found


@pytest.fixture(scope="module")
def figures(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    config = chain.Config(steps=["before", "broken"], beside=["small"], rounds=1, prompts=4, max_tokens=8)
    return out, chain.run(config, inputs, out, context())


def test_every_step_is_compared_with_the_first(figures):
    _, found = figures
    before, small, broken = (found["steps"][name] for name in ("before", "small", "broken"))
    assert (before["kept"], before["points_lost"], before["perplexity_kept"]) == (1, 0, 1)
    assert before["accuracy"] > 0.9
    assert small["perplexity_kept"] == pytest.approx(1, abs=0.02)
    assert small["kept"] > 0.9
    assert broken["kept"] < 0.9
    assert broken["perplexity_kept"] < 0.9
    low, high = broken["points_lost_95"]
    assert 0 < low <= broken["points_lost"] <= high
    assert found["kept"] == broken["kept"]


def test_sizes_equal_the_file_sizes(inputs, figures):
    _, found = figures
    for name, row in found["steps"].items():
        assert row["bytes"] == (inputs[name].path / "model.gguf").stat().st_size
        assert 0 < row["packed_bytes"] < row["bytes"]
        assert row["tokens_per_second"] > 0
    assert found["steps"]["small"]["bytes"] < found["steps"]["before"]["bytes"] / 2


def test_report_contains_a_table_and_a_plot(figures):
    out, _ = figures
    page = (out / "report.md").read_text()
    assert all(f"| {name} |" in page for name in ("before", "small (beside)", "broken"))
    assert (out / chain.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_order_must_name_every_input(inputs, tmp_path):
    with pytest.raises(RecipeError, match="must name every input"):
        chain.run(chain.Config(steps=["before", "small"]), inputs, tmp_path, context())
    with pytest.raises(RecipeError, match="must name every input"):
        chain.run(chain.Config(steps=["before", "small", "broken"], beside=["small"]), inputs, tmp_path, context())


def test_packed_size_of_zeros_is_small(tmp_path):
    (tmp_path / "zeros").write_bytes(bytes(100_000))
    (tmp_path / "noise").write_bytes(torch.randint(0, 256, (100_000,), dtype=torch.uint8).numpy().tobytes())
    assert chain.packed_bytes(tmp_path / "zeros") < 100
    assert chain.packed_bytes(tmp_path / "noise") > 99_000

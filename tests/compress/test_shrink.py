"""Stage `shrink`: selection and removal of parts, and recovery training against training from scratch."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cogumi.compress.calibration_rows import Draw, draw_rows
from cogumi.compress.gguf.export import export_model
from cogumi.compress.shrink import shrink
from cogumi.compress.shrink.activity import measure, without
from cogumi.compress.shrink.cutting import choose, smaller, strongest, strongest_heads
from cogumi.core.errors import ArtifactError, CogumiError, ExportError, RecipeError
from cogumi.core.files import sha256
from cogumi.core.shapes import ModelShape, find_shape
from cogumi.core.stage import CHECKPOINT
from cogumi.core.types import Artifact
from cogumi.data.examples import split_path, write_examples
from cogumi.models.folders import Shape, load, save
from cogumi.models.tokenization import HFTokenizer
from cogumi.train import sft
from cogumi.train.loop import LoopConfig
from cogumi.train.validation import applied, judge_answers
from support import pico
from support.gguf import CODE, disagreement, edit
from support.real import llama3, qwen2
from support.train import context, example

FOLDER = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LOOP = {"steps": 20, "batch": 25, "lr": 0.005, "muon_lr": 0.02, "evaluate_every": 10, "checkpoint_every": 6}
EIGHT = ModelShape(64, 128, 4, 8, 4, 16, 512, 64, tied=True)
REAL = {"tied": lambda path: llama3(path, tied=True), "own head": lambda path: llama3(path, tied=False), "qwen2": qwen2}


def opened(folder):
    return load(folder).eval(), find_shape(folder.name, folder.parent)


def artifact(path):
    return Artifact("test", path, "0", {}, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Examples of additions, and a model trained on them."""
    root = tmp_path_factory.mktemp("shrink")
    pico.make_tokenizer(root / "tokenizer")
    rows = [example(f"{a} plus {b}", str(a + b), 1 + b % 5) for a in range(10) for b in range(10)]
    for name in ("train", "selection"):
        write_examples(split_path(root / "data", name), rows)
    (root / "model").mkdir()
    inputs = {"examples": artifact(root / "data"), "tokenizer": artifact(root / "tokenizer")}
    shape = Shape(hidden=64, layers=3, heads=4, feed_forward=128)
    loop = LoopConfig.model_validate(LOOP | {"steps": 100, "lr": 0.01, "evaluate_every": 100})
    sft.run(sft.Config(shape=shape, loop=loop), inputs, root / "model", context())
    return root


def run(world, out, model="model", data="data", progress=lambda done, total, figures: None, **config):
    out.mkdir(exist_ok=True)
    given = {"draw": {"rows": 40}, "loop": LOOP, **config}
    inputs = {"model": artifact(world / model), "examples": artifact(world / data)}
    return shrink.run(shrink.Config.model_validate(given), inputs, out, context(progress=progress))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


# --- selection


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40), st.data())
def test_strongest_are_kept_in_their_order(values, data):
    count = data.draw(st.integers(1, len(values)))
    kept = strongest(torch.tensor(values, dtype=torch.float64), count)
    removed = [v for i, v in enumerate(values) if i not in kept]
    assert list(kept) == sorted(set(kept))
    assert len(kept) == count
    assert not removed or max(removed) <= min(values[i] for i in kept)


@given(st.lists(st.floats(0, 9), min_size=8, max_size=8), st.sampled_from([(2, 1), (4, 2), (8, 4), (4, 4), (2, 2)]))
def test_each_kept_key_value_head_keeps_query_heads_of_its_group(values, targets):
    heads, kv_heads = targets
    target = smaller(EIGHT, {"heads": heads, "kv_heads": kv_heads})
    queries, keys = strongest_heads(torch.tensor(values), EIGHT, target)
    assert (len(queries), len(keys)) == targets
    assert [q // 2 for q in queries] == [k for k in keys for _ in range(heads // kv_heads)]
    assert list(queries) == sorted(queries)


def test_heads_or_kv_heads_alone_removes_whole_groups():
    assert (
        smaller(EIGHT, {"heads": 4}) == smaller(EIGHT, {"kv_heads": 2}) == smaller(EIGHT, {"heads": 4, "kv_heads": 2})
    )
    assert smaller(EIGHT, {}) == EIGHT


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"layers": 5}, "layers: 5 is more than the model's 4"),
        ({"hidden": 96}, "hidden: 96 is more than the model's 64"),
        ({"kv_heads": 8}, "kv_heads: 8 is more than the model's 4"),
        ({"heads": 5}, "heads: 5 is not a multiple of the 2 query heads"),
        ({"heads": 6, "kv_heads": 4}, "6 heads on 4 kv_heads cannot be cut from 8 on 4"),
        ({"heads": 8, "kv_heads": 2}, "each key-value head keeps the same number of query heads, at most 2"),
        ({"heads": 3, "kv_heads": 3}, "heads: a width of 48 is not a multiple of 32"),
    ],
)
def test_inconsistent_targets_are_refused(targets, message):
    with pytest.raises(RecipeError, match=message):
        smaller(EIGHT, targets)


def test_qwen2_hidden_size_must_equal_its_total_head_width():
    """llama.cpp loads no other Qwen2 shape."""
    shape = replace(EIGHT, hidden=128, kind="qwen2")
    for targets in ({"hidden": 64}, {"heads": 4}):
        with pytest.raises(RecipeError, match="cut heads and hidden alike"):
            smaller(shape, targets)
    assert smaller(shape, {"hidden": 64, "heads": 4}).kv_heads == 2


# --- removal


def test_removing_idle_parts_does_not_change_the_logits(world):
    """One layer, two heads, half of the neurons and half of the channels are idle: they are found and removed."""
    model, shape = opened(world / "model")
    decoder, idle = model.model, torch.arange(0, 64, 2)
    with torch.no_grad():
        decoder.layers[1].self_attn.o_proj.weight.zero_()
        decoder.layers[1].mlp.down_proj.weight.zero_()
        decoder.embed_tokens.weight[:, idle] = 0
        for layer in decoder.layers:
            layer.self_attn.v_proj.weight[16:48] = 0
            layer.mlp.up_proj.weight[5:69] = 0
            layer.self_attn.o_proj.weight[idle] = 0
            layer.mlp.down_proj.weight[idle] = 0
    rows = draw_rows(world / "data", HFTokenizer.load(world / "model"), 512, Draw(rows=30), 0)
    target = smaller(shape, {"layers": 2, "heads": 2, "feed_forward": 64, "hidden": 32})
    seen = []
    importance = measure(model, shape, rows, True, seen.append)
    assert seen == [1, 2, 3, 4]
    assert importance.layers[1] == pytest.approx(judge_answers(applied(model), rows)["loss"])
    kept = choose(replace(importance, layers=torch.tensor([1.0, 0.0, 1.0])), shape, target)
    assert kept.heads[0] == kept.kv_heads[0] == (0, 3)
    assert kept.neurons[2] == (*range(5), *range(69, 128))
    assert kept.channels == tuple(range(1, 64, 2))
    small = shrink.shrunk(model, kept, target)
    for row in rows[:5]:
        assert torch.allclose(logits(small, row.ids), logits(model, row.ids), atol=1e-3)
    with without(model, 1):
        assert torch.allclose(logits(model, rows[0].ids), logits(small, rows[0].ids), atol=1e-3)


def test_padding_does_not_count(world):
    model, shape = opened(world / "model")
    rows = draw_rows(world / "data", HFTokenizer.load(world / "model"), 512, Draw(rows=2), 0)
    short, long = rows[0], rows[1]
    long = type(long)((*long.ids, *long.ids), long.start)
    alone = [measure(model, shape, [row], False, lambda done: None) for row in (short, long)]
    both = measure(model, shape, [short, long], False, lambda done: None)
    for name in ("heads", "neurons", "channels"):
        parts = [getattr(found, name) * row.size for found, row in zip(alone, (short, long), strict=True)]
        assert torch.allclose(sum(parts) / (short.size + long.size), getattr(both, name), rtol=1e-5)


@pytest.mark.parametrize("kind", REAL)
def test_target_equal_to_the_present_shape_changes_no_byte(world, tmp_path, kind):
    folder = REAL[kind](tmp_path / "whole")
    model, shape = opened(folder)
    (tmp_path / "saved").mkdir()
    save(model, folder, tmp_path / "saved")
    metrics = run(tmp_path, tmp_path / "out", "saved", world / "data", layers=shape.layers, hidden=shape.hidden)
    assert [sha256(tmp_path / "out" / name) for name in FOLDER] == [
        sha256(tmp_path / "saved" / name) for name in FOLDER
    ]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert metrics["quality_ratio"] == 1
    assert metrics["curve"] == {}


TOGETHER = (
    {"layers": 1},
    {"feed_forward": 96},
    {"hidden": 32, "heads": 1, "kv_heads": 1},
    {"layers": 1, "feed_forward": 64, "hidden": 32, "heads": 1, "kv_heads": 1},
)


@pytest.mark.parametrize("kind", REAL)
def test_shrunk_models_run_in_transformers_and_llama_cpp(world, tmp_path, kind):
    folder = REAL[kind](tmp_path / "whole")
    ids = HFTokenizer.load(folder).encode("\n".join(CODE))[:200]
    alone = () if kind == "qwen2" else ({"hidden": 32}, {"heads": 2}, {"heads": 2, "kv_heads": 2})
    for i, targets in enumerate((*alone, *TOGETHER)):
        out = tmp_path / str(i)
        metrics = run(tmp_path, out, "whole", world / "data", loop=None, **targets)
        model, loading_info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(loading_info.values())
        found = opened(out)[1]
        assert {name: getattr(found, name) for name in targets} == targets
        assert found.head == metrics["shape"]["before"]["head"]
        assert metrics["parameters"]["after"] == found.parameters == sum(p.numel() for p in model.parameters())
        export_model(out, out / "m.gguf", "f32")
        assert disagreement(model, out / "m.gguf", ids) < 2e-4


# --- the stage


def test_shrunk_model_beats_the_same_shape_trained_from_scratch(world, tmp_path):
    metrics = run(world, tmp_path, layers=2, feed_forward=64, control="scratch")
    assert metrics["cut"]["nats"] > metrics["after"]["nats"]
    assert metrics["control"]["nats"] > metrics["after"]["nats"]
    ratio = metrics["control"]["perplexity"] / metrics["after"]["perplexity"]
    assert metrics["against_control"] == pytest.approx(ratio)
    assert metrics["against_control"] > 1.2
    assert metrics["steps"] == {"after": 20, "control": 20}
    assert metrics["tokens"]["after"] == metrics["tokens"]["control"]
    assert [step for step, _ in metrics["curve"]["control"]["selection"]] == [10, 20]
    model = load(tmp_path)
    rows = draw_rows(world / "data", HFTokenizer.load(tmp_path), 512, Draw(rows=100), 0)
    assert judge_answers(applied(model), rows)["loss"] == pytest.approx(metrics["after"]["nats"], rel=1e-4)
    assert math.exp(metrics["after"]["nats"]) == pytest.approx(metrics["after"]["perplexity"])
    assert metrics["model_sha256"] == sha256(tmp_path / "model.safetensors")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    text = (tmp_path / "report.md").read_text()
    assert f"| same shape and budget, from scratch | {metrics['control']['nats']:.4f} |" in text
    removed = next(i for i in range(3) if i not in metrics["layers"]["kept"])
    assert f"| {removed} | {metrics['layers']['nats_without'][removed]:.4f} | left out |" in text


def test_distillation_is_used_unless_answers_have_all_the_weight(world, tmp_path):
    found = {
        (answers, temperature): run(
            world,
            tmp_path / f"{answers}{temperature}",
            feed_forward=64,
            answers=answers,
            temperature=temperature,
            loop=LOOP | {"steps": 3},
        )["model_sha256"]
        for answers, temperature in ((0, 1), (1, 1), (0.5, 2), (1, 2))
    }
    assert found[1, 1] == found[1, 2]
    assert len(set(found.values())) == 3


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """An uninterrupted run: its folder and metrics."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(world, out, layers=2, control="scratch")


@pytest.mark.parametrize("at", [14, 35])
def test_killed_and_resumed_run_gives_the_same_bytes(world, uninterrupted, tmp_path, at):
    """Killed while the shrunk model trains, and while the control does; the first 4 progress steps are measurements."""

    def kill(done, total, figures):
        assert total == 4 + 40
        if done == 4 + at:
            raise Killed

    with pytest.raises(Killed):
        run(world, tmp_path / "killed", layers=2, control="scratch", progress=kill)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert (tmp_path / "killed" / CHECKPOINT / "checkpoint.safetensors").exists()
    again = run(world, tmp_path / "killed", layers=2, control="scratch")
    assert json.dumps(again) == json.dumps(uninterrupted[1])
    for name in (*FOLDER, "report.md", "curves.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (uninterrupted[0] / name).read_bytes()


# --- bad input


def copied(world, path, **changes):
    path.mkdir(exist_ok=True)
    for name in FOLDER:
        (path / name).write_bytes((world / "model" / name).read_bytes())
    edit(path / "config.json", **changes)
    return path


def refused(world, tmp_path, error, message, **given):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(error, match=message) as caught:
        run(world, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())
    assert all(path.read_bytes() == content for path, content in before.items())


def test_unsupported_models_and_data_are_refused_in_one_line(world, tmp_path):
    refused(world, tmp_path, RecipeError, "layers: 9 is more than the model's 3; give a smaller number", layers=9)
    model = copied(world, tmp_path / "other", architectures=["MixtralForCausalLM"], model_type="mixtral")
    supported = "is a MixtralForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"
    refused(world, tmp_path, ArtifactError, supported, model=model, layers=2)
    (model / "config.json").unlink()
    refused(world, tmp_path, ExportError, "config.json is missing; give a full model", model=model, layers=2)
    (model / "config.json").write_text("[")
    refused(world, tmp_path, ExportError, "config.json is not JSON", model=model, layers=2)
    write_examples(split_path(tmp_path / "none", "train"), [])
    write_examples(split_path(tmp_path / "none", "selection"), [example("1", "2")])
    refused(world, tmp_path, CogumiError, "no rows to calibrate on|no examples", data=tmp_path / "none", layers=2)
    write_examples(split_path(tmp_path / "long", "train"), [example("1 " * 600, "2")])
    write_examples(split_path(tmp_path / "long", "selection"), [example("1", "2")])
    refused(world, tmp_path, CogumiError, "longer than the model's context", data=tmp_path / "long", layers=2)


def test_damaged_weights_are_refused(world, tmp_path):
    model = copied(world, tmp_path / "cut")
    whole = (model / "model.safetensors").read_bytes()
    for end in (0, 4, 1000, len(whole) // 2, len(whole) - 1):
        (model / "model.safetensors").write_bytes(whole[:end])
        refused(world, tmp_path, ArtifactError, "holds no model that can be loaded", model=model, layers=2)
    broken = load(world / "model")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    (tmp_path / "nan").mkdir()
    save(broken, world / "model", tmp_path / "nan")
    message = "model.layers.1.mlp.up_proj.weight holds NaN or infinity"
    refused(world, tmp_path, ArtifactError, message, model=tmp_path / "nan", layers=2)

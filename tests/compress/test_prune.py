"""Stage `prune`: which weights are removed, that they stay zero, gradual pruning and the grid search."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from cogumi.compress.calibration_rows import Draw, draw_rows
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.prune import masks, prune
from cogumi.compress.prune.phases import Gradual
from cogumi.compress.prune.sparsity import Mix, front, importance, least, least_of_four, part_of, scaled, score
from cogumi.core.errors import ArtifactError, DataError, RecipeError, TrainingError
from cogumi.core.stage import CHECKPOINT
from cogumi.core.types import Artifact
from cogumi.data.examples import split_path, write_examples
from cogumi.models.folders import load, save_tensors
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss
from support import pico
from support.train import context, example, sums

METHODS = ("magnitude", "wanda", "sparsegpt")
LOOP = {"steps": 12, "batch": 10, "lr": 0.003, "muon_lr": 0.003, "evaluate_every": 3, "checkpoint_every": 2}


def artifact(path):
    return Artifact("test", path, "0", {}, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("prune")
    pico.make_model(root / "base", scale=0.2)
    rows = [example(f"{a} plus {b}", str(a + b), 1 + (a + b) % 5) for a in range(6) for b in range(6)]
    write_examples(split_path(root / "data", "train"), rows)
    write_examples(split_path(root / "data", "selection"), rows[::2])
    return root


def pruned(world, out, model="base", data="data", progress_context=None, **config):
    out.mkdir(exist_ok=True)
    inputs = {"model": artifact(world / model), "examples": artifact(world / data)}
    return prune.run(prune.Config.model_validate(config), inputs, out, progress_context or context())


def weights(folder):
    """Weight matrices by part of the model, then by name."""
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if part := part_of(name):
            found.setdefault(part, {})[name] = weight
    return found


def share(names):
    return sum(int((w == 0).sum()) for w in names.values()) / sum(w.numel() for w in names.values())


matrices = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(
        st.floats(-4, 4, width=16) | st.sampled_from([0.0, 1.0]),
        min_size=4 * shape[0] * shape[1],
        max_size=4 * shape[0] * shape[1],
    ).map(lambda values: torch.tensor(values).view(shape[0], 4 * shape[1]))
)


@given(matrices, st.floats(0, 1, exclude_max=True))
@settings(max_examples=80, deadline=None)
def test_mask_removes_exactly_the_lowest_share_and_the_first_of_equal_scores(weight, wanted):
    scores = importance(weight, Mix())
    mask = least(scores, wanted)
    removed = scores[mask]
    assert len(removed) == round(wanted * weight.numel())
    if 0 < len(removed) < weight.numel():
        assert removed.max() <= scores[~mask].min()
        last = removed.max()
        equals = mask.flatten()[scores.flatten() == last]
        assert equals.tolist() == sorted(equals.tolist(), reverse=True)


@given(matrices, st.sampled_from([1, 2]))
@settings(max_examples=80, deadline=None)
def test_n_of_4_mask_removes_the_lowest_of_every_four_neighbours(weight, removed):
    scores = importance(weight, Mix())
    mask = least_of_four(scores, removed)
    assert mask.shape == weight.shape
    for four, dead in zip(scores.reshape(-1, 4).tolist(), mask.reshape(-1, 4).tolist(), strict=True):
        first = sorted(range(4), key=lambda i: four[i])[:removed]  # Python's sort is stable
        assert [i for i in range(4) if dead[i]] == sorted(first)


@given(matrices)
@settings(max_examples=40, deadline=None)
def test_magnitude_wanda_and_taylor_are_special_cases_of_the_mix(weight):
    gradient, columns = weight.flip(0) + 0.5, weight[0].abs() + 0.1
    alive = weight != 0
    wanda = importance(weight, Mix(activation=1), gradient, columns)
    taylor = importance(weight, Mix(gradient=1), gradient, columns)
    assert torch.allclose(wanda[alive], (weight.abs() * columns).double()[alive])
    assert torch.allclose(taylor[alive], (weight * gradient).abs().double()[alive])
    for mix in (Mix(), Mix(magnitude=0, gradient=1)):
        assert (importance(weight, mix, gradient)[~alive] < 0).all()
    with pytest.raises(ValidationError, match="at least one of magnitude, gradient, activation"):
        Mix(magnitude=0)


@given(st.dictionaries(st.sampled_from("abc"), st.tuples(st.floats(0.1, 0.9), st.integers(1, 99)), min_size=1))
def test_shares_are_scaled_to_an_overall_sparsity(parts):
    shares, counts = {p: s for p, (s, _) in parts.items()}, {p: n for p, (_, n) in parts.items()}
    found = scaled(shares, counts, 0.1)
    total = sum(counts.values())
    assert sum(found[p] * counts[p] for p in parts) / total == pytest.approx(0.1)
    assert len({round(found[p] / shares[p], 9) for p in parts}) == 1
    if len(set(shares.values())) == 1:
        assert scaled(shares, counts, 0.95) == pytest.approx(dict.fromkeys(parts, 0.95))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_pareto_front_contains_the_best_score_and_only_undominated_points(points):
    optimal = front(points)
    best = max(range(len(points)), key=lambda i: score(*points[i]))
    assert optimal[best]
    for (quality, size), on_front in zip(points, optimal, strict=True):
        dominated = any(q >= quality and s <= size and (q > quality or s < size) for q, s in points)
        assert on_front != dominated


@pytest.mark.parametrize("method", METHODS)
def test_each_part_reaches_its_sparsity(world, tmp_path, method):
    metrics = pruned(world, tmp_path / "out", method=method)
    target = {"attention": 0.6, "feed_forward": 0.7, "embeddings": 0.5}
    for part, names in weights(tmp_path / "out").items():
        reported = metrics["parts"][part]
        assert reported["asked"] == target[part]
        assert reported["reached"] == share(names) == pytest.approx(target[part], abs=0.016)  # Wanda rounds down by row
        assert reported["weights"] == sum(w.numel() for w in names.values())
    model = load(tmp_path / "out")
    count = sum(int((p == 0).sum()) for p in model.parameters())
    assert metrics["zeros"] == {"before": 0, "after": count}
    assert metrics["sparsity"] == count / sum(p.numel() for p in model.parameters())
    assert metrics["zstd_bytes"]["pruned"] < 0.6 * metrics["zstd_bytes"]["dense"]
    assert metrics["pruned"]["nats"] != metrics["dense"]["nats"]
    assert metrics["pruned"]["perplexity"] == math.exp(metrics["pruned"]["nats"])


@pytest.mark.parametrize("method", METHODS)
def test_2_4_structure(world, tmp_path, method):
    metrics = pruned(world, tmp_path / "out", method=method, structure="2:4")
    for part, names in weights(tmp_path / "out").items():
        assert metrics["parts"][part]["reached"] == 0.5
        for weight in names.values():
            assert ((weight == 0).reshape(-1, 4).sum(1) == 2).all()


def test_wanda_is_the_product_of_weight_and_input(world, tmp_path):
    """The inputs of the first layer do not change, so its mask can be computed from the dense model."""
    pruned(world, tmp_path / "out", method="wanda", parts={"attention": 0.5}, calibration={"rows": 20})
    model, llama = load(world / "base"), Llama.load(world / "base")
    tokenizer = HFTokenizer.load(world / "base")
    rows = draw_rows(world / "data", tokenizer, 1024, Draw(rows=20), context().seed)
    columns = masks.activations(model, llama, rows, context())
    name = "model.layers.0.self_attn.k_proj.weight"
    scores = importance(dict(model.named_parameters())[name].detach(), Mix(activation=1), columns=columns[name])
    wanted = torch.stack([least(row, 0.5) for row in scores])
    assert torch.equal(weights(tmp_path / "out")["attention"][name] == 0, wanted)


def test_gradient_and_activation_change_the_mask(world, tmp_path):
    shas = {
        pruned(world, tmp_path / str(i), method="magnitude", mix=mix)["model_sha256"]
        for i, mix in enumerate([{}, {"gradient": 1}, {"activation": 1}, {"gradient": 1, "activation": 0.5}])
    }
    assert len(shas) == 4


def test_runs_are_reproducible_silent_and_leave_no_extra_files(world, tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shas = [pruned(world, tmp_path / name)["model_sha256"] for name in ("a", "b")]
    assert shas[0] == shas[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "here").iterdir())
    shutil.rmtree(tmp_path / "a" / CHECKPOINT)
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == files
    output = capfd.readouterr()
    assert output.out == output.err == ""


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zero_when_more_is_pruned(world, tmp_path, method):
    parts = {"attention": 0.3, "feed_forward": 0.5}
    pruned(world, tmp_path / "some", method="magnitude", parts=parts)
    more = pruned(
        tmp_path, tmp_path / "more", "some", data=world / "data", method=method, parts=dict.fromkeys(parts, 0.5)
    )
    before, after = weights(tmp_path / "some"), weights(tmp_path / "more")
    for part in parts:
        for name, weight in before[part].items():
            assert not after[part][name][weight == 0].any()
    for name, weight in before["feed_forward"].items():
        assert torch.equal(after["feed_forward"][name] == 0, weight == 0)  # already sparse enough: unchanged
    assert more["zeros"]["before"] > 0


def test_zeros_stay_zero_under_adam_and_muon(world, tmp_path):
    model = load(world / "base")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight[least(weight.abs(), 0.6)] = 0.0
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows = sums(HFTokenizer.load(world / "base"), 4)
    for extra in ({}, {"muon_lr": 0.01}):
        with masks.held(model) as after_step:
            config = LoopConfig(steps=4, batch=8, lr=0.01, warmup=0, **extra)
            train(model, rows, answer_loss, config, tmp_path / str(len(extra)), context(), after_step=after_step)
        for name, weight in model.named_parameters():
            assert not weight[before[name] == 0].any()
            assert not torch.equal(weight, before[name])


class Killed(Exception):
    pass


def killed_at(step):
    """A context whose progress callback raises `Killed` at its `moment`-th training step."""
    calls = 0

    def progress(done, total, figures):
        nonlocal calls
        calls += "loss" in figures
        if calls == step:
            raise Killed

    return context(progress=progress)


def test_gradual_pruning_trains_between_phases_and_resumes_after_kills(world, tmp_path):
    config = {"method": "magnitude", "gradual": {"phases": 3, "loop": LOOP}}
    metrics = pruned(world, tmp_path / "whole", **config)
    for k, phase in enumerate(metrics["phases"], 1):
        assert phase["asked"] == pytest.approx({"attention": 0.2 * k, "feed_forward": 0.7 * k / 3, "embeddings": k / 6})
        assert phase["reached"] == pytest.approx(phase["asked"], abs=1e-3)
        assert phase["trained"]["nats"] < phase["cut"]["nats"]
        assert phase["steps"] == 4
    assert metrics["pruned"] == metrics["phases"][-1]["trained"]
    assert metrics["parts"]["attention"]["reached"] == share(weights(tmp_path / "whole")["attention"])
    at_once = pruned(world, tmp_path / "once", method="magnitude")
    assert metrics["pruned"]["nats"] < at_once["pruned"]["nats"]
    for step in (3, 5, 4):  # in the first phase, in the second, in the third
        with pytest.raises(Killed):
            pruned(world, tmp_path / "killed", progress_context=killed_at(step), **config)
    again = pruned(world, tmp_path / "killed", **config)
    assert json.dumps(again) == json.dumps(metrics)


def test_progress_reaches_the_total_number_of_steps(world, tmp_path):
    reported = []
    progress_context = context(
        progress=lambda done, total, figures: reported.append((done, total)) if "loss" in figures else None
    )
    pruned(
        world,
        tmp_path / "out",
        method="magnitude",
        gradual={"phases": 2, "loop": LOOP},
        progress_context=progress_context,
    )
    assert reported == [(number, 12) for number in range(1, 13)]


def test_grid_search_writes_the_best_model_a_table_and_a_plot(world, tmp_path):
    grid = {"sparsities": [0.3, 0.6], "methods": ["magnitude", "wanda"]}
    metrics = pruned(world, tmp_path / "out", grid=grid)
    grid_results = metrics["grid"]
    assert list(grid_results) == ["magnitude-0.3", "magnitude-0.6", "wanda-0.3", "wanda-0.6"]
    for name, found in grid_results.items():
        kept = math.exp(metrics["dense"]["nats"] - found["pruned"]["nats"])
        exact_ratio = found["pruned"]["exact"] / metrics["dense"]["exact"] if metrics["dense"]["exact"] else kept
        assert found["quality"] == pytest.approx((kept + exact_ratio) / 2)
        assert found["score"] == pytest.approx(found["quality"] - found["zstd_bytes"] / metrics["zstd_bytes"]["dense"])
        # norm weights are not pruned
        assert found["sparsity"] == pytest.approx(float(name.split("-")[1]), abs=0.02)
    best = max(grid_results, key=lambda name: grid_results[name]["score"])
    assert metrics["chosen"] == best
    assert grid_results[best]["front"]
    assert {p: share(w) for p, w in weights(tmp_path / "out").items()} == grid_results[best]["reached"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"**{best}** (chosen)" in report
    assert "score = quality - zstd bytes / zstd bytes(dense)" in report
    assert (tmp_path / "out" / "grid.png").read_bytes().startswith(b"\x89PNG")
    # the chosen setting without a grid gives the same model
    alone = pruned(world, tmp_path / "alone", method=grid_results[best]["method"], parts=grid_results[best]["asked"])
    assert alone["model_sha256"] == metrics["model_sha256"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"parts": {"atention": 0.5}}, "there is no part 'atention'; did you mean 'attention'"),
        ({"parts": {"attention": 1.0}}, "less than 1"),
        ({"parts": {"attention": -0.1}}, "greater than or equal to 0"),
        ({"parts": {}}, "at least 1"),
        ({"structure": "2:4", "parts": {"attention": 0.6}}, "exactly 50% go, never 0.6"),
        ({"structure": "2:4", "grid": {"sparsities": [0.5, 0.65]}}, "exactly 50% go, never 0.65"),
        ({"structure": "2:4", "gradual": {"phases": 4}}, "in 1 or 2 phases"),
        ({"gradual": {"phases": 3}}, "2000 steps cannot be shared by 3 phases"),
        ({"grid": {"sparsities": [1.0]}}, "less than 1"),
        ({"calibration": {"rows": 0}}, "greater than or equal to 1"),
    ],
)
def test_invalid_config_is_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        prune.Config.model_validate(config)


def test_default_sparsities_sum_to_65_percent():
    shape = {"attention": 262144, "feed_forward": 589824, "embeddings": 131072}
    shares = prune.Config().shares
    assert sum(shares[part] * n for part, n in shape.items()) / sum(shape.values()) == pytest.approx(0.65, abs=0.005)
    assert set(prune.Config(structure="2:4").shares.values()) == {0.5}
    gradual = Gradual()
    assert [0.65 * k / gradual.phases for k in range(1, 5)] == pytest.approx([0.1625, 0.325, 0.4875, 0.65])
    assert gradual.loop.steps == 2000


def changed(world, to, name, change):
    shutil.copytree(world / "base", to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_tensors(tensors, to / "model.safetensors", {"format": "pt"})


def test_unprunable_input_is_refused_and_leaves_no_files(world, tmp_path):
    def refused(error, match, model=world / "base", data=world / "data", **config):
        with pytest.raises(error, match=match):
            pruned(world, tmp_path / "out", model, data, **{"method": "magnitude", **config})
        assert not list((tmp_path / "out").iterdir())

    refused(RecipeError, "no part 'head' \\(its head is its embedding\\)", parts={"head": 0.5})
    refused(RecipeError, "99% overall takes 1\\d\\d% of feed_forward", grid={"sparsities": [0.99]})
    write_examples(split_path(tmp_path / "empty", "train"), [])
    refused(DataError, "no rows to calibrate on", data=tmp_path / "empty")
    name = "model.layers.1.mlp.up_proj.weight"
    changed(world, tmp_path / "nan", name, lambda w: w.index_fill(0, torch.tensor(3), math.nan))
    refused(ArtifactError, f"{name} holds NaN or infinity", model=tmp_path / "nan")
    shutil.copytree(world / "base", tmp_path / "cut")
    whole = (world / "base" / "model.safetensors").read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:size])
        refused(ArtifactError, "holds no model that can be loaded", model=tmp_path / "cut")
    narrow = load(world / "base")
    narrow.config.intermediate_size = 66
    shutil.copytree(world / "base", tmp_path / "narrow")
    type(narrow)(narrow.config).save_pretrained(tmp_path / "narrow")
    refused(RecipeError, "multiple of 4 weights, and .*down_proj.weight has 66", tmp_path / "narrow", structure="2:4")


def test_damaged_checkpoint_of_a_killed_run_is_reported(world, tmp_path):
    pruned(world, tmp_path, method="magnitude")
    kept = tmp_path / CHECKPOINT / "magnitude" / "pruned.safetensors"
    kept.write_bytes(kept.read_bytes()[:-5])
    with pytest.raises(TrainingError, match="cannot be read"):
        pruned(world, tmp_path, method="magnitude")

"""Stage `backbone`: a shared adapter and small heads factored from existing adapters; the maths, then the stage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cogumi.compress.gguf.export import export_adapter
from cogumi.core.errors import ArtifactError, TrainingError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import example_id, split_path, write_examples
from cogumi.data.responses import Response, write_responses
from cogumi.models.folders import load
from cogumi.models.lora import with_adapter
from cogumi.models.lora_factors import WEIGHTS, Factors, read_adapter, same_layers, write_adapter
from cogumi.models.shared_backbone import Backbone
from cogumi.models.tokenization import HFTokenizer
from cogumi.train import backbone
from cogumi.train.batches import make_rows
from cogumi.train.shared_update import Span, clusters, cosines, explained, gram, split
from cogumi.train.validation import applied, judge_answers
from support import pico

CONTEXT = Context(3, 1, Path(), lambda done, total, figures: None)
LOOP = {"steps": 12, "batch": 8, "lr": 0.003, "warmup": 2, "evaluate_every": 4, "checkpoint_every": 1000}


def artifact(path, **metrics):
    return Artifact("test", path, "0", {}, metrics)


def example(domain, question, answer):
    messages = (Message("user", question),)
    return Example(example_id(domain, messages), domain, 3, messages, answer)


def factors(rank, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator).T.mT)


def updates(count, rank=3, rows=12, columns=9):
    return [factors(rank, rows, columns, seed) for seed in range(count)]


def whole(f):
    return (f.b @ f.a).double()


# the maths


@given(st.integers(2, 5), st.integers(1, 6), st.integers(4, 20), st.integers(4, 20))
@settings(max_examples=30, deadline=None)
def test_joint_basis_represents_every_update_and_keeps_norms(count, rank, rows, columns):
    given_updates = updates(count, rank, rows, columns)
    span = Span.of(given_updates)
    for update, core in zip(given_updates, span.cores, strict=True):
        assert torch.allclose(span.left @ core @ span.right.T, whole(update), atol=1e-5)
    products = gram({"layer": span})
    assert products == pytest.approx(
        np.array([[float((whole(a) * whole(b)).sum()) for b in given_updates] for a in given_updates]),
        rel=1e-4,
        abs=1e-4,
    )


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_more_rounds_never_increase_the_error_and_ranks_are_respected(rank, head, rounds):
    cores = Span.of(updates(4)).cores

    def error(r):
        shared, heads = split(cores, rank, head, r)
        return float((cores - shared - heads).square().sum())

    assert error(rounds + 1) <= error(rounds) * (1 + 1e-9) + 1e-20
    shared, heads = split(cores, rank, head, rounds)
    assert torch.linalg.matrix_rank(shared, rtol=1e-8) <= rank
    assert all(torch.linalg.matrix_rank(h, rtol=1e-8) <= head for h in heads)


def test_common_part_is_shared_and_the_rest_goes_to_the_heads():
    """Adapters made of a common update and a small individual one are separated again."""
    common, own = factors(2, 20, 16, 99), [factors(1, 20, 16, seed) for seed in range(5)]
    made = [common + Factors(o.a, 0.5 * o.b) for o in own]
    span = Span.of(made)
    shared, heads = split(span.cores, 2, 1, 200)
    assert float((span.cores - shared - heads).norm() / span.cores.norm()) < 0.02
    found = whole(span.factors(shared, 2))
    assert float((found - whole(common)).norm() / whole(common).norm()) < 0.2
    with_heads = [whole(span.factors(shared, 2) + span.factors(h, 1)) for h in heads]
    for update, again in zip(made, with_heads, strict=True):
        assert float((again - whole(update)).norm() / whole(update).norm()) < 0.05


def test_similar_adapters_form_a_cluster_and_others_do_not():
    one, other = factors(3, 12, 9, 1), factors(3, 12, 9, 2)
    noise = [factors(3, 12, 9, seed) for seed in (3, 4)]
    made = [one, other, *(one + Factors(n.a, 0.1 * n.b) for n in noise)]
    products = gram({"layer": Span.of(made)})
    alike = cosines(products)
    assert np.diag(alike) == pytest.approx(np.ones(4))
    assert clusters(alike, 0.5) == [1, 2, 1, 1]
    assert clusters(alike, 0.9999) == [1, 2, 3, 4]
    shares = explained(products)
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert cosines(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]
    assert explained(np.zeros((2, 2))) == [0, 0]


# the stage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two adapters with a common part, a third in the domain of the second, and questions the base failed."""
    root = tmp_path_factory.mktemp("backbone")
    base = pico.make_model(root / "base", scale=0.08)
    common = read_adapter(pico.make_adapter(root / "common", base, rank=4, seed=50, scale=0.05))
    for seed, name in enumerate(("math", "code", "code_control")):
        own = read_adapter(pico.make_adapter(root / "own", base, rank=2, seed=seed, scale=0.03))
        write_adapter({layer: common[layer] + own[layer] for layer in own}, root / "common", root / name)
    rows = [example("math", f"{a} plus {b}", str(a + b)) for a in range(6) for b in range(6)]
    rows += [example("code", f"function {a} of {b}", f"return {a}{b}") for a in "abcd" for b in "wxyz"]
    for name in ("train", "selection"):
        write_examples(split_path(root / "data", name), rows if name == "train" else rows[::4])
    (root / "responses").mkdir()
    write_responses(root / "responses", [Response(e.id, "?", i % 3 == 0, "", 1.0, 2, True) for i, e in enumerate(rows)])
    return root


def inputs(world, **adapters):
    known = {"math": {"domain": "math"}, "code": {"domain": "code"}}
    given_adapters = adapters or {
        "adapter_math": artifact(world / "math", **known["math"]),
        "adapter_code": artifact(world / "code", **known["code"]),
        "adapter_code_control": artifact(world / "code_control", domain="code", trained_on="random"),
    }
    found = {name: artifact(world / path) for name, path in
             (("model", "base"), ("examples", "data"), ("responses", "responses"))}  # fmt: skip
    return {**found, **given_adapters}


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    config = backbone.Config.model_validate({"shared": 4, "head": 2, "loop": LOOP})
    return out, backbone.run(config, inputs(world), out, CONTEXT)


def rows_of(world, domain):
    found = [json.loads(line) for line in split_path(world / "data", "selection").read_text().splitlines()]
    examples = [example(r["domain"], r["messages"][0]["content"], r["answer"]) for r in found if r["domain"] == domain]
    return make_rows(examples, HFTokenizer.load(world / "base"), 1024)


def test_metrics_equal_those_of_the_files_loaded_by_peft(world, built):
    """For the base, the original adapter, and shared part plus head as one ordinary adapter."""
    out, metrics = built
    for name, found in metrics["domains"].items():
        rows = rows_of(world, found["domain"])
        assert judge_answers(applied(load(world / "base")), rows)["loss"] == pytest.approx(
            found["base"]["loss"], rel=1e-5
        )
        for folder, key in ((world / name, "before"), (out / f"adapter_{name}", "after")):
            adapted = with_adapter(load(world / "base"), folder)
            assert judge_answers(applied(adapted), rows)["loss"] == pytest.approx(found[key]["loss"], rel=1e-4)


def test_training_improves_on_the_factorisation(built):
    _, metrics = built
    mean = {key: np.mean([d[key]["loss"] for d in metrics["domains"].values()]) for key in ("untrained", "after")}
    assert mean["after"] < mean["untrained"] - 0.05
    assert metrics["kept"]["by_shared"] < metrics["kept"]["by_both"] <= 1
    assert metrics["kept"]["by_both"] > 0.9  # these adapters were made of parts of exactly these ranks


def test_shared_part_is_counted_once_and_files_are_complete(world, built):
    out, metrics = built
    shared, head = (load_file(out / name / WEIGHTS) for name in ("shared", "head_math"))
    assert {t.shape[0] for n, t in shared.items() if "lora_A" in n} == {4}
    assert {t.shape[0] for n, t in head.items() if "lora_A" in n} == {2}
    sizes = [
        (out / name / WEIGHTS).stat().st_size for name in ("shared", "head_math", "head_code", "head_code_control")
    ]
    before = sum((world / name / WEIGHTS).stat().st_size for name in ("math", "code", "code_control"))
    assert metrics["bytes"] == {"before": before, "after": sum(sizes)}
    assert sum(sizes) < before
    together = read_adapter(out / "adapter_math")
    apart = [read_adapter(out / name) for name in ("shared", "head_math")]
    for layer, factors_ in together.items():
        assert torch.allclose(whole(factors_), sum(whole(part[layer]) for part in apart), atol=1e-6)
    export_adapter(out / "adapter_code", world / "base", out / "code.gguf")
    assert (out / "code.gguf").stat().st_size > 0
    assert "15 domains or fewer" in (out / "report.md").read_text()
    assert (out / "backbone.png").read_bytes().startswith(b"\x89PNG")


def test_equal_inputs_give_equal_bytes(world, built, tmp_path):
    config = backbone.Config.model_validate({"shared": 4, "head": 2, "loop": LOOP})
    backbone.run(config, inputs(world), tmp_path, CONTEXT)
    for name in ("shared", "head_code", "adapter_math"):
        for file in (WEIGHTS, "adapter_config.json"):
            assert sha256(tmp_path / name / file) == sha256(built[0] / name / file)


def test_without_a_shared_part_only_heads_are_written(world, tmp_path):
    config = backbone.Config.model_validate({"shared": 0, "head": 3, "loop": {**LOOP, "steps": 2}})
    metrics = backbone.run(config, inputs(world), tmp_path, CONTEXT)
    assert not (tmp_path / "shared").exists()
    assert metrics["kept"]["by_shared"] == 0


def test_rows_of_one_batch_use_their_own_heads(world):
    adapters = [read_adapter(world / name) for name in ("math", "code")]
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [9, 6, 7, 8]])
    model = Backbone(load(world / "base"), {}, adapters)
    with torch.no_grad():
        mixed = model.under(torch.tensor([0, 1, 0]))(ids).logits
        for row, name in ((0, "math"), (1, "code"), (2, "math")):
            alone = with_adapter(load(world / "base"), world / name)(ids[row : row + 1]).logits
            assert torch.allclose(mixed[row], alone[0], atol=1e-4)
        model.release()
        assert torch.allclose(model.model(ids).logits, load(world / "base")(ids).logits)


def test_mismatched_inputs_are_refused_by_name(world, tmp_path):
    def run(**adapters):
        return backbone.run(backbone.Config(), inputs(world, **adapters), tmp_path, CONTEXT)

    math = artifact(world / "math", domain="math")
    with pytest.raises(TrainingError, match="needs two adapters or more, 1 given"):
        run(adapter_math=math)
    with pytest.raises(ArtifactError, match="adapter 'code' was trained on another base"):
        run(adapter_math=math, adapter_code=artifact(world / "code", domain="code", base_sha256="0" * 64))
    with pytest.raises(TrainingError, match=r"no questions of domain 'maths' of adapter 'other'; did you"):
        run(adapter_math=math, adapter_other=artifact(world / "code", domain="maths"))
    wide = pico.make_model(tmp_path / "wide", hidden=128)
    pico.make_adapter(tmp_path / "wide_adapter", wide)
    with pytest.raises(ArtifactError, match=r"adapter 'wide' is made for model\.layers\.0\.mlp\.down_proj of shape"):
        run(adapter_math=math, adapter_wide=artifact(tmp_path / "wide_adapter", domain="code"))
    both = {name: artifact(tmp_path / "wide_adapter", domain=name.removeprefix("adapter_")) for name in
            ("adapter_math", "adapter_code")}  # fmt: skip
    with pytest.raises(ArtifactError, match=r"are made for .* of shape .*, the model has one of shape"):
        run(**both)
    adapter = read_adapter(world / "math")
    nothing = {layer: Factors(f.a, 0 * f.b) for layer, f in adapter.items()}
    for domain in ("math", "code"):
        write_adapter(nothing, world / "math", tmp_path / domain)
    with pytest.raises(ArtifactError, match="every update of the adapters is zero"):
        run(**{f"adapter_{d}": artifact(tmp_path / d, domain=d) for d in ("math", "code")})
    lacking = {layer: f for layer, f in adapter.items() if "q_proj" not in layer}
    with pytest.raises(ArtifactError, match=r"adapter 'b' does not adapt model\.layers\.0\.self_attn\.q_proj"):
        same_layers({"a": adapter, "b": lacking})
    with pytest.raises(ArtifactError, match="holds no adapter that can be read"):
        read_adapter(tmp_path / "nowhere")


def test_domain_without_failures_is_refused_by_name(world, tmp_path):
    found = inputs(world)
    (tmp_path / "responses").mkdir()
    rows = [json.loads(line) for line in split_path(world / "data", "train").read_text().splitlines()]
    write_responses(tmp_path / "responses", [Response(r["id"], "", True, "", 1.0, 2, True) for r in rows])
    with pytest.raises(TrainingError, match="failed no training question of 'code'"):
        backbone.run(backbone.Config(), {**found, "responses": artifact(tmp_path / "responses")}, tmp_path, CONTEXT)

"""Stage `compress_adapter` on a pico model trained on additions, and the maths of rank reduction and pruning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cogumi.compress import compress_adapter
from cogumi.compress.compress_adapter import Config, energy_kept, pruned, reduced
from cogumi.compress.gguf import export
from cogumi.core.errors import ArtifactError, DataError, ExportError
from cogumi.core.files import sha256
from cogumi.core.types import Artifact, Request
from cogumi.data.examples import split_path, write_examples
from cogumi.data.responses import Response, write_responses
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.models.lora_factors import Factors, read_adapter
from support import pico
from support.train import context, example

ranks = st.integers(1, 8)


@st.composite
def updates(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows, columns, rank = draw(st.integers(3, 20)), draw(st.integers(3, 20)), draw(ranks)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return Factors(a, b * torch.rand(rank, generator=generator))


def product(update):
    return update.b.double() @ update.a.double()


@settings(deadline=None, max_examples=50)
@given(updates(), ranks)
def test_rank_reduction_is_the_best_approximation_of_its_rank(update, rank):
    found = reduced(update, rank)
    assert len(found.a) == rank == found.b.shape[1]
    u, s, vt = torch.linalg.svd(product(update))
    k = min(rank, len(s))
    best = (u[:, :k] * s[:k]) @ vt[:k]
    assert torch.allclose(product(found), best, atol=1e-4)
    energy_lost = float(s[k:].square().sum() / s.square().sum())
    assert energy_kept({"x": update}, {"x": found}) == pytest.approx(1 - energy_lost, abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(updates(), st.floats(0, 0.99))
def test_pruning_zeroes_its_share_and_changes_no_other_value(update, share):
    found = pruned(update, share)
    values = update.a.numel() + update.b.numel()
    gone = sum(int((x == 0).sum()) for x in (found.a, found.b))
    assert gone == round(share * values)
    for before, after in ((update.a, found.a), (update.b, found.b)):
        assert torch.equal(after, torch.where(after == 0, 0, before))


def test_pruning_removes_the_value_that_changes_the_product_least():
    update = Factors(torch.tensor([[3.0, 4.0], [0.1, 5.0]]), torch.tensor([[1.0, 10.0], [1.0, 0.5]]))
    remaining = pruned(update, 1 / 8)
    costs = {}
    for side in ("a", "b"):
        for i in range(2):
            for j in range(2):
                with_changed_adapter = getattr(update, side).clone()
                with_changed_adapter[i, j] = 0
                costs[side, i, j] = float(
                    (product(update) - product(replace(update, **{side: with_changed_adapter}))).norm()
                )
    side, i, j = min(costs, key=lambda key: costs[key])
    assert getattr(remaining, side)[i, j] == 0


@pytest.fixture(scope="module")
def given_artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    base = pico.make_model(root / "base", hidden=64)
    folder = pico.make_adapter(root / "adapter", base, rank=6, scale=0.1)
    rows = [example(f"{a} plus {b}", str(a + b)) for a in range(8) for b in range(5)]
    (root / "data").mkdir()
    for split in ("train", "selection"):
        write_examples(split_path(root / "data", split), rows)
    (root / "responses").mkdir()
    write_responses(root / "responses", [Response(e.id, "?", i % 4 == 0, "", 1.0, 1, True) for i, e in enumerate(rows)])
    metrics = {"domain": "math", "base_sha256": sha256(base / "model.safetensors")}

    def artifact(path, **metrics):
        return Artifact("x", path, "f" * 64, {}, metrics)

    inputs = {"model": artifact(base), "examples": artifact(root / "data"), "responses": artifact(root / "responses")}
    return inputs | {"adapter": artifact(folder, **metrics)}


def run(inputs, out, **config):
    out.mkdir(parents=True, exist_ok=True)
    return compress_adapter.run(Config(**config), inputs, out, context())


def test_metrics_report_the_cost_and_bytes_are_reproducible(given_artifacts, tmp_path):
    metrics = run(given_artifacts, tmp_path / "a", rank=3)
    again = run(given_artifacts, tmp_path / "b", rank=3)
    assert metrics == again
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before, after = read_adapter(given_artifacts["adapter"].path), read_adapter(tmp_path / "a")
    assert metrics["likeness"] == pytest.approx(energy_kept(before, after), abs=1e-6)
    assert 0.3 < metrics["likeness"] < 1
    assert metrics["parameters"] * 2 == metrics["parameters_before"]
    assert set(metrics["selection"]) == {"base", "before", "compressed"}
    assert metrics["domain"] == "math"


def test_padding_to_a_higher_rank_keeps_the_loss_and_fills_gguf_blocks(given_artifacts, tmp_path):
    metrics = run(given_artifacts, tmp_path / "a")
    assert metrics["rank"] == 32
    assert metrics["likeness"] == pytest.approx(1, abs=1e-6)
    seen = metrics["selection"]
    assert seen["compressed"]["loss"] == pytest.approx(seen["before"]["loss"], abs=1e-4)
    for type in ("q8_0", "q4_0", "f16"):
        path = tmp_path / f"{type}.gguf"
        export.export_adapter(tmp_path / "a", given_artifacts["model"].path, path, type)
        types = {t.tensor_type.name.lower() for t in GGUFReader(path).tensors}
        assert types == {type}


def test_training_after_pruning_lowers_the_loss_and_keeps_zeros(given_artifacts, tmp_path):
    loop = {"steps": 30, "batch": 8, "lr": 0.01, "warmup": 0, "evaluate_every": 10}
    metrics = run(given_artifacts, tmp_path / "a", rank=6, prune=0.8, loop=loop)
    assert metrics["steps"] == 30
    assert metrics["zeros"] == pytest.approx(0.8 * metrics["parameters"], abs=len(read_adapter(tmp_path / "a")))
    assert metrics["selection"]["healed"]["loss"] < metrics["selection"]["compressed"]["loss"]


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_answers_with_a_quantized_adapter_do_not_depend_on_the_batch(given_artifacts, tmp_path, type):
    run(given_artifacts, tmp_path / "a")
    base = given_artifacts["model"].path
    export.export_model(base, tmp_path / "m.gguf")
    export.export_adapter(tmp_path / "a", base, tmp_path / "a.gguf", type)
    engine = LlamaEngine(tmp_path / "m.gguf", slots=4, context=64, threads=1, adapters={"math": tmp_path / "a.gguf"})
    requests = [Request(prompt=f"{i} plus 4", max_tokens=12, adapter="math", speculate=False) for i in range(4)]
    sequential = [final_reply(engine.generate(request)) for request in requests]
    concurrent = [final_reply(events) for events in [engine.generate(request) for request in requests]]
    speculative = [final_reply(engine.generate(replace(request, speculate=True))) for request in requests]
    plain = final_reply(engine.generate(replace(requests[0], adapter=None)))
    engine.close()

    def bits(replies):
        return [[(t.id, t.logprob) for t in reply.tokens] for reply in replies]

    assert bits(sequential) == bits(concurrent) == bits(speculative)
    assert bits([plain]) != bits(sequential[:1])


def test_quantized_adapters_are_smaller_and_give_similar_hidden_states(given_artifacts, tmp_path):
    run(given_artifacts, tmp_path / "a")
    base, sizes, states = given_artifacts["model"].path, {}, {}
    export.export_model(base, tmp_path / "m.gguf", "f32")
    for type in ("f32", "q8_0", "q4_0"):
        path = tmp_path / f"{type}.gguf"
        export.export_adapter(tmp_path / "a", base, path, type)
        sizes[type] = sum(t.n_bytes for t in GGUFReader(path).tensors)
        engine = LlamaEngine(tmp_path / "m.gguf", slots=1, context=64, threads=1, adapters={"math": path}, cache="f16")
        states[type] = np.array(engine.read(Request(prompt="1 plus 1", adapter="math")).last)
        engine.close()
    assert sizes["q8_0"] * 32 == sizes["f32"] * 8.5
    assert sizes["q4_0"] * 32 == sizes["f32"] * 4.5

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert cosine(states["q8_0"], states["f32"]) > 0.9999
    assert cosine(states["q4_0"], states["f32"]) > 0.99


def refused(inputs, out, error, match, **config):
    with pytest.raises(error, match=match) as caught:
        run(inputs, out, **config)
    assert "\n" not in str(caught.value)
    assert not (out / "adapter_model.safetensors").exists()


def with_changed_adapter(inputs, folder, change):
    """The same inputs with an adapter whose weight file was changed."""
    folder.mkdir()
    for file in inputs["adapter"].path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    change(folder / "adapter_model.safetensors")
    return inputs | {"adapter": replace(inputs["adapter"], path=folder)}


@pytest.mark.parametrize("config", [{"rank": 0}, {"prune": 1.0}, {"prune": -0.1}, {"sparsity": 0.8}])
def test_settings_out_of_range_are_refused(config):
    with pytest.raises(ValidationError):
        Config(**config)


@settings(deadline=None, max_examples=8)
@given(cut=st.floats(0, 0.99))
def test_truncated_adapter_is_refused(given_artifacts, tmp_path_factory, cut):
    root = tmp_path_factory.mktemp("cut")
    inputs = with_changed_adapter(
        given_artifacts, root / "cut", lambda p: p.write_bytes(p.read_bytes()[: int(cut * p.stat().st_size)])
    )
    refused(inputs, root / "out", ArtifactError, "holds no adapter that can be read")


def test_bad_input_is_refused_with_its_reason(given_artifacts, tmp_path):
    def nan(path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, path)

    def zero(path):
        from safetensors.torch import load_file, save_file

        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)

    out, inputs = tmp_path / "out", given_artifacts
    foreign = inputs | {"adapter": replace(inputs["adapter"], metrics={"base_sha256": "0" * 64})}
    refused(foreign, out, ArtifactError, "was not trained on")
    refused(with_changed_adapter(inputs, tmp_path / "nan", nan), out, ArtifactError, "holds NaN or infinity")
    refused(
        with_changed_adapter(inputs, tmp_path / "zero", zero), out, ArtifactError, "every update of the adapter is zero"
    )
    unknown_domain = inputs | {"adapter": replace(inputs["adapter"], metrics={"domain": "poetry"})}
    refused(unknown_domain, out, DataError, "no selection question of domain 'poetry'")
    folder = inputs["adapter"].path
    with pytest.raises(ExportError, match="an adapter cannot be of type 'q4_k_m'; known: f32, f16, q4_0"):
        export.export_adapter(folder, inputs["model"].path, Path(tmp_path / "a.gguf"), "q4_k_m")
    with pytest.raises(ValidationError, match="an adapter cannot be of type"):
        export.Config(adapter_type="q5_k_m")

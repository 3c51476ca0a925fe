"""Upper layers trained over cached states of the lower ones: as without the cache; resumption, bounds, errors."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, Qwen2Config, Qwen2ForCausalLM

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Given, Input
from cogumi.core.facts import RowFacts, model_at
from cogumi.core.files import sha256
from cogumi.core.types import Artifact
from cogumi.data.examples import split_path, write_examples
from cogumi.data.responses import Response, write_responses
from cogumi.models.folders import Shape, build, load, save
from cogumi.models.lora import LoraShape, with_adapter
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.models.upper_layers import lower_states, only
from cogumi.train import modifier
from cogumi.train.batches import Order, collate, make_rows
from cogumi.train.loop import LoopConfig
from cogumi.train.losses import answer_loss
from cogumi.train.trunk_cache import PHASE, TrunkCache
from cogumi.train.validation import applied, judge_answers
from cogumi.train.validation_size import LEAST, SHARE, Budget, LayerCost, sample, used
from support import pico
from support.train import context, example

LAYERS, UPPER = 4, 2
LOOP = {"steps": 8, "batch": 8, "lr": 0.01, "evaluate_every": 4, "checkpoint_every": 3, "warmup": 1}
CONFIG = modifier.Config(domain="math", lora=LoraShape(rank=6), layers=UPPER, loop=LoopConfig(**LOOP))


def artifact(path):
    return Artifact("test", path, "0", {}, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two domains, of which the base failed half of one, and a random Llama and Qwen2 of four layers."""
    root = tmp_path_factory.mktemp("trunk")
    pico.make_tokenizer(root / "tokenizer")
    rows = [example(f"{a} plus {b}", str(a + b)) for a in range(8) for b in range(8)]
    rows += [example(f"say {a}", str(a), domain="code") for a in range(60)]
    for name in ("train", "selection"):
        write_examples(split_path(root / "data", name), rows)
    (root / "responses").mkdir()
    write_responses(root / "responses", [Response(e.id, "x", i % 2 == 0, "", 0.5, 2, True) for i, e in enumerate(rows)])
    tokenizer = HFTokenizer.load(root / "tokenizer")
    shape = Shape(hidden=32, layers=LAYERS, heads=2, feed_forward=64)
    torch.manual_seed(0)
    qwen2 = Qwen2Config(
        vocab_size=tokenizer.size, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=8, max_window_layers=3,
    )  # fmt: skip
    for name, model in {"llama": build(shape, tokenizer, 0), "qwen2": Qwen2ForCausalLM(qwen2)}.items():
        (root / name).mkdir()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)  # so that layers change the states clearly
        save(model, root / "tokenizer", root / name)
    return root


def trained(world, out, config=CONFIG, model="llama", progress=lambda done, total, figures: None):
    """Run the stage; its metrics and the weights of the adapter."""
    inputs = {"examples": world / "data", "responses": world / "responses", "model": world / model}
    out.mkdir(exist_ok=True)
    found = modifier.run(config, {k: artifact(v) for k, v in inputs.items()}, out, context(progress=progress))
    return found, load_file(out / "adapter_model.safetensors")


def changed(config=CONFIG, **values):
    return config.model_copy(update=values)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run with the cache in half precision."""
    out = tmp_path_factory.mktemp("whole")
    return out, trained(world, out)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
@pytest.mark.parametrize(("cache", "loss", "weight"), [("fp32", 1e-5, 1e-4), ("fp16", 1e-3, 0.1)])
def test_cache_changes_neither_losses_nor_the_adapter(world, tmp_path, model, cache, loss, weight):
    """Equal up to the rounding of sums in fp32, and of states in fp16, which AdamW amplifies for gradients near 0."""
    expected, plain = trained(world, tmp_path / "plain", changed(cache=None), model)
    found, adapter = trained(world, tmp_path / "cached", changed(cache=cache), model)
    for curve in ("training", "selection"):
        for (step, figures), (at, others) in zip(expected["curve"][curve], found["curve"][curve], strict=True):
            assert step == at
            assert figures["loss"] == pytest.approx(others["loss"], abs=loss)
    assert found["exact"] == expected["exact"]
    assert found["selection_nats_per_token"] == pytest.approx(expected["selection_nats_per_token"], abs=loss)
    assert sorted(plain) == sorted(adapter)
    for name, tensor in plain.items():
        assert (tensor - adapter[name]).norm() <= weight * tensor.norm(), name


def test_cached_states_of_bf16_are_those_of_a_whole_pass_in_bf16(world, tmp_path):
    """The caching pass computes in the format of the training, and another format does not use its states."""
    model = load(world / "llama")
    rows = make_rows([example(f"{a} plus 1", str(a + 1)) for a in range(6)], tokenizer(world), 64)
    cache = TrunkCache(tmp_path / "trunk", rows, 2, 32, "fp32")
    found = {}
    for precision in ("fp32", "bf16"):
        cache.fill(model, context(), range(len(rows)), precision)
        with only(model, 2):
            found[precision] = judge_answers(applied(model, precision), rows, collate=cache.collate_from(0))["loss"]
        assert found[precision] == pytest.approx(judge_answers(applied(model, precision), rows)["loss"], abs=1e-5)
    assert 0 < abs(found["bf16"] - found["fp32"]) < 0.05


def test_adapter_is_on_the_upper_layers_of_the_whole_model(world, whole):
    out, (metrics, adapter) = whole
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in adapter} == {LAYERS - 2, LAYERS - 1}
    assert metrics["layers"] == UPPER
    assert metrics["parameters"] == sum(t.numel() for t in adapter.values())
    model = with_adapter(load(world / "llama"), out)
    rows = make_rows([example(f"{a} plus {b}", str(a + b)) for a in range(8) for b in range(8)], tokenizer(world), 64)
    assert metrics["judged"]["own"] == [LEAST, len(rows)]
    sampled = sample(rows, LEAST, context().seed)
    nats = judge_answers(applied(model), sampled)["loss"]
    assert nats == pytest.approx(metrics["selection_nats_per_token"]["attached"], abs=1e-3)
    assert nats < metrics["curve"]["selection"][0][1]["loss"] + 1e-3


def tokenizer(world):
    return HFTokenizer.load(world / "tokenizer")


@pytest.mark.parametrize("stop", ["caching", "training"])
def test_killed_and_resumed_gives_the_same_bytes(world, whole, tmp_path, monkeypatch, stop):
    monkeypatch.setattr("cogumi.train.validation.TOKENS", 200)  # several batches in the caching pass
    reference = tmp_path / "reference"
    expected, _ = trained(world, reference)
    cut, seen = tmp_path / "cut", []

    def interrupt(done, total, figures):
        seen.append((done, total))
        if (stop == "caching") == (PHASE in figures) and done >= 5 and 2 * done >= total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(world, cut, progress=interrupt)
    resumed = []
    found, _ = trained(world, cut, progress=lambda done, total, figures: resumed.append((done, total, dict(figures))))
    rows = [(done, total) for done, total, figures in resumed if PHASE in figures]
    assert bool(rows) == (stop == "caching")
    assert not {row for row in rows if row in seen}  # finished batches are not computed again
    assert found == expected
    for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoint/trunk.states"):
        assert sha256(cut / name) == sha256(reference / name)


def test_progress_counts_the_rows_of_the_caching_pass(world, tmp_path):
    seen = []
    metrics, _ = trained(world, tmp_path, progress=lambda done, total, figures: seen.append((done, total, figures)))
    rows = [(done, total) for done, total, figures in seen if PHASE in figures]
    judged = metrics["judged"]["own"][0] + metrics["judged"]["elsewhere"][0]
    assert rows[-1] == (judged + metrics["failed"], judged + metrics["failed"])
    assert seen[len(rows)][:2] == (1, LOOP["steps"])


def test_cache_of_other_rows_or_another_model_is_not_used(world, tmp_path):
    rows = make_rows([example(f"{a} plus 1", str(a + 1)) for a in range(6)], tokenizer(world), 64)
    model = load(world / "llama")

    def states(model, rows, below=2):
        cache = TrunkCache(tmp_path / "trunk", rows, below, 32, "fp32")
        cache.fill(model, context(), range(len(rows)))
        return cache.collate_from(0)(rows, [0]).states

    first = states(model, rows)
    assert torch.equal(states(model, rows), first)
    assert not torch.equal(states(model, rows, below=1), first)
    assert not torch.equal(states(model, rows[1:]), first[:, : rows[1].size])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(states(model, rows), first)


def test_states_too_large_for_half_precision_are_refused(world, tmp_path):
    model = load(world / "llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e8)
    cache = TrunkCache(tmp_path / "trunk", [Row((1, 2, 3), 1)], 2, 32, "fp16")
    with pytest.raises(TrainingError, match="too much for a cache of fp16; set `cache: fp32`"):
        cache.fill(model, context(), [0])


def test_parts_of_a_model_make_the_whole_and_leave_it_unchanged(world):
    for name in ("llama", "qwen2"):
        model = load(world / name)
        batch = collate([Row(tuple(range(5, 25)), 10)], [0])
        expected = answer_loss(model, batch)[0]
        states = lower_states(model, batch.ids, 1)
        with only(model, 1):
            assert len(model.model.layers) == model.config.num_hidden_layers == LAYERS - 1
            loss = answer_loss(model, replace(batch, states=states))[0]
            assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        assert len(model.model.layers) == model.config.num_hidden_layers == LAYERS
        assert answer_loss(model, batch)[0].item() == expected.item()


def test_the_head_runs_on_answers_only(world):
    model = load(world / "llama")
    rows = make_rows([example("3 plus 4", "7"), example("what is 20 plus 11", "31")], tokenizer(world), 64)
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[0]))
    answer_loss(model, collate(rows, [0, 1]))
    assert seen == [sum(row.weight for row in rows)]


def test_one_of_several_processes_computes_the_cache_for_all(world, whole, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "support.trunk"]
    command = [sys.executable, *launcher, world, tmp_path / "home", CONFIG.model_dump_json()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    leader, helper = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("home", "home-helper"))
    assert PHASE in leader.pop("phases")
    assert PHASE not in helper.pop("phases")
    assert leader == helper
    for (_, ours), (_, alone) in zip(leader["curve"]["selection"], whole[1][0]["curve"]["selection"], strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=2e-3)


def test_models_without_upper_layers_are_refused_before_work(world, tmp_path):
    with pytest.raises(TrainingError, match="layers: 4, but the model has 4; give at most 3"):
        trained(world, tmp_path, changed(layers=4))
    (world / "gpt2").mkdir(exist_ok=True)
    (world / "gpt2" / "config.json").write_text(json.dumps(GPT2Config().to_dict() | {"architectures": ["GPT2LMHead"]}))
    with pytest.raises(TrainingError, match=r"upper layers cannot be trained alone: .* is a GPT2LMHead; supported: Ll"):
        trained(world, tmp_path, model="gpt2")
    assert not list(tmp_path.iterdir())


@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=300), st.integers(1, 300), st.integers(1, 7), st.integers(0, 3),
    st.booleans(), st.integers(1, 6),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_validation_costs_at_most_a_tenth_of_the_training(sizes, steps, batch, below, cached, judged):
    """Unless that would be fewer than `LEAST` rows. Costs are counted in tokens that pass through a layer."""
    rows = [Row(tuple(range(size)), 1) for size in sizes]
    order, cost = Order(tuple(sizes), batch, 0), LayerCost.of(4, below, cached)
    budget = Budget.of(rows, order, steps, cost)
    count = budget.affordable(rows, judged)
    mean = sum(sizes) / len(sizes)
    spent = count * mean * (judged * cost.judge + cost.once)
    assert count <= len(rows)
    assert spent <= budget.cost * (1 + 1e-9) or count == min(LEAST, len(rows))
    assert spent + mean * (judged * cost.judge + cost.once) > budget.cost or count == len(rows) or count == LEAST
    if steps <= order.per_epoch:  # each row is used once: the cache costs its pass
        tokens = sum(sizes[i] for i in used(order, steps))
        per_token = 4 + (4 - below) if not cached else 2 * (4 - below) + below
        assert budget.cost == pytest.approx(SHARE * tokens * per_token)


def test_estimate_counts_the_cache_and_the_upper_layers(world):
    def cost(**values):
        model, rows = model_at("llama", world), RowFacts(64, 90, 6, 60.0)
        given = Given("m", world, {"model": Input("base", (model,)), "examples": Input("data", (rows,))})
        return modifier.estimate(changed(**values), given)

    cached, exact, plain, whole = (
        cost(**v).cost for v in ({}, {"cache": "fp32"}, {"cache": None}, {"layers": None})
    )  # fmt: skip
    assert cached.checkpoint - plain.checkpoint == 2 * 32 * plain.tokens  # 64 rows, each used once
    assert exact.checkpoint - plain.checkpoint == 4 * 32 * plain.tokens
    again = cost(loop=CONFIG.loop.model_copy(update={"steps": 16})).cost
    assert again.checkpoint == cached.checkpoint  # used twice, cached once
    assert again.flops < 2 * cached.flops == 2 * plain.flops < 2 * whole.flops
    assert plain.trained == cached.trained == whole.trained // 2
    assert cached.memory.activations < whole.memory.activations
    found = cost(layers=9)
    assert found.problems == ("layers: 9, but the model has 4; give at most 3, or leave it out to train all",)
    assert cost().facts[0].layers == UPPER

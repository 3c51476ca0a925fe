"""Mixture of Depths: skipping equals a masked reference, routers learn easy tokens, mismatched routers are refused."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from cogumi.core.errors import ArtifactError, BundleError, TrainingError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message, Reply, Request, Token
from cogumi.data.examples import SPLITS, example_id, split_path, write_examples
from cogumi.engine.protocol import final_reply, replies
from cogumi.engine.torch import TorchEngine
from cogumi.evaluate import depth_report
from cogumi.models.depth_routers import FILE, Routers, Span, install, new_cache, skipping, spans_of
from cogumi.models.folders import load
from cogumi.models.tokenization import HFTokenizer
from cogumi.train import depth
from cogumi.train.batches import collate, make_rows
from support import pico
from support.engines import pico as shared

SPANS = (((1,),), ((0, 1),), ((2, 3),), ((0,), (3,)), ((1,), (3,)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder()


@cache
def base_folder():
    return pico.make_model(Path(shared().base).parent / "depth-base", layers=4, seed=2)


@cache
def full_model():
    return load(base_folder()).eval()


@cache
def routed(spans, seed=0):
    """Routers with random weights, and an engine that uses them; at this threshold about half of the tokens skip.

    The threshold lies between two scores, because a token exactly at the threshold could skip or not by rounding.
    """
    width = full_model().config.hidden_size  # loading consumes random numbers
    torch.manual_seed(seed)
    routers = Routers(spans, width)
    with torch.no_grad():
        for weight in routers.parameters():
            weight.mul_(4)
    scores = []

    def look(first, hidden):
        scores.append(routers.easy(first, hidden))
        return torch.ones(hidden.shape[:2], dtype=torch.bool)

    with torch.no_grad(), skipping(full_model().model, look, spans):
        full_model().model(torch.arange(5, 505).view(10, 50), use_cache=False)
    ordered = torch.cat([score.flatten() for score in scores]).sort().values
    middle = len(ordered) // 2
    above = ordered[middle:][(ordered[middle:] > ordered[middle] + 1e-4)][0]
    routers.bar = float((ordered[middle] + above) / 2)
    return routers, TorchEngine(base_folder(), context=256, depth=routers.takes, spans=spans)


@torch.no_grad()
def masked(routers, ids):
    """Reference logits [n, V]: all layers compute all tokens; a skipping token is no key and keeps its state."""
    model, n = full_model(), len(ids)
    decoder = model.model
    hidden = decoder.embed_tokens(torch.tensor([ids]))
    rotation = decoder.rotary_emb(hidden, torch.arange(n)[None])
    causal, itself = torch.ones(n, n).tril().bool(), torch.eye(n).bool()
    inside = {layer: span[0] for span in routers.spans for layer in span}
    taken = {}
    for i, layer in enumerate(decoder.layers):
        if inside.get(i) == i:
            taken[i] = routers.takes(i, hidden)
        takes = taken[inside[i]] if i in inside else torch.ones(1, n).bool()
        mask = (causal & takes | itself)[None, None]
        out = layer(hidden, attention_mask=mask, position_embeddings=rotation, past_key_values=None)
        hidden = torch.where(takes[..., None], out, hidden)
    return model.lm_head(decoder.norm(hidden))[0], taken


prompts = st.lists(st.lists(st.integers(5, 511), min_size=1, max_size=30), min_size=1, max_size=6)


@given(prompts, st.sampled_from(SPANS), st.lists(st.integers(1, 12), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_skipping_equals_the_masked_reference_in_any_batch(rows, spans, lengths):
    """Prompts of several lengths in one batch, rows that leave it early, single streams: token by token."""
    routers, engine = routed(spans)
    asks = [Request(prompt=tuple(row), max_tokens=n) for row, n in zip(rows, lengths, strict=False)]
    for ask, reply in zip(asks, replies(engine, asks), strict=True):
        ids = [*ask.prompt, *(token.id for token in reply.tokens)]
        reference = masked(routers, ids)[0][len(ask.prompt) - 1 : -1].log_softmax(-1)
        chosen = reference[range(len(reply.tokens)), ids[len(ask.prompt) :]]
        assert [token.logprob for token in reply.tokens] == pytest.approx(chosen.tolist(), abs=1e-5, rel=1e-5)
        alone = final_reply(engine.generate(ask))
        assert [token.id for token in alone.tokens] == [token.id for token in reply.tokens]


@pytest.mark.parametrize("spans", SPANS)
def test_tokens_of_a_read_prompt_skip_too(spans):
    routers, engine = routed(spans)
    ids = tuple(range(5, 45))
    reference = masked(routers, ids)[0][:-1].log_softmax(-1)[range(39), ids[1:]]
    assert engine.read(Request(prompt=ids)).surprise == pytest.approx((-reference).tolist(), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("spans", SPANS)
def test_skipped_tokens_are_not_computed_and_not_cached(spans):
    """Layers and their caches receive only the tokens that take them, in the prompt and while decoding."""
    routers, model = routed(spans)[0], load(base_folder()).eval()
    ids = torch.randint(5, 511, (3, 20), generator=torch.Generator().manual_seed(1))
    inside = [layer for span in spans for layer in span]
    work = dict.fromkeys(inside, 0)
    for i in inside:

        def count(module, args, kwargs, out, i=i):
            work[i] += kwargs["hidden_states"].shape[1]

        model.model.layers[i].self_attn.register_forward_hook(count, with_kwargs=True)
    install(model.model, routers.takes, spans)
    some = 0
    for row in ids:
        cache, work_before = new_cache(model.model), dict(work)
        taken = masked(routers, row.tolist())[1]
        with torch.no_grad():
            model(row[None, :12], past_key_values=cache)
            for at in range(12, 20):
                model(row[None, at : at + 1], position_ids=torch.tensor([[at]]), past_key_values=cache)
        for span in spans:
            expected = int(taken[span[0]].sum())
            some += 20 - expected
            for i in span:
                assert cache.layers[i].columns == expected == work[i] - work_before[i]
    assert 0 < some < 3 * 20 * len(spans)


def test_skipping_rows_are_removed_from_a_batch():
    """Two of four rows take the layer in each step: it receives two rows, and the others get no key or value."""
    model, seen = load(base_folder()).eval(), []
    layer = model.model.layers[2]
    layer.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    takes = iter([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    install(model.model, lambda first, hidden: torch.tensor(next(takes)).bool()[:, None], ((2,),))
    cache = new_cache(model.model)
    with torch.no_grad():
        for at in range(4):
            model(torch.arange(5, 9)[:, None], position_ids=torch.full((4, 1), at), past_key_values=cache)
    assert seen == [(4, 1), (2, 1), (2, 1)]
    assert cache.layers[2].held.tolist() == [[True, True, False], [True, False, False], [True] * 3, [True, False, True]]
    assert cache.layers[2].keys[1, :, 1:].abs().sum() == 0


def test_model_is_restored_after_the_context_manager():
    model = full_model()
    before = list(model.model.layers)
    with skipping(model.model, routed(SPANS[0])[0].takes, SPANS[0]):
        assert isinstance(model.model.layers[1], Span)
    assert list(model.model.layers) == before


def test_nan_score_takes_the_layer():
    routers, _ = routed(SPANS[0])
    assert routers.takes(1, torch.full((1, 3, routers.width), math.nan)).all()


def test_adjacent_layers_form_a_span():
    assert spans_of((1, 2), 4) == spans_of((2, 1), 4) == ((1, 2),)
    assert spans_of((0, 3), 4) == ((0,), (3,))
    assert spans_of((5, 1, 2, 4), 9) == ((1, 2), (4, 5))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 4), "layer 4 does not exist: this model has layers 0 to 3"),
        ((-1,), "layer -1 does not exist"),
        ((0, 1, 2), "3 of 4 layers are to be skipped; name 1 to 2"),
        ((), "0 of 4 layers are to be skipped"),
    ],
)
def test_layers_that_cannot_skip_are_refused(layers, message):
    with pytest.raises(TrainingError, match=message):
        spans_of(layers, 4)


def saved(tmp_path, spans=((2, 3),)):
    routers = routed(spans)[0]
    routers.save(tmp_path / FILE, base_folder())
    return routers, tmp_path / FILE


def test_routers_round_trip_through_a_file(tmp_path, base):
    routers, path = saved(tmp_path)
    loaded = Routers.load(path, base)
    hidden = torch.randn(2, 5, routers.width)
    assert torch.equal(loaded.easy(2, hidden), routers.easy(2, hidden))
    assert (loaded.spans, loaded.bar) == (routers.spans, routers.bar)


def test_routers_of_another_model_are_refused(tmp_path):
    _, path = saved(tmp_path)
    for other in (shared().base, pico.make_model(tmp_path / "twin", layers=4, seed=3)):
        with pytest.raises(BundleError, match="another model"):
            Routers.load(path, other)


def rewritten(path, tensors=None, **changes):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["depth"]) | changes
    save_file(tensors or load_file(path), path, {"depth": json.dumps(about)})
    return path


def test_routers_with_wrong_shapes_are_refused(tmp_path, base):
    _, path = saved(tmp_path)
    with pytest.raises(BundleError, match="layer 7 does not exist"):
        Routers.load(rewritten(path, layers=[7]), base)
    with pytest.raises(BundleError, match="does not fit"):
        Routers.load(rewritten(path, layers=[1]), base)
    tensors = load_file(path)
    cut = {name: tensor[:, :32].contiguous() if tensor.shape[-1] == 64 else tensor for name, tensor in tensors.items()}
    with pytest.raises(BundleError, match="size mismatch"):
        Routers.load(rewritten(path, cut, layers=[2, 3]), base)
    spoiled = {name: tensor * math.nan for name, tensor in tensors.items()}
    with pytest.raises(BundleError, match="NaN or infinite"):
        Routers.load(rewritten(path, spoiled), base)
    with pytest.raises(BundleError, match="NaN or infinite"):
        Routers.load(rewritten(path, tensors, bar=math.nan), base)
    with pytest.raises(BundleError, match="holds no depth routers"):
        Routers.load(base / "model.safetensors", base)
    with pytest.raises(BundleError, match="holds no depth routers"):
        Routers.load(tmp_path / "nothing", base)


# The stage


def example(a, b):
    messages = (Message("user", f"What is {a} plus {b}?"),)
    check = {"check": {"kind": "numeric"}}
    return Example(example_id("math", messages), "math", 1, messages, f"It is {a + b}.", "", check)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("depth")
    rows = [example(a, b) for a in range(8) for b in range(8)]
    for k, name in enumerate(SPLITS):
        write_examples(split_path(root, name), rows if name == "train" else rows[k::8])
    return root


def context():
    return Context(3, 1, Path(), lambda done, total, figures: None)


def config(**changes):
    loop = {"steps": 30, "batch": 16, "lr": 0.01, "warmup": 2, "evaluate_every": 10}
    return depth.Config(**{"layers": (2, 3), "sure": 0.01, "loop": loop, **changes})


def artifact(path, **metrics):
    return Artifact("test", path, "0", {}, metrics)


@pytest.fixture(scope="module")
def trained(data, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("routers")
    metrics = depth.run(config(), {"examples": artifact(data), "model": artifact(base)}, out, context())
    return out, metrics


def test_routers_learn_tokens_that_are_easy_for_the_full_model(trained):
    _, metrics = trained
    losses = [figures["loss"] for _, figures in metrics["curve"]["selection"]]
    share = metrics["easy_tokens"]
    chance = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert metrics["loss"] == min(losses) < 0.8 * chance
    assert metrics["token_accuracy"] > max(share, 1 - share)
    assert metrics["spans"] == ((2, 3),)


def test_equal_inputs_give_equal_routers(trained, data, base, tmp_path):
    before = sha256(base / "model.safetensors")
    depth.run(config(), {"examples": artifact(data), "model": artifact(base)}, tmp_path, context())
    assert (tmp_path / FILE).read_bytes() == (trained[0] / FILE).read_bytes()
    assert sha256(base / "model.safetensors") == before


def test_full_model_is_the_teacher_and_the_base_is_frozen(base, data):
    """The loss is in nats per next token without padding; only the routers get gradients."""
    tokenizer = HFTokenizer.load(base)
    batch = collate(make_rows([example(1, 2), example(123456, 9)], tokenizer, 99), [0, 1])
    model = depth.RoutedModel(load(base), Routers(((1,), (3,)), 64))
    read, answer = depth.tokens_of(batch)
    for row, ids in enumerate(batch.ids):
        n = len(make_rows([[example(1, 2), example(123456, 9)][row]], tokenizer, 99)[0].ids)
        assert read[row].tolist() == [True] * (n - 1) + [False] * (len(ids) - n)
        own = cross_entropy(full_model()(ids[None, :n]).logits[0, :-1], ids[1:n], reduction="none")
        assert model.nats(batch.ids)[row, : n - 1].tolist() == pytest.approx(own.tolist(), abs=1e-4)
    assert (answer <= read).all()
    depth.router_loss(model, batch, 3.0)[0].backward()
    assert all(p.grad is None for p in model.lm.parameters())
    assert all(p.grad is not None for p in model.routers.parameters())


@pytest.mark.parametrize(("layers", "message"), [((9,), "layers 0 to 3"), ((0, 1, 2), "name 1 to 2")])
def test_stage_refuses_invalid_layers_with_a_reason(layers, message, data, base, tmp_path):
    with pytest.raises(TrainingError, match=message):
        depth.run(config(layers=layers), {"examples": artifact(data), "model": artifact(base)}, tmp_path, context())


def test_model_with_nan_weights_is_refused_as_teacher(data, tmp_path):
    broken = pico.make_model(tmp_path / "broken", layers=4)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="holds NaN"):
        depth.run(config(), {"examples": artifact(data), "model": artifact(broken)}, tmp_path, context())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.05, 1), st.floats(0, 20))
def test_chosen_threshold_and_all_above_it_meet_the_agreement(exact, share, points):
    tried = [{"bar": -k, "share": k / 20, "exact": value} for k, value in enumerate(exact)]
    chosen = depth.choose(tried, share, points)
    upto = tried[: tried.index(chosen) + 1]
    assert all(row["share"] <= share and row["exact"] >= exact[0] - points / 100 for row in upto)
    after = tried[len(upto) :]
    assert not after or after[0]["share"] > share or after[0]["exact"] < exact[0] - points / 100


# The report


def reply(*ids):
    return Reply("", tuple(Token(i, "", 0.0, 0.0, 0.0) for i in ids), "stop", None)


def test_agreement_compares_tokens_by_position():
    assert depth_report.agreement([reply(1, 2, 3)], [reply(1, 2, 3)]) == 1
    assert depth_report.agreement([reply(1, 2, 3), reply(7)], [reply(1, 9), reply(7)]) == 0.5


@pytest.mark.parametrize(("bar", "skipped"), [(math.inf, 0.0), (-math.inf, 1.0)])
def test_report_contains_skips_and_agreement(bar, skipped, trained, data, base, tmp_path):
    out, metrics = trained
    routers = Routers.load(out / FILE, base)
    routers.bar = bar
    routers.save(tmp_path / FILE, base)
    inputs = {"examples": artifact(data), "model": artifact(base), "depth": artifact(tmp_path, **metrics)}
    settings = depth_report.Config(prompts=2, curve_prompts=1, repeats=1, shares=(0.5,), max_tokens=5)
    figures = depth_report.run(settings, inputs, tmp_path, context())
    assert (figures["skipped"], figures["skipped_prompt"]) == (skipped, skipped)
    assert figures["token_layers_skipped"] == skipped / 2
    assert (figures["token_agreement"] == 1) == (skipped == 0)
    assert figures["points_lost_95"][0] <= figures["points_lost"] <= figures["points_lost_95"][1]
    assert f"| decoded tokens that skip these layers | {skipped:.1%} |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "depth.png").stat().st_size > 5000

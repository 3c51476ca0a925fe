"""Compression routes: which ones fit a budget, which one is chosen, and the error for an impossible budget."""

import math
import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.bundle.format import BASE, DRAFT
from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.planned_files import Adapter, known_weights
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.amounts import parse_bytes, parse_rate
from cogumi.core.errors import RecipeError
from cogumi.core.facts import FileSize
from cogumi.core.shapes import KNOWN
from cogumi.pipeline.plan.bundle_memory import Serving
from cogumi.pipeline.plan.recipe_plan import plan
from cogumi.pipeline.plan.refusal import alternative, refusal
from cogumi.pipeline.plan.routes import Budget, RouteSearch
from cogumi.pipeline.recipe import load_recipe, parse_recipe
from support.real import qwen2

BANDWIDTH = 18e9
RANKS = dict.fromkeys(KNOWN["Llama-3.2-1B"].linear, 30)
BASE_1B = known_weights(KNOWN["Llama-3.2-1B"])
DRAFT_1B = replace(
    known_weights(replace(KNOWN["Llama-3.2-1B"], hidden=256, layers=4, heads=4, feed_forward=768)), type="q8_0"
)
SMALL = {"README.md": FileSize(2000)}
WHOLE = Parts("1b", BASE_1B, DRAFT_1B, True, {"modifiers/code.gguf": Adapter(RANKS)}, small=SMALL)


def plan_for(parts=WHOLE, bandwidth=BANDWIDTH, **budget):
    return RouteSearch(parts, Serving(), Budget(**budget), bandwidth)


def measures(route):
    return route.parts.bytes, route.memory.total(repack=False), 1 / route.speed


@pytest.fixture(scope="module")
def all_routes():
    """All routes with their results: bytes on disk, bytes in memory without repacking, seconds per token."""
    free = plan_for()
    return [(change, measures(free.route(change))) for change in free.changes()]


def test_last_route_is_the_smallest_in_every_measure(all_routes):
    """So this route alone decides whether any route fits."""
    _, least = all_routes[-1]
    assert all(here <= there for _, found in all_routes for here, there in zip(least, found, strict=True))


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_chosen_route_is_the_first_that_fits(all_routes, data):
    _, (disk, ram, seconds) = data.draw(st.sampled_from(all_routes))
    given = plan_for(disk=disk, ram=ram, tokens_per_second=0.999 / seconds)
    found = given.fitting
    assert found is not None
    assert not found.missed
    assert found.parts.bytes <= disk
    assert found.ram <= ram
    for change, (d, r, s) in all_routes:
        route = (d <= disk, r <= ram, 0.999 / seconds * s <= 1)
        if all(route):
            assert change.describe(WHOLE) == found.changes
            break


def test_cheapest_change_is_made_first():
    def named(**budget):
        return plan_for(**budget).fitting.changes

    whole = WHOLE.bytes
    assert named(disk=whole) == ()
    assert named(disk=whole - 1) == ("vocabulary of 65,536 instead of 128,256 ids",)
    adapters = named(disk=whole - 250_000_000)
    assert [text.split()[0] for text in adapters] == ["vocabulary", "adapters"]
    types = named(disk=int(0.6 * whole))
    assert "instead of q4_k_m" in types[-1]
    assert not any("layers" in text for text in types)
    assert any("layers" in text for text in named(disk=int(0.3 * whole)))


def test_draft_with_the_same_vocabulary_is_trimmed_too():
    change = next(change for change in plan_for().changes() if change.vocabulary == 32_768)
    for shared in (True, False):
        made = change.apply(replace(WHOLE, shared=shared))
        assert made.base.shape.vocabulary == 32_768
        assert made.draft.shape.vocabulary == (32_768 if shared else 128_256)
        assert (made.models[DRAFT].bytes < WHOLE.models[DRAFT].bytes) is shared
        assert made.models[BASE].bytes < WHOLE.models[BASE].bytes


def test_weights_are_repacked_where_memory_allows_it():
    free = plan_for().route()
    assert free.repack
    assert free.memory.repacked > 0
    roomy, tight = free.memory.total(repack=True), free.memory.total(repack=False)
    for ram, repack in ((None, True), (roomy, True), (roomy - 1, False), (tight, False)):
        route = plan_for(ram=ram).route()
        assert (route.repack, route.missed) == (repack, ())
        assert route.ram == (roomy if repack else tight)
    assert "in memory" in plan_for(ram=tight - 1).route().missed[0]


def test_adapters_are_compressed_only_where_that_saves_bytes():
    small, large = Adapter(dict.fromkeys(RANKS, 4)), Adapter(dict.fromkeys(RANKS, 128))
    assert small.reduced(32, "q8_0") == small
    assert large.reduced(32, "q4_0") == Adapter(dict.fromkeys(RANKS, 32), "q4_0")


def test_impossible_budget_gets_the_arithmetic_and_an_alternative():
    eight = Parts("8b", known_weights(KNOWN["Llama-3.1-8B"]))
    tight = plan_for(eight, disk=540_000_000)
    assert tight.fitting is None
    line = refusal(tight)
    assert "540.0 MB on disk for 8.03e+09 weights are 0.54 bits each" in line
    assert "the smallest type has 1.56" in line
    assert re.search(r"what fits instead: Qwen2\.5-1\.5B, vocabulary of 32,768 .* q2_k", line)
    assert "\n" not in line
    by_speed = refusal(plan_for(eight, bandwidth=24e9, tokens_per_second=10, disk=10**9 * 3))
    assert "1.20 GB to read for each token, less 71.3 MB for everything but weights, for 8.03e+09 weights" in by_speed
    assert "are 1.12 bits each" in by_speed
    absurd = refusal(plan_for(eight, tokens_per_second=1e9))
    assert "9 bytes to read for each token leave no room for 8.03e+09 weights" in absurd
    assert "0.00" not in absurd
    assert alternative(plan_for(eight, disk=10_000)) is None
    assert "nothing of known shape fits either" in refusal(plan_for(eight, disk=10_000))


ONLY = Parts("1b", BASE_1B)


def test_refusal_names_cache_or_small_files_when_they_dominate():
    def refusal_of(serving, parts=ONLY, **budget):
        return refusal(RouteSearch(parts, serving, Budget(**budget), BANDWIDTH))

    long = refusal_of(Serving(10_000_000), ram=8 * 10**9)
    assert "1b: the cache of 10,000,000 tokens takes 174.08 GB, and there are 8.00 GB in memory; " in long
    assert "ask for less --context or --cache q4_0; even with" in long
    assert "bits" not in long
    many = refusal_of(Serving(100_000, 100, "q4_0"), ram=8 * 10**9)
    assert "100 times 100,000 tokens takes 92.16 GB" in many
    assert "ask for less --context or fewer --slots; even with" in many
    slow = refusal_of(Serving(2_000_000), tokens_per_second=1000)
    assert "half full, takes 17.41 GB, and there are 9.0 MB to read for each token" in slow
    nets = refusal_of(Serving(), replace(WHOLE, small={"embedder.onnx": FileSize(10**9)}), disk=10**9)
    assert re.search(r"the draft, adapters and small files take 1\.\d\d GB, and there are 1\.00 GB on disk; even", nets)


@pytest.mark.parametrize("layers", [1, 2, 3, 16])
def test_each_route_is_in_the_table_once(layers):
    shape = replace(KNOWN["Llama-3.2-1B"], layers=layers)
    table = plan_for(Parts("x", known_weights(shape))).table()
    routes = [(r.parts.base.shape.layers, r.parts.base.shape.vocabulary, r.parts.base.type) for r in table]
    assert len(set(routes)) == len(routes)
    assert routes[0] == (layers, 128_256, "q8_0")


# --- amounts ---


def test_valid_amounts_are_parsed_and_others_refused():
    assert parse_rate("50GB/s") == parse_rate("50gb/s") == 50 * 10**9
    assert parse_bytes("890mb") == 890 * 10**6
    assert parse_bytes("2gib") == 2 * 2**30
    for wrong in ("0MB", "0.1B", "-5MB", "much", "", "5 MB/s", "nanGB"):
        with pytest.raises(RecipeError):
            parse_bytes(wrong)
    for wrong in ("50GB", "50/s", "0GB/s", "GB/s"):
        with pytest.raises(RecipeError):
            parse_rate(wrong)
    for speed in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RecipeError, match="is not a valid speed"):
            Budget(tokens_per_second=speed)
    with pytest.raises(RecipeError, match="unknown cache type 'q9_0'; did you mean"):
        Serving(cache="q9_0")


# --- recipes ---


def parts_of(document, root):
    recipe = parse_recipe(yaml.safe_dump(document), "mine", root)
    found = plan(recipe)
    assert not [problem for problem in found.problems if "'bundle'" not in problem]  # the small networks are excluded
    return found.bundle


def test_bundle_plan_follows_the_steps_of_a_recipe(tmp_path):
    """Trimming, shrinking and adapter compression change the plan; the vocabulary of a model folder is counted."""
    folder = qwen2(tmp_path / "mine")
    steps = [
        {"name": "data", "stage": "world"},
        {"name": "base", "stage": "sft", "inputs": {"examples": "data"}, "config": {"init": "mine"}},
        {"name": "cut", "stage": "trim", "inputs": {"model": "base", "examples": "data"}, "config": {"size": 512}},
        {"name": "less", "stage": "shrink", "inputs": {"model": "cut", "examples": "data"}, "config": {"layers": 1}},
        {"name": "base_gguf", "stage": "gguf", "inputs": {"model": "less"}, "config": {"type": "q8_0"}},
    ]
    whole = parts_of(
        {"name": "mine", "steps": [*steps[:2], steps[4] | {"inputs": {"model": "base"}}, BUNDLE]}, tmp_path
    )
    export_model(folder, tmp_path / "model.gguf", "q8_0")
    assert whole.files[BASE] == (tmp_path / "model.gguf").stat().st_size
    small = parts_of({"name": "mine", "steps": [*steps, BUNDLE]}, tmp_path)
    assert (small.base.shape.layers, small.base.shape.vocabulary) == (1, 512)
    assert small.draft is None
    assert 0.4 < small.files[BASE] / whole.files[BASE] < 0.9


def test_adapter_is_planned_as_its_last_step_writes_it(tmp_path):
    qwen2(tmp_path / "mine")
    inputs = {"examples": "data", "model": "base"}
    steps = [
        {"name": "data", "stage": "world"},
        {"name": "base", "stage": "sft", "inputs": {"examples": "data"}, "config": {"init": "mine"}},
        {
            "name": "code",
            "stage": "modifier",
            "inputs": inputs | {"responses": "answers"},
            "config": {"domain": "code"},
        },
        {"name": "less", "stage": "compress_adapter", "inputs": inputs | {"adapter": "code"}, "config": {"rank": 32}},
        {"name": "base_gguf", "stage": "gguf", "inputs": {"model": "base"}},
        {"name": "code_gguf", "stage": "gguf", "inputs": {"model": "base", "adapter": "code"}},
        {
            "name": "less_gguf",
            "stage": "gguf",
            "inputs": {"model": "base", "adapter": "less"},
            "config": {"adapter_type": "q8_0"},
        },
        {"name": "answers", "stage": "respond", "inputs": inputs | {"model": "base_gguf"}},
    ]
    steps.insert(2, steps.pop())
    bundle = {"name": "bundle", "stage": "bundle"}
    for adapter, expected in (("code_gguf", (30, "f32")), ("less_gguf", (32, "q8_0"))):
        given = bundle | {"inputs": {"base": "base_gguf", "modifier_code": adapter}}
        (found,) = parts_of({"name": "mine", "steps": [*steps, given]}, tmp_path).adapters.values()
        assert (found.ranks["q_proj"], found.type) == expected


BUNDLE = {"name": "bundle", "stage": "bundle", "inputs": {"base": "base_gguf"}}


def test_laptop_recipe_fits_its_stated_size():
    """At Q5_K_M with half of the vocabulary, as in the recipe's comment."""
    parts = plan(load_recipe("laptop-890mb")).bundle
    megabytes = {name: round(bytes / 1e6) for name, bytes in parts.files.items() if bytes > 1e6}
    assert megabytes == {BASE: 802, DRAFT: 25, "modifiers/math.gguf": 24, "modifiers/code.gguf": 24}
    assert parts.bytes < 890e6

"""Which routes fit, which of them is named, and what an impossible ask is told."""

import json
import math
import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cogumi.bundle.format import BASE, DRAFT
from cogumi.cli import app
from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.planned_files import Adapter, known_weights
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.amounts import parse_bytes, parse_rate
from cogumi.core.errors import CogumiError, RecipeError
from cogumi.core.facts import FileSize
from cogumi.core.shapes import KNOWN
from cogumi.pipeline.plan.bundle_memory import Serving
from cogumi.pipeline.plan.recipe_plan import plan
from cogumi.pipeline.plan.refusal import instead, refusal
from cogumi.pipeline.plan.routes import Asked, Budget
from cogumi.pipeline.recipe import load_recipe, parse_recipe
from support.pico import make_model
from support.real import qwen2

BANDWIDTH = 18e9
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
RANKS = dict.fromkeys(KNOWN["Llama-3.2-1B"].linear, 30)
BASE_1B = known_weights(KNOWN["Llama-3.2-1B"])
DRAFT_1B = replace(
    known_weights(replace(KNOWN["Llama-3.2-1B"], hidden=256, layers=4, heads=4, feed_forward=768)), type="q8_0"
)
SMALL = {"README.md": FileSize(2000)}
WHOLE = Parts("1b", BASE_1B, DRAFT_1B, True, {"modifiers/code.gguf": Adapter(RANKS)}, small=SMALL)


def asked(parts=WHOLE, bandwidth=BANDWIDTH, **budget):
    return Asked(parts, Serving(), Budget(**budget), bandwidth)


def measures(route):
    return route.parts.bytes, route.memory.total(repack=False), 1 / route.ceiling


@pytest.fixture(scope="module")
def every():
    """All changes with what comes of them: bytes on disk, bytes in memory without repacking, seconds per token."""
    free = asked()
    return [(change, measures(free.route(change))) for change in free.changes()]


def test_the_last_change_is_the_smallest_in_every_respect(every):
    """So whether anything fits is told by it alone."""
    _, least = every[-1]
    assert all(here <= there for _, found in every for here, there in zip(least, found, strict=True))


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_the_route_named_is_the_first_that_fits(every, data):
    _, (disk, ram, seconds) = data.draw(st.sampled_from(every))
    given = asked(disk=disk, ram=ram, tokens_per_second=0.999 / seconds)
    found = given.fitting
    assert found is not None
    assert not found.missed
    assert found.parts.bytes <= disk
    assert found.ram <= ram
    for change, (d, r, s) in every:
        route = (d <= disk, r <= ram, 0.999 / seconds * s <= 1)
        if all(route):
            assert change.said(WHOLE) == found.changes
            break


def test_what_costs_least_is_changed_first():
    def named(**budget):
        return asked(**budget).fitting.changes

    whole = WHOLE.bytes
    assert named(disk=whole) == ()
    assert named(disk=whole - 1) == ("vocabulary of 65,536 instead of 128,256 ids",)
    adapters = named(disk=whole - 250_000_000)
    assert [text.split()[0] for text in adapters] == ["vocabulary", "adapters"]
    types = named(disk=int(0.6 * whole))
    assert "instead of q4_k_m" in types[-1]
    assert not any("layers" in text for text in types)
    assert any("layers" in text for text in named(disk=int(0.3 * whole)))


def test_a_trimmed_vocabulary_takes_the_draft_with_it_if_it_is_the_same():
    change = next(change for change in asked().changes() if change.vocabulary == 32_768)
    for shared in (True, False):
        made = change.made(replace(WHOLE, shared=shared))
        assert made.base.shape.vocabulary == 32_768
        assert made.draft.shape.vocabulary == (32_768 if shared else 128_256)
        assert (made.models[DRAFT].bytes < WHOLE.models[DRAFT].bytes) is shared
        assert made.models[BASE].bytes < WHOLE.models[BASE].bytes


def test_weights_are_repacked_where_the_memory_allows_it():
    free = asked().route()
    assert free.repack
    assert free.memory.repacked > 0
    roomy, tight = free.memory.total(repack=True), free.memory.total(repack=False)
    for ram, repack in ((None, True), (roomy, True), (roomy - 1, False), (tight, False)):
        route = asked(ram=ram).route()
        assert (route.repack, route.missed) == (repack, ())
        assert route.ram == (roomy if repack else tight)
    assert "in memory" in asked(ram=tight - 1).route().missed[0]


def test_adapters_are_made_smaller_only_where_that_makes_them_smaller():
    small, large = Adapter(dict.fromkeys(RANKS, 4)), Adapter(dict.fromkeys(RANKS, 128))
    assert small.reduced(32, "q8_0") == small
    assert large.reduced(32, "q4_0") == Adapter(dict.fromkeys(RANKS, 32), "q4_0")


def test_an_impossible_ask_is_told_the_arithmetic_and_what_fits_instead():
    eight = Parts("8b", known_weights(KNOWN["Llama-3.1-8B"]))
    tight = asked(eight, disk=540_000_000)
    assert tight.fitting is None
    line = refusal(tight)
    assert "540.0 MB on disk for 8.03e+09 weights are 0.54 bits each" in line
    assert "the smallest type there is has 1.56" in line
    assert re.search(r"what fits instead: Qwen2\.5-1\.5B, vocabulary of 32,768 .* q2_k", line)
    assert "\n" not in line
    by_speed = refusal(asked(eight, bandwidth=12e9, tokens_per_second=10, disk=10**9 * 3))
    assert "1.20 GB to read for each token, less 71.3 MB that is no weight, for 8.03e+09 weights" in by_speed
    assert "are 1.12 bits each" in by_speed
    absurd = refusal(asked(eight, tokens_per_second=1e9))
    assert "18 bytes to read for each token leave no room for 8.03e+09 weights" in absurd
    assert "0.00" not in absurd
    assert instead(asked(eight, disk=10_000)) is None
    assert "nothing of known shape fits either" in refusal(asked(eight, disk=10_000))


ONLY = Parts("1b", BASE_1B)


def test_what_is_no_weight_is_blamed_where_it_is_more_than_the_weights():
    def told(serving, parts=ONLY, **budget):
        return refusal(Asked(parts, serving, Budget(**budget), BANDWIDTH))

    long = told(Serving(10_000_000), ram=8 * 10**9)
    assert "1b: the cache of 10,000,000 tokens takes 174.08 GB, and there are 8.00 GB in memory; " in long
    assert "ask for less --context or --cache q4_0; even with" in long
    assert "bits" not in long
    many = told(Serving(100_000, 100, "q4_0"), ram=8 * 10**9)
    assert "100 times 100,000 tokens takes 92.16 GB" in many
    assert "ask for less --context or fewer --slots; even with" in many
    slow = told(Serving(2_000_000), tokens_per_second=1000)
    assert "half full, takes 17.41 GB, and there are 18.0 MB to read for each token" in slow
    nets = told(Serving(), replace(WHOLE, small={"embedder.onnx": FileSize(10**9)}), disk=10**9)
    assert re.search(r"the draft, adapters and small files take 1\.\d\d GB, and there are 1\.00 GB on disk; even", nets)


def test_no_longer_context_is_planned_than_the_base_was_made_for(tmp_path):
    folder = make_model(tmp_path / "mine")
    most = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    for asked_for, planned in ((most - 1, most - 1), (most, most), (10 * most, most)):
        words = (str(folder), "--context", str(asked_for))
        assert json.loads(cogumi(*words, "--json").stdout)["sizes"]["serving"]["context"] == planned
        assert ("the base was made for no more" in cogumi(*words).stdout) is (planned == most)


def test_a_speed_that_was_asked_for_is_said_to_be_compared_with_a_ceiling():
    speed = ("Llama-3.2-1B", "--bandwidth", "100GB/s", "--tokens-per-second")
    fits, misses = cogumi(*speed, "1").stdout, cogumi(*speed, "200").stdout
    assert "it fits as it is, its speed by the ceiling\n" in fits
    assert "it does not fit" in misses
    for shown in (fits, misses):
        assert "the runtime reaches about 0.4 to 0.65 of it" in shown
        assert "+ where it fits, its speed by the ceiling" in " ".join(shown.split())
    assert "it fits as it is\n" in cogumi("Llama-3.2-1B", "--disk", "9GB", "--bandwidth", "9GB/s").stdout
    tight = cogumi("Llama-3.2-1B", "--ram", "1.2GB", "--bandwidth", "9GB/s").stdout
    assert "in memory without repacking (open with --no-repack)" in tight


# --- amounts ---


def test_amounts_are_read_and_nonsense_is_not():
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
        with pytest.raises(RecipeError, match="is no speed"):
            Budget(tokens_per_second=speed)
    with pytest.raises(RecipeError, match="unknown cache type 'q9_0'; did you mean"):
        Serving(cache="q9_0")


# --- recipes ---


def parts_of(document, root):
    recipe = parse_recipe(yaml.safe_dump(document), "mine", root)
    found = plan(recipe)
    assert not [problem for problem in found.problems if "'bundle'" not in problem]  # the small nets are left out
    return found.bundle


def test_the_bundle_of_a_recipe_follows_its_steps(tmp_path):
    """Trimming, shrinking and smaller adapters change what is planned; a folder's own vocabulary is counted."""
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


def test_an_adapter_is_planned_as_the_last_step_leaves_it(tmp_path):
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
        {"name": "answers", "stage": "respond", "inputs": inputs},
    ]
    steps.insert(2, steps.pop())
    bundle = {"name": "bundle", "stage": "bundle"}
    for adapter, expected in (("code_gguf", (30, "f32")), ("less_gguf", (32, "q8_0"))):
        given = bundle | {"inputs": {"base": "base_gguf", "modifier_code": adapter}}
        (found,) = parts_of({"name": "mine", "steps": [*steps, given]}, tmp_path).adapters.values()
        assert (found.ranks["q_proj"], found.type) == expected


BUNDLE = {"name": "bundle", "stage": "bundle", "inputs": {"base": "base_gguf"}}


def test_models_beside_the_bundle_are_listed(tmp_path):
    sizes = json.loads(cogumi("compression", "--json").stdout)["files_beside"]
    assert {"small", "plain", "base_f32", "pruned_f32"} < set(sizes)
    assert sizes["small"] < sizes["base_f32"] / 4
    assert not {"base_gguf", "draft_gguf"} & set(sizes)
    assert "files beside the bundle" in cogumi("compression").stdout
    assert json.loads(cogumi("Llama-3.2-1B", "--json").stdout)["files_beside"] == {}


def test_types_that_a_step_finds_are_said_to_be_unknown(tmp_path):
    qwen2(tmp_path / "mine")
    base = {"name": "base", "stage": "sft", "inputs": {"examples": "data"}, "config": {"init": "mine"}}
    scaled = {"name": "scaled", "stage": "awq", "inputs": {"examples": "data", "model": "base"}}
    export = {"name": "small", "stage": "gguf", "inputs": {"model": "scaled", "types": "scaled"}}
    steps = [{"name": "data", "stage": "world"}, base, scaled, export]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "steps": steps}))
    shown = cogumi(str(path)).stdout
    assert "small: the types of step 'scaled' are known once it ran; planned as if none were given" in shown
    assert "files beside the bundle" in shown


def test_the_laptop_recipe_fits_into_its_name():
    """At Q5_K_M with half of the vocabulary, as its comment says."""
    parts = plan(load_recipe("laptop-890mb")).bundle
    megabytes = {name: round(bytes / 1e6) for name, bytes in parts.files.items() if bytes > 1e6}
    assert megabytes == {BASE: 802, DRAFT: 25, "modifiers/math.gguf": 24, "modifiers/code.gguf": 24}
    assert parts.bytes < 890e6


# --- the command ---


def cogumi(*words):
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"})


def test_the_command_answers_in_figures():
    """Beside the files of the finished tiny build."""
    done = cogumi("tiny", "--disk", "890MB", "--ram", "1.5GB", "--tokens-per-second", "30", "--json")
    assert done.exit_code == 0
    sizes = json.loads(done.stdout)["sizes"]
    assert sizes["asked"]["fits"]
    assert sizes["files"][BASE] == pytest.approx(1_079_232, rel=0.003)
    assert sizes["files"][DRAFT] == pytest.approx(370_432, rel=0.01)
    assert sizes["files"]["modifiers/code.gguf"] == 1_232_800
    assert sum(sizes["files"].values()) == pytest.approx(32_443_890, rel=0.001)
    assert sizes["bandwidth_bytes_per_second"] > 1e8
    assert sizes["refusal"] is None
    types = [route["type"] for route in sizes["routes"]][:7]
    assert types.index("q8_0") < types.index("q6_k")  # as large here: rows of 128 fill no K block
    assert {"bits_per_weight", "ram_bytes", "repack", "tokens_per_second_at_most"} <= set(sizes["routes"][0])
    memory = sizes["memory"]
    assert sum(memory.values()) == sizes["asked"]["ram_bytes"]


def test_a_model_alone_by_name_config_or_file(tmp_path):
    shown = cogumi("Llama-3.2-1B", "--disk", "700MB", "--bandwidth", "18GB/s")
    assert shown.exit_code == 0
    assert "smallest change that fits: vocabulary of 65,536 instead of 128,256 ids: 698.5 MB on disk" in shown.stdout
    check = cogumi("Llama-3.2-1B", "--disk", "700MB", "--check")
    assert check.exit_code == 1
    assert check.stderr == "Llama-3.2-1B does not fit: 807.7 MB on disk of 700.0 MB\n"
    folder = make_model(tmp_path / "mine")
    file = tmp_path / "mine.gguf"
    export_model(folder, file, "q4_k_m")
    for name in (folder, folder / "config.json"):
        found = json.loads(cogumi(str(name), "--json").stdout)["sizes"]
        assert found["files"] == {BASE: file.stat().st_size}


@pytest.mark.parametrize("layers", [1, 2, 3, 16])
def test_each_route_stands_in_the_table_once(layers):
    shape = replace(KNOWN["Llama-3.2-1B"], layers=layers)
    table = asked(Parts("x", known_weights(shape))).table()
    routes = [(r.parts.base.shape.layers, r.parts.base.shape.vocabulary, r.parts.base.type) for r in table]
    assert len(set(routes)) == len(routes)
    assert routes[0] == (layers, 128_256, "q8_0")


def test_types_that_a_step_left_beside_a_model_count(tmp_path):
    folder, types = make_model(tmp_path / "mine"), {"blk.0.*": "q8_0", "token_embd.weight": "f16"}
    (folder / "types.json").write_text(json.dumps(types))
    file = tmp_path / "mine.gguf"
    export_model(folder, file, "q4_k_m", types)
    found = json.loads(cogumi(str(folder), "--json").stdout)["sizes"]
    assert found["files"] == {BASE: file.stat().st_size}
    (folder / "types.json").write_text('{"blk.7.*": "q8_0"}')
    assert "types: 'blk.7.*' matches no matrix" in str(cogumi(str(folder)).exception)


def test_a_file_is_measured_beside_its_plan(tmp_path):
    file = tmp_path / "mine.gguf"
    export_model(make_model(tmp_path / "mine"), file, "q8_0")
    measured = json.loads(cogumi(str(file), "--json").stdout)["measured"]
    assert measured["bytes"] == measured["planned_bytes"] == file.stat().st_size
    assert 0 < measured["tokens_per_second"] < 1.5 * measured["tokens_per_second_at_most"]


def test_an_impossible_budget_is_one_line_and_exit_code_1():
    done = cogumi("Llama-3.1-8B", "--disk", "540MB", "--check")
    assert done.exit_code == 1
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert "0.54 bits each" in line
    told = cogumi("Llama-3.1-8B", "--disk", "540MB", "--json")
    assert told.exit_code == 1
    assert "0.54 bits each" in json.loads(told.stdout)["sizes"]["refusal"]


def test_what_cannot_be_planned_is_said_in_a_line(tmp_path):
    def refused(*words):
        error = cogumi(*words).exception
        assert isinstance(error, CogumiError), error
        assert "\n" not in str(error)
        return str(error)

    assert "write it like 80GB" in refused("tiny", "--disk", "lots")
    assert "less than one byte" in refused("tiny", "--ram", "0GB")
    assert "is no speed" in refused("tiny", "--tokens-per-second", "-3")
    assert "write it like 50GB/s" in refused("tiny", "--bandwidth", "fast")
    assert "did you mean 'Llama-3.2-1B'" in refused("Llama-3.2-1X")
    assert "did you mean 'laptop-890mb'" in refused("laptop-890")
    steps = [{"name": "data", "stage": "world"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "steps": steps}))
    assert "makes no bundle" in refused(str(tmp_path / "mine.yaml"), "--disk", "1GB")
    good = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    config = tmp_path / "config.json"
    damaged = {
        "supported: LlamaForCausalLM, Qwen2ForCausalLM": good | {"architectures": ["MambaForCausalLM"]},
        "lacks 'hidden_size'": {"architectures": ["LlamaForCausalLM"]},
        "layers is 0, not 1 to 1000": good | {"num_hidden_layers": 0},
        "layers is 1000000000, not": good | {"num_hidden_layers": 10**9},
        "vocabulary is -5, not": good | {"vocab_size": -5},
        "no numbers above 0": good | {"num_attention_heads": 0},
        "feed_forward is 'wide', not": good | {"intermediate_size": "wide"},
        "heads cannot share 4": good | {"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8},
        "rope_scaling is 'x', not an object": good | {"rope_scaling": "x"},
        "rope_parameters is [1], not an object": good | {"rope_parameters": [1]},
        "a rope or norm value is not a number": good | {"rms_norm_eps": "small"},
        "is not a number; copy": good | {"rope_scaling": LLAMA3 | {"factor": None}},
        "is a 5; supported": good | {"architectures": 3, "model_type": 5},
        "hidden_act is 'gelu'": good | {"hidden_act": "gelu"},
    }
    for said, document in damaged.items():
        config.write_text(json.dumps(document))
        assert said in refused(str(config)), said
    config.write_text("{")
    assert "cannot be read" in refused(str(tmp_path))
    config.write_text(json.dumps(good))
    assert cogumi(str(tmp_path)).exit_code == 0
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert "not a complete GGUF model" in refused(str(tmp_path / "some.gguf"))
    assert refused(str(tmp_path / "nosuch.gguf")).startswith("there is no file")
    assert "'lots' is not an amount of bytes" in refused("tiny", "--disk", "lots")

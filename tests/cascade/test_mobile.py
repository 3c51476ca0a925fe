"""The mobile package: one model is base and draft; and models without a second copy of their weights."""

import json
from dataclasses import replace

import pytest

from cogumi.bundle.format import BASE, CARD, DRAFT, INDEX, open_bundle, write_bundle
from cogumi.cascade.modes import MODES, Mode, Settings
from cogumi.cascade.opening import open_cascade
from cogumi.compress.gguf.type_mixture import stored_tensors
from cogumi.compress.pack import bundle as pack
from cogumi.core.errors import BundleError, RequestError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Message, Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.evaluate.bench import bundle_sizes
from cogumi.evaluate.bench.child_process import CascadeJob, run_cascade
from cogumi.evaluate.bench.synthetic_models import SHAPES
from support.bundle import make_bundle


def ask(text="What is 2 + 3?", **values):
    return Request(messages=(Message("user", text),), **{"max_tokens": 10, **values})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def mobile(whole, tmp_path_factory):
    """The same bundle without its draft: heads and router of a pico draft fit a pico base."""
    index = json.loads((whole / INDEX).read_text())
    files = {name: whole / name for name in index["files"] if name != DRAFT}
    parts = {name: part for name, part in index["parts"].items() if name != DRAFT}
    folder = tmp_path_factory.mktemp("mobile") / "bundle"
    write_bundle(folder, files, {"parts": parts, "mode": "mobile"})
    return folder


@pytest.fixture(scope="module")
def cascade(mobile):
    opened = open_cascade(mobile, slots=2, context=128, threads=1)
    yield opened
    opened.close()


def test_one_model_reads_and_answers(mobile, cascade):
    assert open_bundle(mobile).draft is None
    assert cascade.tiers.draft is cascade.tiers.base
    reply = final_reply(cascade.generate(ask()))
    alone = final_reply(cascade.resolve("cogumi:base", ask())[0].generate(ask(speculate=False)))
    modified = final_reply(cascade.tiers.base.generate(ask(speculate=False, adapter="code")))
    assert reply.text.startswith((alone.text, modified.text))
    assert 0 < reply.p_correct < 1
    assert not any("draft" in f"{decision.tier} {decision.reason}" for decision in reply.decisions)


def test_default_mode_is_that_of_the_bundle_unless_configured(mobile, whole, cascade, tmp_path):
    def default(folder, settings=None):
        opened = open_cascade(folder, slots=1, context=128, threads=1, settings=settings)
        opened.close()
        return opened.services.settings.default

    assert cascade.services.settings.default == "mobile"
    assert default(mobile, Settings(modes={"careful": Mode(votes=5)})) == "mobile"
    assert default(mobile, Settings(default="fast")) == "fast"
    assert default(whole) == "balanced"
    index = json.loads((whole / INDEX).read_text())
    write_bundle(tmp_path / "odd", {n: whole / n for n in index["files"]}, {"parts": index["parts"], "mode": "odd"})
    with pytest.raises(BundleError, match="default mode 'odd' is unknown"):
        default(tmp_path / "odd")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_generates_with_the_model_once(cascade, mode, monkeypatch):
    asked, original = [], cascade.tiers.base.generate
    monkeypatch.setattr(cascade.tiers.base, "generate", lambda r: asked.append(r.adapter) or original(r))
    reply = final_reply(cascade.generate(ask(mode=mode, progressive=True)))
    greedy = asked[: 1 + MODES[mode].modifier]
    assert greedy == [None, "code"][: len(greedy)]
    assert reply.tier.split("+")[0] in ("base", "modifier:code")
    assert len(asked) == len(greedy) or MODES[mode].deliberates


def test_request_for_a_draft_is_refused(cascade):
    assert "cogumi:draft" not in cascade.models
    with pytest.raises(RequestError, match="unknown model 'cogumi:draft': choose one of cogumi"):
        cascade.resolve("cogumi:draft", ask())


def test_novel_question_goes_to_the_modifier_without_a_second_read(cascade, monkeypatch):
    question = replace(cascade.calibration.question, base_perplexity=0.0)
    calibration = replace(cascade.calibration, question=question)
    monkeypatch.setattr(cascade, "services", replace(cascade.services, calibration=calibration))
    read, original = [], cascade.tiers.base.read
    monkeypatch.setattr(cascade.tiers.base, "read", lambda r: read.append(r) or original(r))
    reply = final_reply(cascade.generate(ask(mode="mobile")))
    assert next(d.tier for d in reply.decisions if d.signal == "p_correct") == "modifier:code"
    assert reply.tier == "modifier:code"
    assert len(read) == 1


def test_heads_of_another_model_are_refused(mobile, tmp_path):
    from safetensors.numpy import load_file, save_file

    files = {name: mobile / name for name in json.loads((mobile / INDEX).read_text())["files"]}
    head = load_file(mobile / "difficulty.safetensors")
    narrow = tmp_path / "difficulty.safetensors"
    save_file(head | {"weight": head["weight"][:32].copy()}, narrow)
    files["difficulty.safetensors"] = narrow
    parts = json.loads((mobile / INDEX).read_text())["parts"]
    write_bundle(tmp_path / "bundle", files, {"parts": parts})
    with pytest.raises(BundleError, match="build the bundle again"):
        open_cascade(tmp_path / "bundle", slots=1, context=128, threads=1)


def test_bundle_stage_makes_a_mobile_package_without_a_draft(mobile, tmp_path):
    def artifact(name, file, **metrics):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name_of[file]).write_bytes((mobile / file).read_bytes())
        return Artifact("x", folder, "f" * 64, {}, metrics)

    name_of = {BASE: "model.gguf", "modifiers/math.gguf": "adapter.gguf"}
    name_of |= {name: name for name in ("difficulty.safetensors", "router.safetensors", "calibration.json")}
    belongs = {"base_fingerprint": "a", "tokenizer_sha256": "b"}
    inputs = {
        "base": artifact("base", BASE, **belongs),
        "modifier_math": artifact("math", "modifiers/math.gguf", **belongs),
        "difficulty": artifact("difficulty", "difficulty.safetensors"),
        "router": artifact("router", "router.safetensors"),
        "calibration": artifact("calibration", "calibration.json"),
    }
    out = tmp_path / "out"
    out.mkdir()
    told = pack.run(pack.Config(), inputs, out, Context(0, 1, tmp_path, lambda done, total, figures: None))
    assert set(told["bytes"]) == {CARD, *name_of}
    assert open_bundle(out).draft is None


def test_answer_without_repacking_is_equivalent(whole):
    texts = []
    for repack in (True, False):
        engine = LlamaEngine(whole / BASE, slots=1, context=128, threads=1, lookup=False, repack=repack)
        reply = final_reply(engine.generate(ask()))
        engine.close()
        texts.append([token.id for token in reply.tokens])
    agreed = sum(a == b for a, b in zip(*texts, strict=True))
    assert agreed >= 8


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A complete synthetic bundle and a mobile package of a small shape."""
    small = replace(SHAPES["pico"], tied=True)
    folder = tmp_path_factory.mktemp("made-up")
    return [bundle_sizes.make_bundle(folder, small, "q4_k_m", draft) for draft in (small, None)]


@pytest.mark.parametrize("which", [0, 1], ids=["whole", "mobile"])
def test_synthetic_bundle_runs_every_tier(synthetic, which):
    folder = synthetic[which]
    seen = run_cascade(CascadeJob(str(folder), 1, "x" * 32, 8, 128, False))
    assert seen.tier in ("base", "modifier:code")
    assert seen.tokens == 16  # eight by the base, eight by the modifier, whose answers are never accepted
    assert 0 < seen.anonymous_bytes < seen.resident_bytes <= seen.peak_bytes
    opened = open_bundle(folder)
    assert set(opened.modifiers) == set(bundle_sizes.DOMAINS)
    assert (opened.draft is None) == bool(which)
    index = (folder / INDEX).stat().st_mtime_ns
    small = replace(SHAPES["pico"], tied=True)
    assert bundle_sizes.make_bundle(folder.parent, small, "q4_k_m", None if which else small) == folder
    assert (folder / INDEX).stat().st_mtime_ns == index


def test_widest_shape_is_the_largest_that_fits():
    limit = bundle_sizes.WHOLE.base
    found = bundle_sizes.widest("q4_k_m", limit)
    assert found.feed_forward == 6400
    taken = [
        sum(t.nbytes for t in stored_tensors(replace(found, feed_forward=found.feed_forward + more), "q4_k_m"))
        for more in (0, 256)
    ]
    assert taken[0] <= limit < taken[1]
    with pytest.raises(RequestError, match="no 1B shape of type q4_k_m fits in 1000 bytes"):
        bundle_sizes.widest("q4_k_m", 1000)


def test_cascade_holds_its_draft_in_memory_once(whole):
    cascade = open_cascade(whole, slots=1, context=128, threads=1)
    cascade.close()
    assert cascade.tiers.base._draft is cascade.tiers.draft._model

"""A person's GGUF file as base of a build: linked where it lies, trained on its own weights, shipped byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from cogumi.bundle.format import BASE, open_bundle
from cogumi.bundle.unpack import BundleFiles
from cogumi.compress.gguf import convert, export, gguf_file
from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.planned_files import Weights, weights_of_gguf
from cogumi.compress.pack import archive
from cogumi.compress.pack import bundle as pack
from cogumi.core.artifact import load
from cogumi.core.errors import BundleError, ExportError, RecipeError
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.types import Artifact
from cogumi.pipeline.build import build
from cogumi.pipeline.fingerprint import plan
from cogumi.pipeline.plan import recipe_plan
from cogumi.pipeline.recipe import parse_recipe
from support.gguf import edit
from support.gguf_rewrite import rewritten
from support.pico import make_adapter, make_model
from support.train import context

STEPS = [
    {"name": "mine", "stage": "gguf_file", "config": {"model": "some.gguf"}},
    {"name": "weights", "stage": "convert", "inputs": {"gguf": "mine"}},
    {"name": "smaller", "stage": "gguf", "inputs": {"model": "weights"}, "config": {"type": "q4_0"}},
]


def recipe(root, **config):
    steps = [STEPS[0] | {"config": {"model": "some.gguf"} | config}, *STEPS[1:]]
    return parse_recipe(yaml.safe_dump({"name": "own", "steps": steps}), "own", root)


@pytest.fixture
def file(tmp_path) -> Path:
    about = {"general.name": "Mine", "general.license": "mit", "general.languages": ["de", "en"]}
    edit(make_model(tmp_path / "model") / "config.json", gguf_metadata=about)
    export_model(tmp_path / "model", tmp_path / "some.gguf", "q4_1")
    return tmp_path / "some.gguf"


def fingerprints(root, **config):
    return [step.fingerprint for step in plan(recipe(root, **config))]


def steps_run(root, **config):
    """The steps that a build really runs."""
    ran = []

    class Progress:
        def finished(self, step, seconds, skipped, metrics):
            ran.extend([] if skipped else [step])

        def __getattr__(self, name):
            return lambda *_: None

    build(recipe(root, **config), root / "runs", jobs=1, progress=Progress())
    return ran


def test_a_moved_file_is_the_same_base_and_a_changed_one_is_not(tmp_path, file):
    before = fingerprints(tmp_path)
    moved = tmp_path / "elsewhere" / "other.gguf"
    moved.parent.mkdir()
    shutil.move(file, moved)
    with pytest.raises(RecipeError, match=r"step 'mine': there is no model 'some.gguf'"):
        fingerprints(tmp_path)
    assert fingerprints(tmp_path, model="elsewhere/other.gguf") == before
    export_model(make_model(tmp_path / "other", seed=1), moved, "q4_1")
    assert not set(fingerprints(tmp_path, model="elsewhere/other.gguf")) & set(before)


def test_build_links_the_file_and_repairs_the_link(tmp_path, file):
    assert steps_run(tmp_path) == ["mine", "weights", "smaller"]
    folder = tmp_path / "runs" / "own"
    link = folder / "mine" / "model.gguf"
    assert link.is_symlink()
    assert link.resolve() == file
    metrics = {name: load(folder / name).metrics for name in ("mine", "weights", "smaller")}
    assert {m["base_fingerprint"] for m in metrics.values()} == {sha256(file)}
    assert len({m["tokenizer_sha256"] for m in metrics.values()}) == 1
    assert (metrics["mine"]["type"], metrics["mine"]["architecture"]) == ("q4_1", "llama")
    assert metrics["mine"]["parameters"] == metrics["weights"]["parameters"]
    assert steps_run(tmp_path) == []
    file.rename(tmp_path / "moved.gguf")
    assert steps_run(tmp_path, model="moved.gguf") == ["mine"]
    assert link.resolve() == tmp_path / "moved.gguf"


def test_the_file_can_be_copied(tmp_path, file):
    steps_run(tmp_path, copy_file=True)
    copied = tmp_path / "runs" / "own" / "mine" / "model.gguf"
    assert not copied.is_symlink()
    assert sha256(copied) == sha256(file)


def test_plan_knows_shape_and_sizes_from_the_header(tmp_path, file):
    found = recipe_plan.plan(recipe(tmp_path))
    assert not found.problems
    weights = found.known(Weights)["mine"]
    assert weights.file.bytes == file.stat().st_size
    assert found.known(ModelFacts)["weights"].shape.hidden == 64
    assert next(step for step in found.steps if step.name == "weights").cost.output == 4 * weights.shape.parameters
    file.write_bytes(file.read_bytes()[:-100_000])
    assert "is not a complete GGUF model" in recipe_plan.plan(recipe(tmp_path)).problems[0]
    with pytest.raises(RecipeError, match=r"step 'mine': .* is not a complete GGUF model"):
        plan(recipe(tmp_path))


def test_sizes_of_a_mixture_without_a_name_are_known(tmp_path, file):
    nameless = rewritten(file, tmp_path / "nameless.gguf", drop=["general.file_type"])
    assert weights_of_gguf(nameless).file.bytes == pytest.approx(nameless.stat().st_size, abs=64)
    other = rewritten(file, tmp_path / "other.gguf", general__file_type=15)  # says q4_k_m, and is not
    assert weights_of_gguf(other).file.bytes == pytest.approx(other.stat().st_size, abs=64)


def test_plan_and_build_agree_about_a_model_that_cannot_be_trained(tmp_path, file):
    rewritten(file, tmp_path / "other.gguf", llama__expert_count=4)
    problem = "step 'weights': .*other.gguf cannot be trained: llama.expert_count is 4; llama.cpp may still serve it"
    found = recipe_plan.plan(recipe(tmp_path, model="other.gguf"))
    assert re.fullmatch(problem, found.problems[0])
    with pytest.raises(ExportError, match=problem):
        steps_run(tmp_path, model="other.gguf")


def stage_run(stage, out, inputs=None, **config):
    out.mkdir()
    metrics = stage.run(stage.Config(**config), inputs or {}, out, context())
    return Artifact(stage.KIND, out, out.name * 3, {}, metrics)


@pytest.fixture
def parts(tmp_path, file):
    """The inputs of stage `bundle`: the file itself, and a modifier that was trained on its dequantized weights."""
    base = stage_run(gguf_file, tmp_path / "base", model=str(file))
    weights = stage_run(convert, tmp_path / "weights", {"gguf": base})
    adapter = Artifact("adapter", make_adapter(tmp_path / "adapter", weights.path), "a")
    modifier = stage_run(export, tmp_path / "modifier", {"adapter": adapter, "model": weights})
    found = {"base": base, "modifier_math": modifier}
    for role, name in (("difficulty", "difficulty.safetensors"), ("router", "router.safetensors")):
        (tmp_path / role).mkdir()
        (tmp_path / role / name).write_bytes(role.encode())
        found[role] = Artifact("x", tmp_path / role, role)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "calibration.json").write_text("{}")
    return found | {"calibration": Artifact("calibration", tmp_path / "calibration", "c")}


def test_bundle_refers_to_the_file_where_it_lies(tmp_path, file, parts):
    out = stage_run(pack, tmp_path / "bundle", parts).path
    bundle = open_bundle(out)
    assert bundle.base_fingerprint == sha256(file) == sha256(bundle.base)
    assert (out / BASE).is_symlink()
    index = json.loads((out / "bundle.json").read_text())
    assert index["base_path"] == str(file)
    assert "Base model: name: Mine; licence: mit; languages: de, en." in (out / "README.md").read_text()
    assert index["files"][BASE] == {"bytes": file.stat().st_size, "sha256": sha256(file)}
    assert open_bundle(Path(shutil.copytree(out, tmp_path / "links", symlinks=True))).base.resolve() == file
    alone = Path(shutil.copytree(out, tmp_path / "alone"))
    file.unlink()
    assert sha256(open_bundle(alone).base) == bundle.base_fingerprint
    with pytest.raises(BundleError, match="it is not there any more; put it back, or build the bundle again") as caught:
        open_bundle(out)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bundle_of_a_changed_file_is_refused(tmp_path, file, parts):
    out = stage_run(pack, tmp_path / "bundle", parts).path
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    for changed in (bytes(content), bytes(content[:-1])):
        file.write_bytes(changed)
        with pytest.raises(BundleError, match=r"some\.gguf, which has changed since; put it back, or build"):
            open_bundle(out)


def test_bundle_can_hold_a_copy(tmp_path, file, parts):
    out = stage_run(pack, tmp_path / "bundle", parts, copy_base=True).path
    assert not (out / BASE).is_symlink()
    assert "base_path" not in json.loads((out / "bundle.json").read_text())
    file.unlink()
    assert open_bundle(out).base_fingerprint == sha256(out / BASE)


@pytest.mark.parametrize("name", ["router.safetensors", "base.gguf"])
def test_any_other_link_out_of_the_folder_is_refused(tmp_path, parts, name):
    out = stage_run(pack, tmp_path / "bundle", parts).path
    shutil.copy(out / name, tmp_path / "outside")
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "outside")  # the same bytes, and still not the listed path
    with pytest.raises(BundleError, match=f"the path '{name}' leaves the folder"):
        open_bundle(out)


def test_packing_makes_the_bundle_stand_alone(tmp_path, file, parts, monkeypatch):
    out = stage_run(pack, tmp_path / "bundle", parts).path
    (tmp_path / "packed").mkdir()
    archive.pack_folder(out, tmp_path / "packed", archive.Config(level=1))
    expected = sha256(file)
    file.unlink()
    archive.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked" / BASE).is_symlink()
    assert sha256(open_bundle(tmp_path / "unpacked").base) == expected
    assert "base_path" not in json.loads((tmp_path / "unpacked" / "bundle.json").read_text())
    monkeypatch.setenv("COGUMI_CACHE", str(tmp_path / "cache"))
    assert sha256(BundleFiles(tmp_path / "packed").bundle.base) == expected


def test_a_modifier_of_another_file_is_refused(tmp_path, parts):
    export_model(make_model(tmp_path / "other", seed=5), tmp_path / "other.gguf", "q4_1")
    other = stage_run(gguf_file, tmp_path / "another", model=str(tmp_path / "other.gguf"))
    with pytest.raises(BundleError, match="the modifier 'math' was trained on another base"):
        stage_run(pack, tmp_path / "bundle", parts | {"base": other})


def test_a_folder_is_no_file(tmp_path, file):
    with pytest.raises(ExportError, match=r"is a folder, not a \.gguf file"):
        gguf_file.open_model("model", tmp_path)


def test_weights_larger_than_memory_are_refused_before_the_work(tmp_path, file, monkeypatch):
    base = stage_run(gguf_file, tmp_path / "base", model=str(file))
    monkeypatch.setattr(convert, "total_memory", lambda: 100_000)
    with pytest.raises(ExportError, match=r"this machine has 100\.0 KB of memory; serve it without training"):
        stage_run(convert, tmp_path / "weights", {"gguf": base})
    assert not list((tmp_path / "weights").iterdir())

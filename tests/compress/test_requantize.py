"""A GGUF file in another type, and the stage that makes it the base of a bundle."""

import shutil
from collections import namedtuple

import numpy as np
import pytest

from cogumi.compress.gguf import gguf_file, requantize
from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.gguf_header import read_header
from cogumi.compress.gguf.planned_files import Weights
from cogumi.core.errors import CogumiError, ExportError
from cogumi.core.estimate import Given
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.engine.llama.binding.model import Model
from cogumi.pipeline.fingerprint import plan
from cogumi.pipeline.recipe import parse_recipe
from support.gguf import llama_logits, some_ids
from support.gguf_rewrite import rewritten
from support.pico import make_model

FULL = 10**15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("files")
    export_model(make_model(found / "model"), found / "q4_1.gguf", "q4_1")
    export_model(found / "model", found / "f32.gguf", "f32")
    export_model(make_model(found / "wide", hidden=256, layers=1), found / "wide.gguf", "q8_0")  # fills blocks of 256
    return found


def other(folder, source, type, threads=1):
    out = folder / f"{source}-{type}-{threads}.gguf"
    requantize.requantize(read_header(folder / f"{source}.gguf"), out, type, threads)
    return out


@pytest.mark.parametrize("type", ["q8_0", "q5_0", "q4_k_m", "q4_0"])
def test_types_bytes_and_keys_are_as_planned(folder, type):
    before = read_header(folder / "q4_1.gguf")
    types = requantize.requantized_types(before, type)
    after = read_header(other(folder, "q4_1", type))
    assert {name: tensor.tensor_type.name.lower() for name, tensor in after.tensors.items()} == types
    assert after.path.stat().st_size == requantize.requantized_bytes(before, types)
    assert (after.type, after.shape) == (type, before.shape)
    technical = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.keys.items() if k not in technical} == {
        k: v for k, v in before.keys.items() if k not in technical
    }
    assert Model(after.path).tokenizer.encode("What is 48 plus 57?") == Model(before.path).tokenizer.encode(
        "What is 48 plus 57?"
    )


def test_more_bits_lose_less(folder):
    """f32 -> q8_0 -> f32 changes little, f32 -> q4_0 more; the exporter makes the same file from the folder."""
    ids = some_ids(40)
    exact = llama_logits(folder / "f32.gguf", ids)
    lost = [np.abs(llama_logits(other(folder, "f32", type), ids) - exact).mean() for type in ("q8_0", "q5_0", "q4_0")]
    assert 0 < lost[0] < lost[1] < lost[2]
    export_model(folder / "model", folder / "exported.gguf", "q4_0")
    ours, theirs = read_header(other(folder, "f32", "q4_0")), read_header(folder / "exported.gguf")
    assert {n: t.tensor_type for n, t in ours.tensors.items()} == {n: t.tensor_type for n, t in theirs.tensors.items()}
    assert all(np.array_equal(ours.tensors[name].data, theirs.tensors[name].data) for name in ours.tensors)


def test_tensors_of_that_type_are_copied_and_threads_change_no_byte(folder):
    before, after = read_header(folder / "q4_1.gguf"), read_header(other(folder, "q4_1", "q4_1"))
    assert all(np.array_equal(before.tensors[name].data, after.tensors[name].data) for name in before.tensors)
    assert sha256(other(folder, "q4_1", "q5_1", 1)) == sha256(other(folder, "q4_1", "q5_1", 3))


def test_widths_that_fill_no_block_are_said(folder):
    header = read_header(folder / "q4_1.gguf")
    notes = {}
    for type in ("q4_k_m", "q4_0"):
        matrices = requantize.matrix_types(header, requantize.requantized_types(header, type))
        notes[type] = requantize.replaced_note(type, matrices)
    assert notes["q4_0"] == ""
    assert notes["q4_k_m"].startswith("q4_k_m: the rows of 15 of 15 matrices do not fill blocks of 256 values")
    assert "5_0" in notes["q4_k_m"]
    wide = read_header(folder / "wide.gguf")
    assert (
        requantize.replaced_note("q4_k_m", requantize.matrix_types(wide, requantize.requantized_types(wide, "q4_k_m")))
        == ""
    )


def test_what_cannot_be_requantized_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    header, out = read_header(folder / "q4_1.gguf"), tmp_path / "out.gguf"
    strange = read_header(
        rewritten(folder / "q4_1.gguf", tmp_path / "strange.gguf", **{"general.architecture": "strange"})
    )
    for source, type, message in (
        (header, "q4", "unknown type 'q4'"),
        (read_header(folder / "wide.gguf"), "iq2_xs", "needs an importance matrix"),
        (strange, "q4_0", "llama.cpp could not quantize .*strange.gguf to q4_0 .*architecture"),
    ):
        with pytest.raises(ExportError, match=message) as caught:
            requantize.requantize(source, out, type, 1)
        assert "\n" not in str(caught.value)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(FULL, FULL - 10, 10))
    with pytest.raises(ExportError, match=r"as q4_0 takes .* KB, .* has 10 bytes free"):
        requantize.requantize(header, out, "q4_0", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"strange.gguf"}


def staged(folder, out, **config):
    out.mkdir()
    config = gguf_file.Config(model="q4_1.gguf", **config)
    context = Context(3, 1, folder, lambda done, total, figures: None)
    return gguf_file.run(config, {}, out, context), gguf_file.estimate(config, Given("base", folder)), config


def test_the_stage_makes_a_base_of_another_type(folder, tmp_path):
    metrics, estimate, config = staged(folder, tmp_path / "base", type="q4_0")
    path = tmp_path / "base" / "model.gguf"
    assert not path.is_symlink()
    assert (metrics["type"], metrics["base_fingerprint"]) == ("q4_0", sha256(path))
    assert metrics["requantized_from"] == {"type": "q4_1", "sha256": sha256(folder / "q4_1.gguf")}
    (weights,) = (fact for fact in estimate.facts if isinstance(fact, Weights))
    assert weights.file.bytes == metrics["bytes"] == path.stat().st_size
    assert gguf_file.identity(config, folder) == {
        "sha256": sha256(folder / "q4_1.gguf"),
        "copy_file": False,
        "type": "q4_0",
    }


def test_without_a_type_the_file_stays_byte_for_byte(folder, tmp_path):
    metrics, _, config = staged(folder, tmp_path / "base")
    assert (tmp_path / "base" / "model.gguf").is_symlink()
    assert metrics["base_fingerprint"] == sha256(folder / "q4_1.gguf")
    assert "requantized_from" not in metrics
    assert gguf_file.identity(config, folder).keys() == {"sha256", "copy_file"}


def test_a_recipe_with_an_unknown_or_impossible_type_is_refused(folder):
    def recipe(type):
        step = f"{{name: base, stage: gguf_file, config: {{model: wide.gguf, type: {type}}}}}"
        return parse_recipe(f"name: mine\nsteps:\n  - {step}\n", "mine.yaml", folder)

    with pytest.raises(CogumiError, match="unknown type 'q4'"):
        plan(recipe("q4"))
    with pytest.raises(CogumiError, match="type iq2_xs needs an importance matrix"):
        plan(recipe("iq2_xs"))

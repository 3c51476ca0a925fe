"""GGUF files that cannot be used, or not be trained: one clear line before any work."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.compress.gguf import convert, gguf_file, gguf_header
from cogumi.compress.gguf.convert import convert_model
from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.compress.gguf.gguf_header import read_header
from cogumi.core import model_files
from cogumi.core.errors import BundleError, ExportError, RecipeError
from cogumi.core.types import Artifact
from cogumi.pipeline.fingerprint import plan
from cogumi.pipeline.recipe import parse_recipe
from support.gguf import edit, llama
from support.gguf_kinds import embedding_model, split
from support.gguf_rewrite import rewritten
from support.pico import make_adapter, make_model
from support.train import context


@functools.cache
def whole(folder: Path) -> bytes:
    export_model(make_model(folder / "model"), folder / "some.gguf", "q4_1")
    return (folder / "some.gguf").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("files")
    whole(found)
    return found


def refused(path: Path, match: str, use=read_header) -> None:
    with pytest.raises(ExportError, match=match) as caught:
        use(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def end_of_data(path: Path) -> int:
    return max(int(t.data_offset + t.n_bytes) for t in GGUFReader(path).tensors)


def test_a_file_cut_at_any_byte_is_refused(folder):
    content, end, cut = whole(folder), end_of_data(folder / "some.gguf"), folder / "cut.gguf"
    header = min(int(t.data_offset) for t in GGUFReader(folder / "some.gguf").tensors)
    points = {
        *range(64),
        *range(64, header, 211),
        *range(header - 40, header + 40),
        *range(header, end, 5003),
        end - 1,
    }

    def check(length):
        cut.write_bytes(content[:length])
        refused(cut, "is not a complete GGUF model")

    for point in points:
        check(point)
    settings(max_examples=60, deadline=None)(given(st.integers(0, end - 1))(check))()
    cut.write_bytes(content[:end])
    assert read_header(cut).parameters


def test_damaged_headers_are_refused_or_read(folder):
    """Flipped bits of the header may only give an `ExportError`, never another error."""
    content, draw, path = whole(folder), random.Random(3), folder / "flipped.gguf"
    header = min(int(t.data_offset) for t in GGUFReader(folder / "some.gguf").tensors)
    problems = []
    for _ in range(120):
        changed = bytearray(content)
        changed[draw.choice((draw.randrange(400), draw.randrange(header)))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert read_header(path).shape
        except ExportError as error:
            problems.append(str(error))
    assert len(problems) > 10
    assert not [line for line in problems if "\n" in line]


UNUSABLE = {
    "mmproj": ({"general__architecture": "clip"}, "image encoder of a vision model; give the file of its language"),
    "mmproj type": ({"general__type": "mmproj"}, "image encoder of a vision model"),
    "no tokenizer": ({"drop": ["tokenizer.ggml.tokens"]}, "has no tokenizer"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_files_that_are_no_text_model(folder, tmp_path, name):
    changes, message = UNUSABLE[name]
    refused(rewritten(folder / "some.gguf", tmp_path / "one.gguf", **changes), message)


def test_an_embedding_model_is_no_base(tmp_path):
    refused(embedding_model(tmp_path / "bert.gguf"), r"is an embedding model \(bert\): it writes no answers")


def test_an_adapter_is_no_model(folder, tmp_path):
    export_adapter(make_adapter(tmp_path / "a", folder / "model"), folder / "model", tmp_path / "adapter.gguf")
    refused(tmp_path / "adapter.gguf", "is an adapter, not a model; give its base")


def test_a_part_of_a_split_model_names_the_parts(folder, tmp_path):
    parts = split(folder / "some.gguf", tmp_path / "big.gguf", 3)
    for part in parts:
        refused(
            part, r"one of 3 parts \(big-00001-of-00003\.gguf to big-00003-of-00003\.gguf\); join them first: .*--m"
        )
    parts[1].unlink()
    refused(parts[0], r"is one of 3 parts, and big-00002-of-00003\.gguf is missing")
    renamed = rewritten(folder / "some.gguf", tmp_path / "part.gguf", split__count=3)
    refused(renamed, "is one of 3 parts")


UNTRAINABLE = {
    "architecture": ({"general__architecture": "gemma"}, "it is a gemma; supported: llama, qwen2"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count is 8"),
    "stretched positions": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    "partly rotated": ({"llama__rope__dimension_count": 16}, "llama.rope.dimension_count is 16"),
    "further tensor": ({"tensors": ["blk.0.attn_sinks.weight"]}, "it also has a tensor blk.0.attn_sinks.weight"),
    "lacking tensor": ({"without": ["blk.1.ffn_up.weight"]}, "it has no tensor blk.1.ffn_up.weight"),
    "tokenizer": ({"tokenizer__ggml__model": "llama"}, "its tokenizer is llama; supported is BPE over bytes"),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "tekken"}, "its pre-tokenizer is tekken; supported: gpt-2, smollm"),
    "no end token": ({"drop": ["tokenizer.ggml.eos_token_id"]}, "it names no end token"),
}


def to_folder(path):
    convert_model(path, path.parent / "out", None, lambda done, total: None)


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_a_model_that_cannot_be_trained_is_still_a_base(folder, tmp_path, name):
    changes, message = UNTRAINABLE[name]
    path = rewritten(folder / "some.gguf", tmp_path / "one.gguf", **changes)
    refused(path, f"cannot be trained: {message}.*; llama.cpp may still serve it", to_folder)
    assert not (tmp_path / "out").exists()
    (tmp_path / "base").mkdir()
    metrics = gguf_file.run(gguf_file.Config(model=str(path)), {}, tmp_path / "base", context())
    assert metrics["parameters"] > 10_000
    (tmp_path / "weights").mkdir()
    base = Artifact("gguf", tmp_path / "base", "f", {}, metrics)
    refused(
        path,
        "cannot be trained",
        lambda _: convert.run(convert.Config(), {"gguf": base}, tmp_path / "weights", context()),
    )
    assert not list((tmp_path / "weights").iterdir())


def test_an_unreadable_type_is_said(folder, monkeypatch):
    def unknown(data, type):
        raise NotImplementedError

    monkeypatch.setattr(gguf_header, "dequantize", unknown)
    refused(folder / "some.gguf", r"its type \w+ cannot be read", lambda p: read_header(p).shape)


def test_a_full_disk_is_noticed_before_the_work(folder, tmp_path, monkeypatch):
    class Disk:
        free = 1000

    monkeypatch.setattr("cogumi.compress.gguf.gguf_weights.shutil.disk_usage", lambda path: Disk)
    with pytest.raises(ExportError, match=r"take \d+\.\d KB as fp32, .* has 1\.0 KB free"):
        convert_model(folder / "some.gguf", tmp_path / "out", None, lambda done, total: None)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    packaged = model_files.PackagedModel("llm-nowhere", "llm_nowhere", "some.gguf", "nowhere")
    monkeypatch.setitem(model_files.PACKAGED, "some", packaged)
    text = "name: own\nsteps: [{name: mine, stage: gguf_file, config: {model: some}}]"
    with pytest.raises(
        RecipeError, match=r"'mine': .*package llm-nowhere, which is not installed: pip install 'cogumi\[nowhere\]'"
    ):
        plan(parse_recipe(text, "own", tmp_path))


def test_a_folder_of_pickles_is_refused(tmp_path):
    make_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"has its weights in pytorch_model\.bin only; save the model as safetensors"):
        convert_model(tmp_path / "model", tmp_path / "out.gguf", None, lambda done, total: None)
    assert not (tmp_path / "out.gguf").exists()


def test_existing_output_and_wrong_names_are_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    (tmp_path / "out.gguf").write_text("keep")
    for model, out, type, error, match in (
        ("some.gguf", "out", None, BundleError, "already exists"),
        ("model", "out.gguf", None, ExportError, "already exists"),
        ("model", "elsewhere", None, ExportError, r"give a path that ends in \.gguf"),
        ("some.gguf", "elsewhere.gguf", None, ExportError, "is a GGUF file and becomes a folder"),
        ("some.gguf", "elsewhere", "q8_0", ExportError, "is a GGUF file and becomes a folder"),
        ("model", "elsewhere.gguf", "q9", ExportError, "unknown type 'q9'"),
    ):
        with pytest.raises(error, match=match):
            convert_model(folder / model, tmp_path / out, type, lambda done, total: None)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.gguf"}


def test_convert_there_and_back(folder, tmp_path):
    seen = []
    first = convert_model(folder / "some.gguf", tmp_path / "a" / "folder", None, lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == 4 * first["parameters"]
    second = convert_model(tmp_path / "a" / "folder", tmp_path / "b" / "back.gguf", "q4_1", lambda *at: None)
    assert second["parameters"] == first["parameters"]
    assert (tmp_path / "b" / "back.gguf").stat().st_size == second["bytes"] == len(whole(folder))
    assert llama(tmp_path / "b" / "back.gguf", vocab_only=True).n_vocab() == 512


def test_the_chat_template_may_be_missing(folder, tmp_path):
    path = rewritten(folder / "some.gguf", tmp_path / "one.gguf", drop=["tokenizer.chat_template"])
    to_folder(path)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    edit(tmp_path / "out" / "config.json", note="still a folder")
    convert_model(tmp_path / "out", tmp_path / "again.gguf", None, lambda done, total: None)
    assert "tokenizer.chat_template" not in read_header(tmp_path / "again.gguf").keys

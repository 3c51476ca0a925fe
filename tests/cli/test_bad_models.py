"""Models that cannot be used: `inspect`, `adopt` and `chat` say so in one line, before any work."""

import os
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.cascade.bare_model import bare_model
from cogumi.cascade.opening import open_cascade
from cogumi.cli.inspection import describe
from cogumi.cli.options import chosen_bundle
from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.core import model_files
from cogumi.core.environment import total_memory
from cogumi.core.errors import BundleError, CogumiError
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.pipeline.adoption_checks import usable_model
from cogumi.pipeline.plan.command import Options, answer_to
from support.gguf_kinds import embedding_model, split
from support.gguf_rewrite import rewritten
from support.pico import make_adapter, make_model

COMMANDS = {"inspect": describe, "adopt": usable_model, "chat": lambda name: open_cascade(name, slots=1, threads=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("models")
    export_model(make_model(found / "model"), found / "some.gguf")
    return found


def refused(command, path, match=None):
    """The one line with which a command refuses a model."""
    with pytest.raises(CogumiError, match=match) as caught:
        COMMANDS[command](str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_cut_at_any_byte_is_refused(folder, tmp_path, command):
    content, cut = (folder / "some.gguf").read_bytes(), tmp_path / "cut.gguf"
    tensors = GGUFReader(folder / "some.gguf").tensors
    start, end = (pick(int(t.data_offset + n * t.n_bytes) for t in tensors) for pick, n in ((min, 0), (max, 1)))

    @settings(max_examples=30, deadline=None)
    @given(st.one_of(st.integers(0, 64), st.integers(0, start), st.integers(start, end - 1)))
    def check(length):
        cut.write_bytes(content[:length])
        refused(command, cut)

    check()
    refused(command, folder / "nowhere.gguf")
    cut.write_bytes(b"GGML" + content[4:])
    refused(command, cut, "is not a complete GGUF model")


@pytest.mark.parametrize("command", COMMANDS)
def test_other_kinds_of_files_are_named(folder, tmp_path, command):
    source = folder / "some.gguf"
    adapter = make_adapter(tmp_path / "lora", folder / "model")
    export_adapter(adapter, folder / "model", tmp_path / "adapter.gguf")
    for path, match in (
        (tmp_path / "adapter.gguf", "is an adapter, not a model; give its base"),
        (rewritten(source, tmp_path / "vision.gguf", general__architecture="clip"), "image encoder of a vision model"),
        (rewritten(source, tmp_path / "mute.gguf", drop=["tokenizer.ggml.tokens"]), "has no tokenizer"),
        (embedding_model(tmp_path / "bert.gguf"), r"is an embedding model \(bert\): it writes no answers"),
    ):
        refused(command, path, match)


def test_a_split_model_runs_from_its_first_part_and_is_not_adopted(folder, tmp_path):
    first, second, third = split(folder / "some.gguf", tmp_path / "big.gguf", 3)
    with open_cascade(first, slots=1, threads=1) as bot:
        assert bot.ask("Hello?", max_tokens=3).tokens
    for command in ("inspect", "chat"):
        refused(command, second, "is part 2 of 3: name the first, big-00001-of-00003.gguf")
    for part in (first, second):
        refused("adopt", part, r"one of 3 parts .*join them first: llama-gguf-split --merge big-00001-of-00003\.gguf")
    third.unlink()
    for command in COMMANDS:
        refused(command, first, r"one of 3 parts, and big-00003-of-00003\.gguf is missing: put all of them into one")


def test_a_model_without_chat_template_is_not_adopted(folder, tmp_path):
    path = rewritten(folder / "some.gguf", tmp_path / "base.gguf", drop=["tokenizer.chat_template"])
    refused("adopt", path, "has no chat template, so it cannot be asked questions")


@pytest.mark.parametrize("command", COMMANDS)
def test_folders(folder, tmp_path, command):
    files = tmp_path / "files"
    files.mkdir()
    shutil.copyfile(folder / "some.gguf", files / "a.gguf")
    refused(command, files, "is a folder of GGUF files: name one of them, such as .*a.gguf")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "model", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(command, pickled, r"has its weights in pytorch_model\.bin only; save the model as safetensors")


def test_a_model_folder_needs_its_tokenizer_to_chat_and_a_file_to_be_adopted(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder / "model", bare)
    refused("adopt", bare, "is a folder, not a .gguf file; make one of it: cogumi convert")
    (bare / "tokenizer.json").unlink()
    refused("chat", bare, "has no tokenizer.json; give a full model folder")


def test_the_folder_of_a_build_names_its_bundle(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    refused("chat", tmp_path, "is the folder of a build; name its bundle: .*bundle")


def test_models_larger_than_memory_are_refused_before_they_are_read(folder, tmp_path):
    huge, needed = tmp_path / "huge.gguf", 4 * total_memory()
    shutil.copyfile(folder / "some.gguf", huge)
    os.truncate(huge, needed)  # a sparse file
    refused("adopt", huge, r"takes \d+\.\d\d GB, this machine has .* of memory; take a smaller model")
    refused("chat", huge, "of memory; take a smaller model or type, or --no-repack")
    planned = answer_to(str(huge), Options(), pytest.fail)
    assert planned.measured is None
    assert planned.remarks()[-1].startswith("not measured: it takes ")
    weights = tmp_path / "weights"
    shutil.copytree(folder / "model", weights)
    head = b'{"huge": {"dtype": "F32", "shape": [1], "data_offsets": [0, %d]}}' % needed
    (weights / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    refused("chat", weights, "of memory as fp32 weights; name a GGUF file")
    with pytest.raises(
        BundleError, match=r"with 2 requests of \d+ tokens takes .* of memory; take fewer, or shorter ones"
    ):
        LlamaEngine(folder / "some.gguf", slots=2, context=total_memory() // 100)


def test_a_name_that_is_a_model_and_a_recipe(folder, tmp_path, monkeypatch, capsys):
    """`inspect`, `chat`, `serve` and `eval` take the model; `inspect` says how to get the recipe."""
    monkeypatch.chdir(tmp_path)
    packaged = model_files.PackagedModel("llm-some", "llm_some", "some.gguf", "some")
    monkeypatch.setitem(model_files.PACKAGED, "smollm2", packaged)
    for command in COMMANDS:
        with pytest.raises(
            CogumiError, match=r"in the package llm-some, which is not installed: pip install 'cogumi\[some"
        ):
            COMMANDS[command]("smollm2")
    monkeypatch.setattr(model_files, "_packaged", lambda name, model: folder / "some.gguf")
    found = describe("smollm2")
    assert found["what"] == "model"
    assert (
        found["note"]
        == "a recipe has this name too: cogumi plan smollm2; the bundle that it builds: runs/smollm2/bundle"
    )
    assert chosen_bundle(Path("smollm2")) == Path("smollm2")
    assert capsys.readouterr().err == ""
    Path("runs/smollm2/bundle").mkdir(parents=True)
    chosen_bundle(Path("smollm2"))
    assert "smollm2 is the model alone; the bundle built from it is runs/smollm2/bundle" in capsys.readouterr().err
    assert describe("tiny")["what"] == "recipe"
    Path("smollm2").mkdir()  # a folder of that name does not hide the model, but a bundle does
    assert bare_model("smollm2") == folder / "some.gguf"
    Path("smollm2/bundle.json").write_text("{}")
    assert bare_model("smollm2") is None

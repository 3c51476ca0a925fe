"""`bundle.format` and stage `bundle`: every file of a bundle is checked for presence, content and a matching base."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from cogumi.bundle.format import open_bundle, write_bundle
from cogumi.compress.pack import bundle as pack
from cogumi.core import files as core_files
from cogumi.core.artifact import finish, read_manifest
from cogumi.core.errors import BundleError, ExportError, RecipeError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.pipeline.executor import Inputs

BASE, OTHER, WORDS = "b" * 64, "c" * 64, "d" * 64
PARTS = {
    "base.gguf": {"base_fingerprint": BASE, "tokenizer_sha256": WORDS},
    "draft.gguf": {"base_fingerprint": OTHER, "tokenizer_sha256": WORDS},
    "modifiers/math.gguf": {"base_fingerprint": BASE, "tokenizer_sha256": WORDS},
}
FILES = {
    **{name: f"GGUF {name}".encode() for name in PARTS},
    "difficulty.safetensors": b"d",
    "router.safetensors": b"r",
    "calibration.json": b'{"threshold": 0.8}',
    "README.md": b"# A card\n",
}


def sources(folder, files=FILES):
    paths = {}
    for i, (name, content) in enumerate(files.items()):
        paths[name] = folder / f"source-{i}"
        paths[name].write_bytes(content)
    return paths


@pytest.fixture
def folder(tmp_path):
    write_bundle(tmp_path / "out", sources(tmp_path), {"parts": PARTS, "title": "Small", "figures": {"ece": 0.02}})
    return tmp_path / "out"


def edit(folder, change):
    """Change bundle.json; it has no checksum of its own, so only semantic checks can reject the change."""
    index = json.loads((folder / "bundle.json").read_text())
    change(index)
    (folder / "bundle.json").write_text(json.dumps(index))


def refuse(folder, match):
    with pytest.raises(BundleError, match=match) as caught:
        open_bundle(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_written_bundle_opens_and_can_be_moved(folder):
    bundle = open_bundle(folder)
    assert bundle.base.read_bytes() == FILES["base.gguf"]
    assert bundle.draft == folder / "draft.gguf"
    assert bundle.modifiers == {"math": folder / "modifiers/math.gguf"}
    assert (bundle.difficulty.name, bundle.router.name) == ("difficulty.safetensors", "router.safetensors")
    assert bundle.calibration == {"threshold": 0.8}
    assert bundle.description == {"title": "Small", "figures": {"ece": 0.02}}
    moved = folder.with_name("elsewhere")
    shutil.move(folder, moved)
    assert open_bundle(moved).base == moved / "base.gguf"


def test_any_flipped_byte_is_refused(folder):
    random_source = random.Random(1)
    for name in FILES:
        path = folder / name
        content = bytearray(path.read_bytes())
        content[random_source.randrange(len(content))] ^= 1 << random_source.randrange(8)
        good = path.read_bytes()
        path.write_bytes(content)
        refuse(folder, f"{name} has changed")
        path.write_bytes(good)
    open_bundle(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing_truncated_or_unlisted_file_is_refused(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    refuse(folder, f"{name} has {len(content) - 1} bytes instead of {len(content)}")
    (folder / name).unlink()
    refuse(folder, f"{name} is missing")
    (folder / name).write_bytes(content)
    edit(folder, lambda index: index["files"].pop(name))
    refuse(folder, name)


def test_unlisted_extra_file_is_refused(folder):
    (folder / "modifiers/law.gguf").write_bytes(b"GGUF")
    refuse(folder, r"modifiers/law\.gguf is in the folder but not in bundle\.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "modifiers/../../secret.gguf"])
def test_path_outside_the_folder_is_refused(folder, name):
    (folder.parent / "secret").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    edit(folder, lambda index: index["files"].update({name: entry}))
    refuse(folder, "leaves the folder")


def test_symlink_outside_the_folder_is_refused(folder):
    (folder / "base.gguf").unlink()
    (folder.parent / "base.gguf").write_bytes(FILES["base.gguf"])
    (folder / "base.gguf").symlink_to(folder.parent / "base.gguf")
    refuse(folder, r"'base\.gguf' leaves the folder")


@pytest.mark.parametrize(
    ("prompts", "system", "systems"),
    [
        (("Be\nbrief.",), "Be\nbrief.", ["Be brief."]),
        (("",), "", [""]),
        (("Be brief.", ""), "", ["", "Be brief."]),
    ],
)
def test_the_bundle_keeps_the_system_prompts_of_its_calibration(tmp_path, prompts, system, systems):
    """The only one stands before requests that have none."""
    given = Inputs({**inputs(tmp_path), "examples": examples(tmp_path, *prompts)})
    out = tmp_path / "out"
    out.mkdir()
    pack.run(pack.Config(), given, out, CONTEXT)
    found = open_bundle(out).description
    assert (found["system"], found["systems"]) == (system, systems)


def test_file_that_is_not_part_of_the_format_is_refused(folder):
    (folder / "weights.pkl").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    edit(folder, lambda index: index["files"].update({"weights.pkl": entry}))
    refuse(folder, r"'weights\.pkl' is not a file of the bundle format")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_version_is_refused(folder, version):
    edit(folder, lambda index: index.update(format=version))
    refuse(folder, "has bundle format .*upgrade")


def test_modifier_of_another_base_is_refused(folder):
    edit(folder, lambda index: index["parts"]["modifiers/math.gguf"].update(base_fingerprint=OTHER))
    refuse(folder, "the modifier 'math' was trained on another base")


def test_only_the_draft_may_have_another_tokenizer(folder):
    """A draft with another tokenizer is connected by the token bridge."""
    edit(folder, lambda index: index["parts"]["draft.gguf"].update(tokenizer_sha256=OTHER))
    open_bundle(folder)
    edit(folder, lambda index: index["parts"]["modifiers/math.gguf"].update(tokenizer_sha256=OTHER))
    refuse(folder, "the tokenizer of modifiers/math.gguf .* differs")


def test_gguf_file_missing_from_parts_is_refused(folder):
    edit(folder, lambda index: index["parts"].pop("draft.gguf"))
    refuse(folder, r"must list exactly the GGUF files.*draft\.gguf")


@pytest.mark.parametrize("text", ["", "{", "3", '{"format": 1}', '{"format": 1, "parts": 3}', "[" * 100_000])
def test_invalid_or_missing_index_is_refused(folder, text):
    (folder / "bundle.json").write_text(text)
    refuse(folder, "again|upgrade")
    (folder / "bundle.json").unlink()
    refuse(folder, "is not a bundle")
    refuse(folder / "base.gguf", "is not a bundle")


def test_writing_a_modifier_of_another_base_is_refused(tmp_path):
    foreign = {**PARTS, "modifiers/math.gguf": {"base_fingerprint": OTHER, "tokenizer_sha256": WORDS}}
    with pytest.raises(BundleError, match="another base"):
        write_bundle(tmp_path / "out", sources(tmp_path), {"parts": foreign})
    assert not (tmp_path / "out/bundle.json").exists()


def test_opening_hashes_each_file_once(tmp_path, monkeypatch):
    write_bundle(tmp_path / "out", sources(tmp_path), {"parts": PARTS})
    read = []
    monkeypatch.setattr(core_files, "sha256", lambda path: read.append(path.name) or sha256(path))
    open_bundle(tmp_path / "out")
    assert sorted(read) == sorted(Path(name).name for name in FILES)


# Stage `bundle`


def inputs(folder, *, adapter_base=BASE):
    def artifact(role, name, **metrics):
        (folder / role).mkdir()
        content = b'{"threshold": 0.5}' if name.endswith(".json") else f"{role} {name}".encode()
        (folder / role / name).write_bytes(content)
        return finish(folder / role, kind="x", fingerprint=role * 9, parents={}, metrics=metrics, environment={})

    def gguf(role, name, base):
        return artifact(role, name, base_fingerprint=base, tokenizer_sha256=WORDS, bytes=1234)

    return Inputs(
        base=gguf("base", "model.gguf", BASE),
        draft=gguf("draft", "model.gguf", OTHER),
        modifier_math=gguf("modifier_math", "adapter.gguf", adapter_base),
        difficulty=artifact("difficulty", "difficulty.safetensors"),
        router=artifact("router", "router.safetensors", accuracy=0.987654),
        calibration=artifact("calibration", "calibration.json", gate={"ece": 0.03}),
    )


def examples(folder, *prompts):
    """An artifact of examples whose sets hold one question under each of these system prompts."""
    (folder / "examples").mkdir()
    for split in SPLITS:
        rows = [((Message("system", prompt),) * bool(prompt), prompt) for prompt in prompts]
        asked = [Example(name, "math", 0, (*system, Message("user", "2+2?")), "4") for system, name in rows]
        write_examples(split_path(folder / "examples", split), asked)
    return finish(folder / "examples", kind="examples", fingerprint="e", parents={}, metrics={}, environment={})


CONTEXT = Context(3, 1, Path(), lambda done, total, figures: None)


def test_stage_packs_a_bundle_that_opens(tmp_path):
    given = inputs(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    metrics = pack.run(pack.Config(title="Small"), given, out, CONTEXT)
    finish(out, kind="bundle", fingerprint="f", parents={}, metrics=metrics, environment={})
    bundle = open_bundle(out)  # manifest.json in the same folder is allowed
    assert bundle.modifiers["math"].read_bytes() == b"modifier_math adapter.gguf"
    assert bundle.calibration == {"threshold": 0.5}
    assert bundle.description["provenance"]["base"] == "base" * 9
    assert bundle.description["measured"]["calibration"] == {"gate": {"ece": 0.03}}
    assert metrics["bytes"]["base.gguf"] == len(b"base model.gguf")
    assert set(metrics["bytes"]) == set(read_manifest(out).files) - {"bundle.json"}
    assert metrics["total_bytes"] == sum(metrics["bytes"].values())
    card = (out / "README.md").read_text()
    assert card.startswith("# Small\n")
    assert "answers math questions" in card
    assert "accuracy 0.9877" in card


def test_stage_writes_equal_bytes(tmp_path):
    given = inputs(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pack.run(pack.Config(), given, tmp_path / name, CONTEXT)
    assert (tmp_path / "one/bundle.json").read_bytes() == (tmp_path / "two/bundle.json").read_bytes()


def test_stage_refuses_a_modifier_of_another_base(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="the modifier 'math' was trained on another base"):
        pack.run(pack.Config(), inputs(tmp_path, adapter_base=OTHER), tmp_path / "out", CONTEXT)


def test_stage_names_bad_inputs(tmp_path):
    given = inputs(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RecipeError, match="needs an input 'router'"):
        pack.run(pack.Config(), Inputs({k: v for k, v in given.items() if k != "router"}), out, CONTEXT)
    with pytest.raises(ExportError, match=r"input 'router' .* holds no router\.safetensors"):
        pack.run(pack.Config(), Inputs({**given, "router": given["difficulty"]}), out, CONTEXT)
    without_metrics = Artifact("x", given["base"].path, "f")
    with pytest.raises(ExportError, match="input 'base' has no metric 'base_fingerprint'"):
        pack.run(pack.Config(), Inputs({**given, "base": without_metrics}), out, CONTEXT)

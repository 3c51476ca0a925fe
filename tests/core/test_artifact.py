"""`core.artifact`: the manifest of an artifact, and incomplete or changed artifacts that are rejected."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.artifact import finish, load, read_manifest, verify
from cogumi.core.errors import ArtifactError
from cogumi.core.files import sha256, write_json, write_text


def make(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return finish(
        folder,
        kind="toy",
        fingerprint="f" * 64,
        parents={"data": "a" * 64},
        metrics={"loss": np.float32(0.5), "curve": np.arange(3), "nan": float("nan"), "path": Path("a/b")},
        environment={"threads": 2},
        seconds=1.25,
    )


def test_manifest_contains_files_parents_metrics_and_environment(tmp_path):
    done = make(tmp_path, {"a.bin": b"abc", "deep/er/b.bin": b""})
    assert load(tmp_path) == verify(tmp_path) == done
    assert done.kind == "toy"
    assert done.parents == {"data": "a" * 64}
    assert done.metrics == {"loss": 0.5, "curve": [0, 1, 2], "nan": None, "path": "a/b"}
    manifest = read_manifest(tmp_path)
    assert manifest.seconds == 1.25
    assert {name: entry.bytes for name, entry in manifest.files.items()} == {"a.bin": 3, "deep/er/b.bin": 0}
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, "abc"
    assert manifest.files["a.bin"].sha256 == sha256(tmp_path / "a.bin") == known


def test_equal_content_gives_equal_manifests(tmp_path):
    make(tmp_path / "x", {"a": b"1", "b": b"2"})
    make(tmp_path / "y", {"b": b"2", "a": b"1"})
    assert (tmp_path / "x/manifest.json").read_bytes() == (tmp_path / "y/manifest.json").read_bytes()


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_is_detected(tmp_path_factory, content, data):
    folder = tmp_path_factory.mktemp("flip")
    make(folder, {"w.bin": content})
    at = data.draw(st.integers(0, len(content) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    (folder / "w.bin").write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
    with pytest.raises(ArtifactError, match=r"w\.bin has changed"):
        verify(folder)


def test_missing_and_truncated_files_are_named(tmp_path):
    make(tmp_path, {"a.bin": b"abc", "b.bin": b"abc"})
    (tmp_path / "a.bin").write_bytes(b"ab")
    with pytest.raises(ArtifactError, match=r"a\.bin has 2 bytes instead of 3"):
        verify(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is missing"):
        verify(tmp_path)
    assert load(tmp_path).kind == "toy"  # checks the manifest only


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}'])
def test_folder_without_a_valid_manifest_is_not_an_artifact(tmp_path, text):
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        load(tmp_path)
    make(tmp_path, {"a": b""})
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be used") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_temporary_files_of_a_run_are_not_part_of_the_artifact(tmp_path):
    make(tmp_path, {"a": b"1", "pending.json": b"{}", "checkpoint/state": b"2", "deep/checkpoint": b"3"})
    assert list(read_manifest(tmp_path).files) == ["a", "deep/checkpoint"]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]

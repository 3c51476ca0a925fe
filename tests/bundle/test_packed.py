"""`bundle.packed` and `compress.pack.archive`: round trips, and damaged, hostile or interrupted archives."""

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogumi.bundle.packed import DICTIONARY, FRAME, INDEX, SUFFIX, staged
from cogumi.bundle.unpack import UNPACK_MODES, BundleFiles
from cogumi.cli import packing as commands
from cogumi.cli.inspection import describe
from cogumi.compress.pack.archive import Config, pack, pack_folder, run, unpack
from cogumi.core.artifact import finish
from cogumi.core.errors import BundleError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from support.archive import CONTENT, content_of, make_packed, make_plain, write


def packed_of(folder, out, names):
    out.mkdir()
    pack(folder, names, out, Config())
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def packed(plain):
    return make_packed(plain)


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the packed bundle that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COGUMI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unpacked"


def edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refuse(folder, match):
    """Check that unpacking and opening fail, leave no files behind and do not change the archive."""
    before = content_of(folder)
    out = folder.with_name("out")
    with pytest.raises(BundleError, match=match) as caught:
        unpack(folder, out)
    assert "\n" not in str(caught.value)
    assert not list(folder.parent.glob("out*"))
    with pytest.raises(BundleError):
        BundleFiles(folder, "eager")
    assert content_of(folder) == before


# Round trips


def test_unpacking_restores_the_same_bytes(plain, packed, tmp_path):
    reported = []
    unpack(packed, tmp_path / "out", lambda done, total: reported.append((done, total)))
    assert content_of(tmp_path / "out") == content_of(plain)
    assert reported[-1] == (sum(map(len, content_of(plain).values())),) * 2
    index = json.loads((packed / INDEX).read_bytes())
    for name, file in index["files"].items():
        assert (file["bytes"], file["sha256"]) == ((plain / name).stat().st_size, sha256(plain / name))
        assert file["packed_sha256"] == sha256(packed / (name + SUFFIX))
    assert len(index["files"]["base.gguf"]["frames"]) == 2


def test_a_packed_file_is_standard_zstd(packed):
    with (packed / "base.gguf.zst").open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        assert reader.read() == CONTENT["base.gguf"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9._-]{0,8}(/x[a-z0-9]{0,5})?", fullmatch=True),
        st.binary(max_size=3000),
        min_size=1,
        max_size=5,
    )
)
def test_round_trip_of_arbitrary_files(tmp_path, files):
    names = {name for name in files if not any(other.startswith(name + "/") for other in files)}
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    write(root / "in", {name: files[name] for name in names}).mkdir(parents=True, exist_ok=True)
    figures = pack_and_check(root, names)
    assert figures["bytes"] == sum(len(files[name]) for name in names)


def pack_and_check(root, names):
    (root / "packed").mkdir()
    figures = pack(root / "in", names, root / "packed", Config())
    unpack(root / "packed", root / "out")
    assert content_of(root / "out") == content_of(root / "in")
    kept = sum(path.stat().st_size for path in (root / "packed").rglob("*") if path.is_file())
    assert figures["packed_bytes"] == kept - (root / "packed" / INDEX).stat().st_size
    return figures


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME, FRAME + 1])
def test_round_trip_at_frame_boundaries(tmp_path, size):
    write(tmp_path / "in", {"file": random.Random(size).randbytes(size)})
    figures = pack_and_check(tmp_path, ["file"])
    assert figures["ratio"] == pytest.approx(1, abs=0.001) or size < 2


def test_archive_does_not_depend_on_the_thread_count(plain, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("cogumi.bundle.packed.usable_threads", lambda: 1)
    (tmp_path / "one").mkdir()
    pack_folder(plain, tmp_path / "one", Config())
    assert content_of(tmp_path / "one") == content_of(packed)


@pytest.fixture(scope="module")
def similar_files(tmp_path_factory):
    """Many small files that share sentences, so that a dictionary saves space; packed."""
    root, random_source = tmp_path_factory.mktemp("alike"), random.Random(0)
    sentences = ["".join(random_source.choices("abcdefghijklmnopqrstuvwxyz ", k=150)) for _ in range(500)]
    files = {f"{i}.json": json.dumps(random_source.sample(sentences, 12)).encode() for i in range(200)}
    write(root / "in", files)
    (root / "packed").mkdir()
    return root, pack(root / "in", files, root / "packed", Config())


def test_dictionary_is_used_where_it_saves_space(similar_files, tmp_path):
    root, figures = similar_files
    assert 0 < figures["dictionary_bytes"] <= 128 << 10
    assert any(file["dictionary"] for file in figures["files"].values())
    for file in figures["files"].values():
        assert file["packed_bytes"] == min(file["plain_bytes"], file["with_dictionary_bytes"])
    assert figures["packed_bytes"] < sum(file["plain_bytes"] for file in figures["files"].values())
    unpack(root / "packed", tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(root / "in")


def test_no_dictionary_where_it_saves_nothing(packed, plain, tmp_path):
    assert not (packed / DICTIONARY).exists()
    (tmp_path / "out").mkdir()
    figures = pack_folder(plain, tmp_path / "out", Config())
    assert figures["dictionary_bytes"] == 0
    assert figures["files"]["base.gguf"]["with_dictionary_bytes"] > 0
    assert figures["ratio"] == pytest.approx(2, rel=0.02)  # half of the content is zeros


# Damage


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_detected(copy, data):
    path = data.draw(st.sampled_from(sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)))
    good = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
    refuse(copy, None)
    path.write_bytes(good)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncated_or_missing_file_is_detected(copy, data):
    path = data.draw(st.sampled_from(sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)))
    good = path.read_bytes()
    end = data.draw(st.integers(0, len(good.rstrip(b"\n")) - 1))  # the final newline of JSON is optional
    path.write_bytes(good[:end])
    refuse(copy, None)
    path.unlink()
    refuse(copy, "missing|is not packed")
    path.write_bytes(good)


def test_wrong_missing_or_oversized_dictionary_is_refused(similar_files, tmp_path):
    copy = Path(shutil.copytree(similar_files[0] / "packed", tmp_path / "copy"))
    good = (copy / DICTIONARY).read_bytes()
    (copy / DICTIONARY).write_bytes(good[:-1] + b"x")
    refuse(copy, "dictionary has changed")
    for other in (random.Random(3).randbytes(len(good)), good[:300] + bytes(len(good) - 300)):
        (copy / DICTIONARY).write_bytes(other)
        edit(copy, lambda index: index["dictionary"].update(sha256=sha256(copy / DICTIONARY)))
        refuse(copy, r"json\.zst is damaged")
    edit(copy, lambda index: index.update(dictionary=None))
    refuse(copy, "needs a dictionary that is not listed")
    edit(copy, lambda index: index.update(dictionary={"bytes": 1 << 40, "sha256": "x"}))
    refuse(copy, "at most 131072 are read")


# Hostile archives


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "a/../../out", "..", ".hidden", "a//b", "a\\..\\b", "C:x", "a\0b", ""]
)
def test_names_outside_the_folder_are_refused(copy, name):
    def rename(index):
        index["files"][name] = index["files"].pop("README.md")

    edit(copy, rename)
    refuse(copy, "leaves the folder")


def test_symlink_outside_the_folder_is_refused(copy):
    (copy / "README.md.zst").rename(copy.parent / "elsewhere")
    (copy / "README.md.zst").symlink_to(copy.parent / "elsewhere")
    refuse(copy, r"'README\.md' leaves the folder")


def replace_frame(copy, name, frame, size):
    """Replace a small file by another frame; the index matches it except for the size in the frame header."""
    path = copy / (name + SUFFIX)
    path.write_bytes(frame)

    def change(index):
        index["files"][name] |= {
            "bytes": size,
            "frames": [len(frame)],
            "packed_bytes": len(frame),
            "packed_sha256": sha256(path),
        }

    edit(copy, change)


def test_decompression_bombs_are_refused_without_allocating(copy):
    """256 MB of zeros in a few kilobytes, with and without the content size in the frame header."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 28)
    with_size = b"".join(compressor.compress(bytes(1 << 22)) for _ in range(64)) + compressor.flush()
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    without_size = b"".join(compressor.compress(bytes(1 << 22)) for _ in range(64)) + compressor.flush()
    small = zstandard.ZstdCompressor().compress(bytes(100))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for frame in (with_size, without_size, small + small):
        replace_frame(copy, "README.md", frame, 100)
        refuse(copy, r"README\.md\.zst is damaged")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KB


def test_inconsistent_sizes_and_lack_of_disk_space_are_refused(copy, monkeypatch):
    good = (copy / INDEX).read_text()
    for change in ({"bytes": 1 << 60}, {"frames": [1, 2]}, {"frames": []}, {"frames": [-5]}, {"bytes": -1}):
        edit(copy, lambda index, change=change: index["files"]["README.md"].update(change))
        refuse(copy, "do not add up|greater than")
        (copy / INDEX).write_text(good)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    refuse(copy, "bytes, 1,000 are free; free disk space there")


@pytest.mark.parametrize("text", ["", "{", "3", '{"format": 2}', '{"format": 1}', "[" * 100_000, '{"format": null}'])
def test_invalid_index_is_refused(copy, text):
    (copy / INDEX).write_text(text)
    refuse(copy, "again")


def test_empty_archive_is_refused(copy):
    edit(copy, lambda index: index.update(files={}))
    refuse(copy, "at least 1 item")


def test_archive_of_other_files_does_not_open_as_a_bundle(tmp_path, copy, cache):
    write(tmp_path / "in", {"README.md": b"x"})
    other = packed_of(tmp_path / "in", tmp_path / "other", ["README.md"])
    for mode in UNPACK_MODES:
        with pytest.raises(BundleError, match="is not a packed bundle"):
            BundleFiles(other, mode)
    assert not cache.exists()
    found = describe(str(other))
    assert (found["what"], found["bytes"], list(found["files"])) == ("packed files", 1, ["README.md"])
    path = other / "README.md.zst"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"!")
    with pytest.raises(BundleError, match=r"README\.md\.zst is damaged"):
        describe(str(other))
    path.write_bytes(good)
    for name in ("README.md", "base.gguf"):  # a valid packed file, but not the one bundle.json lists
        shutil.copy(other / "README.md.zst", copy / (name + SUFFIX))
        entry = json.loads((other / INDEX).read_text())["files"]["README.md"]
        edit(copy, lambda index, name=name, entry=entry: index["files"].update({name: entry}))
        for mode in UNPACK_MODES:
            with pytest.raises(BundleError, match=rf"^{copy}: .*is not the file that bundle\.json lists"):
                BundleFiles(copy, mode)
    with pytest.raises(BundleError, match="unknown unpack mode"):
        BundleFiles(copy, "tomorrow")


# Output folder


def test_existing_files_are_not_overwritten(plain, packed, tmp_path):
    write(tmp_path / "there", {"precious": b"x"})
    for out in (tmp_path / "there", tmp_path / "there/precious"):
        with pytest.raises(BundleError, match="already exists"):
            unpack(packed, out)
    with pytest.raises(BundleError, match="lies in"):
        unpack(packed, packed / "out")
    assert content_of(tmp_path / "there") == {"precious": b"x"}
    (tmp_path / "empty").mkdir()
    unpack(packed, tmp_path / "empty")
    assert content_of(tmp_path / "empty") == content_of(plain)


def test_unwritable_output_is_named_and_leaves_no_folders(plain, packed, tmp_path):
    """The error names the path as given, and parent folders created for it are removed."""
    write(tmp_path, {"file": b"x"})
    with pytest.raises(BundleError, match=rf"^cannot write {tmp_path}/file/out \(Not a directory\)"):
        commands.pack(plain, tmp_path / "file" / "out")
    with pytest.raises(BundleError, match="neither a bundle nor"):
        commands.pack(tmp_path / "nowhere", tmp_path / "new" / "sub" / "out")
    (tmp_path / "room").mkdir()
    with (
        pytest.raises(BundleError, match=rf"^cannot unpack base\.gguf to {tmp_path}/room/new/base\.gguf "),
        file_size_limit(1 << 19),
    ):
        unpack(packed, tmp_path / "room" / "new")
    assert content_of(tmp_path) == {"file": b"x"}
    assert {path.name for path in tmp_path.iterdir()} == {"file", "room"}
    commands.pack(plain, tmp_path / "new" / "sub" / "out")
    assert content_of(tmp_path / "new" / "sub" / "out") == content_of(packed)


@contextlib.contextmanager
def file_size_limit(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TERMINATED_WHILE_STAGING = """
import os, signal, sys
from pathlib import Path
from cogumi.bundle.packed import staged
with staged(Path(sys.argv[1]), Path(sys.argv[2])) as part:
    (part / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_leftovers_of_a_killed_run_are_replaced(plain, packed, tmp_path):
    done = subprocess.run([sys.executable, "-c", TERMINATED_WHILE_STAGING, str(tmp_path / "out"), str(plain)])
    assert done.returncode == -signal.SIGTERM
    (left,) = tmp_path.iterdir()
    assert content_of(left) == {"half": b"x"}
    commands.pack(plain, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content_of(tmp_path / "out") == content_of(packed)


def test_concurrent_runs_cannot_write_the_same_folder(plain, packed, tmp_path):
    with staged(tmp_path / "out", plain) as part:
        (part / "mine").write_text("x")
        with pytest.raises(BundleError, match=r"^another run is writing .*/out; wait"):
            commands.pack(plain, tmp_path / "out")
        assert content_of(part) == {"mine": b"x"}
    assert content_of(tmp_path / "out") == {"mine": b"x"}


def test_stage_packs_a_bundle_and_reports_damage(plain, packed, tmp_path):
    (tmp_path / "out").mkdir()
    reported = []
    context = Context(0, 1, Path(), lambda done, total, figures: reported.append(done / total))
    metrics = run(Config(), {"bundle": Artifact("bundle", plain, "f")}, tmp_path / "out", context)
    assert content_of(tmp_path / "out") == content_of(packed)
    assert set(metrics["files"]) == {*CONTENT, "bundle.json"}
    assert reported[-1] == 1
    finish(tmp_path / "out", kind="archive", fingerprint="f", parents={}, metrics=metrics, environment={})
    found = describe(str(tmp_path / "out"))
    assert (found["what"], found["fingerprint"]) == ("packed bundle", "f")
    (plain / "README.md").write_bytes(b"changed")
    try:
        with pytest.raises(BundleError, match=r"README\.md"):
            run(Config(), {"bundle": Artifact("bundle", plain, "f")}, tmp_path / "out", context)
    finally:
        (plain / "README.md").write_bytes(CONTENT["README.md"])

"""`compress.pack.sparse`: tensors stored without their zeros are restored bit for bit; damaged files are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from cogumi.bundle.unpack import BundleFiles
from cogumi.cli.inspection import describe
from cogumi.compress.pack.archive import Config, pack_folder, run, unpack
from cogumi.compress.pack.sparse import Sparse, decode, encode, encode_file, expand_file
from cogumi.core.artifact import finish
from cogumi.core.errors import ArtifactError, BundleError, DataError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact

WIDTHS = st.sampled_from([1, 2, 4, 8])


def check_round_trip(raw, width):
    sparse = encode(raw, width)
    assert np.array_equal(decode(sparse, len(raw) // width, width), raw)
    assert len(sparse.values) + len(sparse.where) <= len(raw)
    return sparse


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=WIDTHS)
def test_round_trip_of_any_bits(data, width):
    """Few distinct values in runs of any length, so that zeros, -0.0 and all kinds of NaN are mixed."""
    one = st.one_of(
        st.just(bytes(width)), st.binary(min_size=width, max_size=width), st.just(bytes(width - 1) + b"\x80")
    )
    runs = data.draw(st.lists(st.tuples(one, st.integers(0, 600)), max_size=12))
    check_round_trip(np.frombuffer(b"".join(value * count for value, count in runs), np.uint8), width)


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_round_trip_of_floats_is_exact(bits):
    special = [0x80000000, 0x7FC00001, 0xFF800001, 0, 0, 0x00000001]
    check_round_trip(np.array(bits + special, "<u4").view(np.uint8), 4)


def test_minus_zero_and_nan_count_as_non_zero():
    sparse = encode(np.array([0, -0.0, 0, np.nan] * 8, "<f4").view(np.uint8), 4)
    assert sparse.kind == "mask"
    assert len(sparse.values) == 4 * 16


@pytest.mark.parametrize("length", [0, 1, 254, 255, 256, 510, 511, 65535, 65536, 131071])
@pytest.mark.parametrize("first", [0, 1])
def test_round_trip_of_long_runs(length, first):
    """Lengths around the largest counts of one and two bytes."""
    raw = np.concatenate([np.full(length, first), np.full(70_000, 1 - first), np.full(length, first), [1, 0]])
    check_round_trip(raw.astype(np.uint8), 1)


def test_shortest_encoding_is_chosen():
    values = np.random.default_rng(0).standard_normal(8000).astype("<f4")
    assert check_round_trip(values.view(np.uint8), 4).kind == "dense"
    half = values * np.random.default_rng(1).integers(0, 2, 8000).astype("<f4")
    half[half == 0] = 0.0
    sparse = check_round_trip(half.view(np.uint8), 4)
    assert (sparse.kind, len(sparse.where), len(sparse.values)) == ("mask", 1000, 4 * np.count_nonzero(half))
    for length, kind in ((100, "runs1"), (5_000, "runs2"), (200_000, "runs4")):
        assert check_round_trip(np.repeat(np.arange(10) % 2, length).astype(np.uint8), 1).kind == kind
    assert len(check_round_trip(np.zeros(80_000, np.uint8), 1).where) <= 8


def pruned(share, shape=(64, 96), seed=0):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weights.masked_fill(weights.abs() < weights.abs().flatten().quantile(share), 0.0)


TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
TYPES += [torch.float8_e4m3fn, torch.uint8]


@pytest.fixture
def source(tmp_path):
    """A file with a tensor of every type, including an empty one and a scalar."""
    tensors = {f"t{i}": pruned(0.6, seed=i).to(dtype) for i, dtype in enumerate(TYPES)}
    tensors |= {"empty": torch.empty(0, 5), "one": torch.tensor(0.0), "minus": torch.tensor([-0.0, 0.0])}
    save_torch(tensors, tmp_path / "model.safetensors", {"format": "pt", "ünder": "x"})
    return tmp_path / "model.safetensors"


def test_file_is_restored_byte_for_byte(source, tmp_path):
    figures = encode_file(source, tmp_path / "sparse")
    assert figures["bytes"] == source.stat().st_size
    assert figures["sparse_bytes"] == (tmp_path / "sparse").stat().st_size < figures["bytes"] * 0.62
    assert 0.6 < figures["zeros"] < 0.65
    assert set(figures["kinds"]) >= {"mask", "dense"}
    expand_file(tmp_path / "sparse", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    first = (tmp_path / "sparse").read_bytes()
    encode_file(source, tmp_path / "sparse")
    assert (tmp_path / "sparse").read_bytes() == first
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("content", [b"", b"123", b"\xff" * 20, (2).to_bytes(8, "little") + b"[]"])
def test_invalid_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(DataError, match="is not a valid safetensors file"):
        encode_file(tmp_path / "model", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_source_is_refused(source, share):
    good = source.read_bytes()
    cut = source.with_name("cut")
    cut.write_bytes(good[: int(share * len(good))])
    with pytest.raises(DataError):
        encode_file(cut, source.with_name("out"))
    assert not source.with_name("out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_file_is_refused_or_restored_exactly(source, position, bit, cut):
    """Some bytes, such as padding before the data, carry no information."""
    stored, back = source.with_name("stored"), source.with_name("back")
    encode_file(source, stored)
    good = stored.read_bytes()
    at = int(position * len(good))
    stored.write_bytes(good[:at] if cut else good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
    refused = ""
    try:
        expand_file(stored, back)
    except ArtifactError as error:
        refused = str(error)
    assert "\n" not in refused
    assert back.exists() == (not refused)
    if not refused:
        assert back.read_bytes() == source.read_bytes()
        back.unlink()
    assert not source.with_name("back.part").exists()


@pytest.mark.parametrize(
    ("kind", "where", "values"),
    [("mask", [255], 8), ("mask", [1, 128], 1), ("runs1", [200, 200], 200), ("runs1", [9, 1], 1), ("runs4", [1], 1)],
)
def test_inconsistent_encodings_are_refused(kind, where, values):
    with pytest.raises(ValueError):
        decode(Sparse(kind, np.ones(values, np.uint8), np.array(where, np.uint8)), 9, 1)


def test_sizes_and_format_version_in_the_header_are_checked(tmp_path):
    """A header with an absurd size, and an unknown format version."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]}})
    stored = {"0.values": np.empty(0, np.uint8), "0.where": np.array([0xFF, 0xFF, 0xFF, 0xFF], np.uint8)}
    told = {"format": 1, "header": header, "sha256": "", "kinds": ["runs4"]}
    save_file(stored, tmp_path / "huge", {"sparse": json.dumps(told)})
    with pytest.raises(BundleError, match="free disk space"):
        expand_file(tmp_path / "huge", tmp_path / "out")
    save_file(stored, tmp_path / "new", {"sparse": json.dumps(told | {"format": 2})})
    with pytest.raises(ArtifactError, match="sparse format 2"):
        expand_file(tmp_path / "new", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(tmp_path):
    """The folder of a pruned model, and beside it one of a dense model."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_torch({f"w{i}": pruned(0.65, (256, 512), i) for i in range(3)}, folder / "model.safetensors")
    save_torch({"w": torch.randn(256, 256)}, folder / "dense.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_model_is_packed_without_zeros_where_that_saves_space(model, tmp_path):
    sizes = {}
    for sparse in (False, True):
        out = tmp_path / f"packed-{sparse}"
        out.mkdir()
        told = []
        figures = pack_folder(model, out, Config(sparse=sparse), lambda done, total, told=told: told.append(done))
        assert figures["bytes"] == sum(path.stat().st_size for path in model.iterdir())
        assert figures["bytes"] == sum(file["bytes"] for file in figures["files"].values())
        tensors = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        assert told[-1] == 3 * figures["bytes"] + 2 * tensors * sparse
        assert told == sorted(told)
        sizes[sparse] = figures["packed_bytes"]
        unpack(out, tmp_path / f"back-{sparse}")
        for path in model.iterdir():
            assert (tmp_path / f"back-{sparse}" / path.name).read_bytes() == path.read_bytes()
        assert len(list((tmp_path / f"back-{sparse}").iterdir())) == 3
    assert sizes[True] < sizes[False]
    assert set(figures["files"]) == {"config.json", "dense.safetensors", "model.safetensors.sparse"}
    told = figures["sparse"]["model.safetensors"]
    assert told["packed_bytes"] < 0.95 * told["zstd_alone_bytes"]
    assert told["zeros"] == pytest.approx(0.65, abs=0.01)


def test_damaged_tensor_in_a_packed_model_leaves_no_files(model, tmp_path):
    """The archive is valid, but its content is not."""
    stored = tmp_path / "stored"
    stored.mkdir()
    encode_file(model / "model.safetensors", stored / "model.safetensors.sparse")
    shutil.copy(model / "dense.safetensors", stored)
    with safe_open(stored / "model.safetensors.sparse", "numpy") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["0.values"] = tensors["0.values"][::-1].copy()
    save_file(tensors, stored / "model.safetensors.sparse", told)
    (tmp_path / "packed").mkdir()
    pack_folder(stored, tmp_path / "packed", Config())
    with pytest.raises(
        ArtifactError, match=rf"^{tmp_path}/packed/model.*sparse\.zst is damaged .*SHA-256 does not match"
    ):
        unpack(tmp_path / "packed", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_folder_that_is_neither_bundle_nor_model_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for folder in (tmp_path / "in", tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="neither a bundle nor a model's folder"):
            pack_folder(folder, tmp_path / "out", Config())
    save_torch({"w": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / ".hidden").write_text("x")
    with pytest.raises(BundleError, match="cannot be packed under that name"):
        pack_folder(tmp_path / "in", tmp_path / "out", Config())


@pytest.mark.parametrize("sparse", [False, True])
def test_truncated_model_is_refused(model, tmp_path, sparse):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=rf"^{path} is not a valid safetensors file"):
        pack_folder(model, tmp_path / "out", Config(sparse=sparse))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_symlinks_are_not_followed(model, tmp_path, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("secret")
    (model / "link").symlink_to(tmp_path / target)
    with pytest.raises(BundleError, match=rf"^{model}/link is a link"):
        pack_folder(model, tmp_path / "out", Config())


def test_build_manifest_is_not_packed(model, tmp_path):
    """A packed model can be inspected, whether a stage or the command packed it, but it cannot be opened for chat."""
    (model / "manifest.json").write_text("{}")
    (tmp_path / "out").mkdir()
    metrics = run(
        Config(), {"model": Artifact("model", model, "f")}, tmp_path / "out", Context(0, 1, tmp_path, lambda *_: None)
    )
    assert "manifest.json" not in metrics["files"]
    finish(tmp_path / "out", kind="archive", fingerprint="f", parents={}, metrics=metrics, environment={})
    found = describe(str(tmp_path / "out"))
    assert (found["what"], found["fingerprint"]) == ("packed files", "f")
    assert (found["bytes"], found["packed_bytes"]) == (metrics["bytes"], metrics["packed_bytes"])
    with pytest.raises(BundleError, match=r"is not a packed bundle \(no bundle\.json\)"):
        BundleFiles(tmp_path / "out", "eager")

"""The latency curve is measured once per machine and model; an unusable cache file is not an error."""

import json
import os
import stat

import pytest

from cogumi.core.environment import cache_folder
from cogumi.engine.llama.speculative.latency_measurement import (
    GPU,
    LAPTOP_8_CORES,
    estimate_speedups,
    file_key,
    machine_key,
    stored_latency,
)
from cogumi.engine.llama.speculative.latency_model import LatencyCurve

KEY = {"cpu": "one", "processors": 2}
FIRST, SECOND = LatencyCurve(0.001, (0.01, 0.1 + 0.2, 0.5)), LatencyCurve(0.002, (0.02, 0.03))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COGUMI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def must_not_measure():
    raise AssertionError("measured again")


def test_curve_is_measured_once_and_read_back_exactly(cache):
    assert stored_latency(lambda: FIRST, KEY) == FIRST
    assert stored_latency(must_not_measure, dict(reversed(KEY.items()))) == FIRST
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_another_machine_or_model_is_measured_separately(cache):
    stored_latency(lambda: FIRST, KEY)
    assert stored_latency(lambda: SECOND, {**KEY, "processors": 4}) == SECOND
    assert stored_latency(must_not_measure, KEY) == FIRST


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no text": lambda text: "\x00\udcff",
    "another key": lambda text: text.replace('"one"', '"two"'),
    "zero": lambda text: json.dumps({**json.loads(text), "verify": [0.0, 0.1]}),
    "negative": lambda text: json.dumps({**json.loads(text), "draft": -1.0}),
    "not a number": lambda text: json.dumps({**json.loads(text), "draft": float("nan")}),
    "nothing measured": lambda text: json.dumps({**json.loads(text), "verify": []}),
    "no object": lambda text: "[1, 2]",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_cache_file_is_replaced(cache, damage):
    stored_latency(lambda: FIRST, KEY)
    (path,) = cache.iterdir()
    path.write_bytes(DAMAGES[damage](path.read_text()).encode("utf-8", "surrogateescape"))
    assert stored_latency(lambda: SECOND, KEY) == SECOND
    assert stored_latency(must_not_measure, KEY) == SECOND


def test_unwritable_cache_folder_is_not_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COGUMI_CACHE", str(tmp_path / "file"))
    assert stored_latency(lambda: FIRST, KEY) == FIRST
    assert stored_latency(lambda: SECOND, KEY) == SECOND


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_cache_folder_is_not_an_error(cache):
    cache.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert stored_latency(lambda: FIRST, KEY) == FIRST
    assert stored_latency(lambda: SECOND, KEY) == SECOND


def test_measurement_errors_are_raised(cache):
    def broken():
        raise OSError("the engine is gone")

    with pytest.raises(OSError, match="gone"):
        stored_latency(broken, KEY)


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname == "Darwin", reason="the XDG folder is of Linux")
def test_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("COGUMI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cogumi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cogumi"


def test_cache_keys_distinguish_machines_and_files(tmp_path):
    assert set(machine_key()) == {"cpu", "processors", "llama-cpp-python"}
    assert machine_key()["cpu"]
    model = tmp_path / "model.gguf"
    model.write_bytes(b"one")
    before = file_key(model)
    assert (before["name"], before["bytes"]) == ("model.gguf", 3)
    model.write_bytes(b"two")
    os.utime(model, ns=(1, before["mtime_ns"] + 1))
    assert file_key(model) != before


def test_predicted_speedup_grows_with_acceptance():
    for costs in (LAPTOP_8_CORES, GPU):
        assert len(costs.verify) == 16
        rows = estimate_speedups(costs)
        assert [row.acceptance for row in rows] == [0.3, 0.6, 0.75, 0.9]
        assert [row.k for row in rows] == sorted(row.k for row in rows)
        assert 1 < rows[0].speedup < rows[-1].speedup
    assert {(row.k, row.speedup) for row in estimate_speedups(LatencyCurve(0.01, (0.01, 0.02)))} == {(0, 1.0)}

"""The types of a model side by side: measured on a pico model, and the choice of the fastest."""

import json
import math
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import ArtifactError, ExportError
from cogumi.evaluate.bench import type_comparison
from cogumi.evaluate.bench.type_comparison import (
    TOLERANCE,
    Comparison,
    Knowledge,
    TypeFigures,
    auroc_error,
    compare,
    missing_room,
)
from support.pico import make_model

QUESTIONS = 5


class Shown:
    """Collects the progress."""

    def __init__(self):
        self.rows, self.shares = [], []

    def started(self, name, number, of):
        self.rows.append((name, number, of))

    def advanced(self, share):
        self.shares.append(share)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    found = tmp_path_factory.mktemp("files")
    export_model(make_model(found / "model"), found / "q4_1.gguf", "q4_1")
    return found


@pytest.fixture(scope="module")
def measured(files):
    shown = Shown()
    before = set(Path(tempfile.gettempdir()).glob("cogumi-types-*"))
    found = compare(files / "q4_1.gguf", ("q8_0", "q4_1", "q4_0"), QUESTIONS, shown)
    assert set(Path(tempfile.gettempdir()).glob("cogumi-types-*")) <= before
    return found, shown


def test_every_type_has_speed_beside_loss_and_accuracy(measured, files):
    found, _ = measured
    assert [row.type for row in found.rows] == ["q4_1", "q8_0", "q4_0"]
    own, eight, four = found.rows
    assert own.bytes == (files / "q4_1.gguf").stat().st_size
    assert four.bytes < own.bytes < eight.bytes
    for row in found.rows:
        assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in (row.one, row.many, row.prompt))
        assert row.n == QUESTIONS
        assert row.interval[0] <= row.correct / row.n <= row.interval[1]
        assert sum(row.matrices.values()) == 15
    assert (own.rise, own.rise_error) == (0, 0)
    assert abs(eight.rise) < abs(four.rise)
    assert eight.loss == pytest.approx(own.loss + eight.rise)
    assert eight.rise_error < four.rise_error


def test_figures_are_json_and_progress_covers_all_work(measured):
    found, shown = measured
    document = json.loads(json.dumps(found.document()))
    assert document["as_it_came"] == "q4_1"
    assert document["fastest"] == found.fastest.type
    assert [len(row["many"]) for row in document["types"]] == [3, 3, 3]
    assert document["tolerance"] == TOLERANCE
    assert [number for _, number, _ in shown.rows] == list(range(1, 7))
    assert {of for *_, of in shown.rows} == {6}
    assert shown.shares.count(1.0) == 6


def test_a_folder_is_compared_with_its_f16_file(files):
    found = compare(files / "model", ("q8_0",), QUESTIONS, Shown())
    assert [row.type for row in found.rows] == ["f16", "q8_0"]


def row(type, many, rise):
    return TypeFigures(type, 1, {}, (1.0,), many, (1.0,), 2.0 + rise, rise, 0.0, 1, 2, (0.0, 1.0), None, None)


def test_the_fastest_keeps_the_loss_and_is_faster_in_every_round():
    own = row("q4_1", (100.0, 110.0, 120.0), 0.0)
    lossy = row("q4_0", (300.0, 300.0, 300.0), 1.01 * TOLERANCE)
    lucky = row("q6_k", (400.0, 400.0, 119.0), 0.0)
    good = row("q5_0", (150.0, 150.0, 150.0), TOLERANCE)
    better = row("q8_0", (160.0, 170.0, 150.0), -0.01)
    assert Comparison(2, (own, lossy, lucky, good, better)).fastest is better
    assert Comparison(2, (own, lossy, lucky, good)).fastest is good
    assert Comparison(2, (own, lossy, lucky)).fastest is own


def test_standard_error_of_chance_is_that_of_the_rank_sum():
    """At one half, Hanley and McNeil give the variance of Mann and Whitney's U for equally many of both."""
    for n in (3, 50):
        assert auroc_error(0.5, n, n) == pytest.approx(math.sqrt((2 * n + 1) / (12 * n * n)))
    assert auroc_error(1.0, 4, 5) == 0
    assert auroc_error(0.8, 30, 50) < auroc_error(0.6, 30, 50)


def test_rise_and_its_error_are_those_of_a_ratio():
    tokens, nats = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])
    own = Knowledge(nats, tokens, (True, False, False), (-0.1, -0.5, -0.2))
    header = namedtuple("Header", "path tensors")(Path(__file__), {})
    speeds = [(1.0, 2.0, 3.0)]

    def figures(more, right=own.right):
        known = Knowledge(nats + more, tokens, right, own.confidence)
        return type_comparison._figures("q4_0", header, speeds, known, own)

    same = figures(0.25 * tokens)
    assert (same.loss, same.rise, same.rise_error) == (0.75, 0.25, 0)
    uneven = figures(np.array([1.0, 0.0, -1.0]))
    assert uneven.rise == 0
    assert uneven.rise_error == pytest.approx(math.sqrt(2) / 12)
    assert same.auroc == 1.0
    assert figures(tokens, (True, True, True)).auroc is None


def test_models_and_disks_that_cannot_be_used_are_refused_before_any_work(files, tmp_path, monkeypatch):
    make_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    shown = Shown()
    for model, message in (
        (tmp_path / "model", "model.safetensors is missing"),
        (tmp_path / "empty", "config.json is missing"),
        (tmp_path / "none.gguf", "there is no file"),
    ):
        with pytest.raises((ExportError, ArtifactError), match=message) as caught:
            compare(model, ("q4_0",), QUESTIONS, shown)
        assert "\n" not in str(caught.value)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 990, 10))
    for model in (files / "model", files / "q4_1.gguf"):
        assert "has 10 bytes free; set TMPDIR to a larger disk" in missing_room(model, ("q4_0", "q8_0"))
        with pytest.raises(ExportError, match="has 10 bytes free"):
            compare(model, ("q4_0", "q8_0"), QUESTIONS, shown)
    assert shown.rows == []

"""The suite of the answer cache, on synthetic question pairs and, where available, public ones."""

import json
import tarfile
from functools import partial

import numpy as np
import pytest

from cogumi.cascade.memory.answer_cache import AnswerCache, Scope
from cogumi.cascade.memory.reuse_check import read_check
from cogumi.core.errors import CogumiError, DataError
from cogumi.core.types import Reply, Usage
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import cache
from cogumi.evaluate.suites.cache_lookups import lookup_speed
from cogumi.evaluate.suites.question_pairs import parts, read_pairs
from support.encoder import Trigrams
from support.public_data import public_data

PLACES = [f"{a}{b}" for a in ("Nor", "Sur", "Wes", "Oster", "Mar", "Lin") for b in ("burg", "ville", "ton", "stad")]
WAYS = [("How many people live in {}?", "how many people live in {}"), ("Who rules {}?", "Who is ruler of {}?")]


def labelled():
    """Pairs of questions about invented places: a paraphrase, or the same question about another place."""
    for i, place in enumerate(PLACES * 10):
        for one, other in WAYS:
            question = f"{one.format(place)} ({i})"
            yield question, f"{other.format(place)} ({i})", 1
            yield question, f"{other.format(PLACES[(i + 1) % len(PLACES)])} ({i})", 0


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr("cogumi.evaluate.suites.cache.cached_embedder", Trigrams)
    monkeypatch.setattr("cogumi.evaluate.suites.cache.lookup_speed", partial(lookup_speed, entries=300))
    return lambda **more: cache.run(Task(**more))


def test_suite_reports_its_figures(suite, tmp_path):
    rows = [{"text_a": a, "text_b": b, "label": same} for a, b, same in labelled()]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    found = suite(data=tmp_path, out=tmp_path / "out")
    figures = {figure.name: figure for figure in found.figures}
    assert found.facts["pairs"] == len(rows)
    assert found.facts["labels"] == "both"
    judged = found.facts["judged"]
    assert sum(judged.values()) > 300
    hits, wrong = (figures[f"fitted check, threshold seen: {what}"] for what in ("hit rate", "wrong among hits"))
    assert hits.value > 0.9
    assert hits.low <= hits.value <= hits.high
    assert wrong.value <= 0.01
    assert figures["look-up among 300, ms"].value > 0
    assert found.pictures[0].read_bytes().startswith(b"\x89PNG")
    assert "no threshold was proven" in found.facts["check"]


def test_a_proven_check_is_saved_and_serves(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RISK", 0.1)
    rows = [{"text_a": a, "text_b": b, "label": same} for a, b, same in labelled()]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert suite(data=tmp_path / "pairs.json").facts["check"] == "proven; saved with --out"
    found = suite(data=tmp_path / "pairs.json", out=out)
    assert found.facts["check"] == f"{out / cache.CHECK}: for serve --reuse-check"
    check = read_check(out / cache.CHECK, Trigrams.identity)
    answers = AnswerCache(Trigrams(), None, similarity=0.5, check=check)
    answers.keep(Scope(), "How many people live in Norburg?", Reply("12", (), "stop", Usage(), accepted=True))
    assert answers.find(Scope(), "how many people live in Norburg").reply.text == "12"
    assert answers.find(Scope(), "Who rules the people that live in norburg?") is None


def test_without_labels_questions_of_other_groups_count_as_different(suite, tmp_path):
    rows = [{"origin": a, "similar": b} for a, b, same in labelled() if same]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with tarfile.open(tmp_path / "data.json.gz", "w:gz") as archive:
        archive.add(tmp_path / "data.json", "data.json")
    found = suite(data=tmp_path / "data.json.gz")
    assert "nearest question of another group" in found.facts["labels"]
    assert found.facts["judged"]["different"] > 100


@pytest.mark.parametrize("content", ["", "[]", "{", '[{"a": 1}]', '[{"text_a": "x", "text_b": "y", "label": "z"}]'])
def test_files_without_pairs_are_refused(suite, tmp_path, content):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(DataError, match="pairs"):
        suite(data=tmp_path)


def test_suite_names_its_missing_inputs(suite):
    with pytest.raises(CogumiError, match="--data"):
        suite()


def test_no_question_is_in_two_splits():
    pairs = {(f"q{i}", f"q{j}"): (i + j) % 3 == 0 for i in range(60) for j in (i + 1, i + 30) if i % 7}
    found = parts(pairs, (0.25, 0.25, 0.5), 1000, 0)
    seen = [{question for pair in part for question in pair} for part in found]
    assert sum(map(len, found)) == len(pairs)
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


def test_public_pairs_are_read():
    assert len(read_pairs(public_data("qqp_gptcache"))) > 31_000
    graded = read_pairs(public_data("stsb_en"))
    assert 0.2 < np.mean(list(graded.values())) < 0.3

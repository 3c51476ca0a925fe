"""The file of the second check of reused answers (SPEC F12), and a bundle opened with it."""

import json
import re

import numpy as np
import pytest

from cogumi.cascade import opening
from cogumi.cascade.memory.reuse_check import read_check, write_check
from cogumi.confidence.nets import Net
from cogumi.confidence.reuse import FEATURES, pair_features
from cogumi.core.errors import CogumiError, StateError
from support.bundle import make_bundle
from support.encoder import Trigrams

N = len(FEATURES)
ONE, OTHER = "How many people live in Paris?", "how many people live in Paris"


def logistic(bias, width=N):
    return Net.of(np.zeros(width), np.ones(width), [np.ones((width, 1))], [[bias]], ("different", "same"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("reuse"))


@pytest.fixture
def with_encoder(monkeypatch):
    """The pico bundle has no sentence encoder; a test encoder is used instead."""
    answers = opening._open_answers
    monkeypatch.setattr(opening, "_open_answers", lambda bundle, _, *rest: answers(bundle, Trigrams, *rest))


def test_check_round_trips_through_its_file(tmp_path):
    file = tmp_path / "check.json"
    write_check(file, logistic(-1.5), "one")
    x = pair_features(ONE, OTHER, 0.9)
    assert read_check(file, "one").logits(x) == logistic(-1.5).logits(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "two"}, "was fitted with another encoder than this bundle's"),
        ({"format": 2}, "is a reuse check of another version of cogumi"),
        ({"features": ["cosine"]}, "is a reuse check of another version of cogumi"),
        ({"check": logistic(0.0, 2).to_json()}, "is a reuse check of another version of cogumi"),
        ({"check": {}}, "is not a reuse check"),
        ({"check": 5}, "is not a reuse check"),
        ({"features": 5}, "is not a reuse check"),
        (None, "is not a reuse check"),
    ],
)
def test_unusable_file_is_refused_in_one_line(tmp_path, changes, message):
    file = tmp_path / "check.json"
    write_check(file, logistic(0.0), "one")
    file.write_text("[1" if changes is None else json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(StateError, match=re.escape(f"{file} {message}")) as caught:
        read_check(file, "one")
    assert str(caught.value).endswith("cogumi eval BUNDLE --suite cache --data FOLDER --out FOLDER")
    assert "\n" not in str(caught.value)


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(StateError, match=r"gone\.json cannot be read \(No such file"):
        read_check(tmp_path / "gone.json", "one")


@pytest.mark.parametrize(("bias", "route"), [(-1e6, "base"), (1e6, "cache")])
@pytest.mark.usefixtures("with_encoder")
def test_bundle_reuses_answers_that_the_check_allows(bundle, tmp_path, bias, route):
    file = tmp_path / "check.json"
    write_check(file, logistic(bias), Trigrams.identity)
    size = {"threads": 1, "slots": 2}
    with opening.open_cascade(bundle, reuse="static", reuse_check=str(file), **size) as bot:
        first, second = (bot.ask(text, mode="fast", max_tokens=60, stop=("e",)) for text in (ONE, OTHER))
    assert (first.finish_reason, first.route) == ("stop", "base")
    assert second.route == route
    write_check(file, logistic(bias), "another")
    with pytest.raises(StateError, match="fitted with another encoder"):
        opening.open_cascade(bundle, reuse="static", reuse_check=file, **size)


def test_check_requires_reuse_of_similar_questions(bundle, tmp_path):
    for reuse in (None, "exact"):
        with pytest.raises(CogumiError, match="a reuse check applies to similar questions: add --reuse static"):
            opening.open_cascade(bundle, reuse=reuse, reuse_check=tmp_path / "check.json")

"""The price of a cascade: which answers are the base's alone, in the report and in the row `price` of the benchmark."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cogumi.bundle.format import CALIBRATION, INDEX, open_bundle, write_bundle
from cogumi.core.errors import RequestError
from cogumi.core.files import write_json
from cogumi.core.types import Example, Message, Reply, Token, Usage
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.evaluate.bench import cascade_price
from cogumi.evaluate.bench.paired import Setup
from cogumi.evaluate.bench.run import run
from cogumi.evaluate.report_baselines import base_alone, price
from support.bundle import make_bundle

TWO = (Token(1, "a", -1.0, 1.0, 1.0), Token(2, "b", -1.0, 1.0, 1.0))


def example(i):
    return Example(
        str(i), "code", 1, (Message("user", f"What is {i} + 3?"),), "x", "test", {"check": {"kind": "exact"}}
    )


@pytest.fixture(scope="module")
def unsure(tmp_path_factory):
    """A bundle whose base misses the threshold of the default mode, so that a modifier answers too."""
    return make_bundle(tmp_path_factory.mktemp("unsure"))


@pytest.fixture(scope="module")
def sure(unsure, tmp_path_factory):
    """The same with a threshold that the base meets, and held-out questions beside it."""
    folder, index = tmp_path_factory.mktemp("sure"), json.loads((unsure / INDEX).read_text())
    calibration = json.loads((unsure / CALIBRATION).read_text())
    for promise in calibration["guarantees"].values():
        promise["threshold"] = 0.6
    write_json(folder / CALIBRATION, calibration)
    files = {name: unsure / name for name in index["files"]} | {CALIBRATION: folder / CALIBRATION}
    write_bundle(folder / "bundle", files, {"parts": index["parts"]})
    (folder / "data").mkdir()
    write_examples(split_path(folder / "data", SPLITS[-1]), [example(i) for i in range(12)])
    return folder / "bundle"


def setup_of(bundle):
    return Setup(open_bundle(bundle).base, None, bundle, threads=1, words=np.arange(9), bundle=bundle)


def test_answer_is_the_bases_alone_if_nothing_else_was_generated():
    alone = Reply("ab", TWO, "stop", Usage(9, 2), tier="base", route="low_confidence")
    assert base_alone(alone)
    assert base_alone(replace(alone, route="base", accepted=True))
    assert not base_alone(replace(alone, usage=Usage(9, 5)))  # a modifier answered too, and was worse
    assert not base_alone(replace(alone, tier="modifier:math"))
    assert not base_alone(replace(alone, tier="base+votes"))


def test_price_in_the_report_needs_only_questions(sure):
    found = price(sure, open_bundle(sure).base, [example(i) for i in range(4)], 6, 128)
    assert found["n"] == 4
    assert min(found["first_token"], found["answer"], found["8_streams"]) > 0
    assert price(sure, open_bundle(sure).base, [], 6, 128) is None


def test_row_compares_the_same_answers_with_llama_cpps_server(sure):
    pytest.importorskip("xllamacpp")
    shares = []
    progress = SimpleNamespace(started=lambda name, number, of: None, advanced=shares.append)
    row = run(progress, only=["price"], model=sure, threads=1)["rows"][0]
    found = row["conditions"]
    assert (row["name"], row["unit"], found["questions"], found["goal"]) == ("price", "tokens/s", 12, ">= 0.95")
    assert 0 < found["spread"][0] <= row["ratio"] <= found["spread"][1]
    assert shares == pytest.approx([i / 10 for i in range(1, 11)])
    for name in ("8_streams", "first_token_seconds"):
        assert found[name]["spread"][0] - 0.001 <= found[name]["ratio"] <= found[name]["spread"][1] + 0.001
        assert min(found[name]["cascade"], found[name]["server"]) > 0


@pytest.mark.parametrize("given", [None, "without data", "never alone"])
def test_row_without_usable_questions_says_what_it_needs(unsure, sure, given, tmp_path):
    pytest.importorskip("xllamacpp")
    reasons = {None: "--model runs/smollm2/bundle", "without data": "name a bundle in the folder of its build"}
    if given is None:
        setup = replace(setup_of(sure), bundle=None)
    elif given == "without data":
        setup = setup_of(unsure)
    else:
        (tmp_path / "data").mkdir()
        write_examples(split_path(tmp_path / "data", SPLITS[-1]), [example(i) for i in range(9)])
        (tmp_path / "bundle").symlink_to(unsure)
        setup = setup_of(tmp_path / "bundle")
    with pytest.raises(
        RequestError, match=reasons.get(given, "the base alone answered 0 of 9 questions; 8 are needed")
    ):
        cascade_price.price(setup)

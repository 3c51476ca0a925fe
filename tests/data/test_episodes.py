"""Stage `episodes`: evaluation families and words are never trained on, and the support set determines the answers."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data import episodes
from cogumi.data.episodes import Config, draw_set, questions, read_episodes
from cogumi.data.examples import SPLITS, normalised_question, split_path, write_examples
from cogumi.data.task_families import FAMILIES, WORDS
from cogumi.data.world import make
from cogumi.grading.graders import grade

SMALL = Config(train=14, selection=6, heldout=5, seeds=2)


@cache
def drawn(seed):
    return {split: draw_set(split, 14, SMALL, seed, ()) for split in FAMILIES}


@pytest.fixture
def world(tmp_path):
    """Five sets of questions, each as large as stage `world` makes them for one kind."""
    from random import Random

    from cogumi.data.world.questions import _example

    rng = Random(0)
    tasks = {t.question: t for t in (make("commonsense", 2, rng) for _ in range(900))}
    rows = [_example(task, "commonsense", 2, None) for task in tasks.values()]
    for i, name in enumerate(SPLITS):
        write_examples(split_path(tmp_path / "data", name), rows[i::5])
    return Artifact("x", tmp_path / "data", "0")


def run(world, out, seed=3, config=SMALL):
    out.mkdir(exist_ok=True)
    return episodes.run(config, {"examples": world}, out, Context(seed, 1, Path(), lambda *shown: None))


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_families_and_words_of_the_sets_are_disjoint_for_any_seed(seed):
    sets = list(drawn(seed).values())
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            assert not {e.family for e in one} & {e.family for e in other}
    used_words = {split: {w for e in drawn(seed)[split] for w in words_of(e)} for split in FAMILIES}
    for split, words in used_words.items():
        assert words <= set(WORDS[split])
        assert not words & {w for other in FAMILIES if other != split for w in WORDS[other]}


def words_of(episode):
    if episode.rule == "rename":
        return {e.answer for e in (*episode.support, *episode.query)}
    return {e.answer.rsplit(" ", 1)[1] for e in episode.query} if episode.rule == "suffix" else set()


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_questions_within_an_episode_are_unique(seed):
    for split in FAMILIES:
        for episode in drawn(seed)[split]:
            normalised = [normalised_question(e.messages) for e in (*episode.support, *episode.query)]
            assert len(set(normalised)) == len(normalised)


@given(st.integers(0, 2**32), st.integers(1, 10))
@settings(max_examples=10, deadline=None)
def test_first_k_support_examples_show_as_many_classes_as_possible(seed, shots):
    renamings = [e for e in drawn(seed)["heldout"] if e.rule == "rename"]
    assert renamings
    for episode in renamings:
        classes = episode.secret.count("=")
        assert 2 <= classes <= 3
        assert len({e.answer for e in episode.support[:shots]}) == min(shots, classes)
        assert {e.answer for e in episode.query} <= {e.answer for e in episode.support[:classes]}


def test_sizes_are_as_configured_and_evaluation_sets_have_full_support():
    for split, found in drawn(1).items():
        for episode in found:
            low, high = (3, 10) if split == "train" else (10, 10)
            assert low <= len(episode.support) <= high
            assert 10 <= len(episode.query) <= 20


def test_check_of_each_example_accepts_only_its_own_answer():
    for found in drawn(2).values():
        for episode in found:
            answers = {e.answer for e in episode.query}
            for example in episode.query:
                assert [a for a in answers if grade(example, a).correct] == [example.answer]


def test_pick_rule_always_asks_for_the_same_attribute():
    for episode in (e for e in drawn(3)["heldout"] if e.rule == "pick"):
        told = " lives in " if "city" in episode.secret else " owns a "
        assert all(f"{told}{e.answer}." in e.messages[0].content for e in (*episode.support, *episode.query))


def test_bytes_depend_only_on_the_seed(world, tmp_path):
    metrics = run(world, tmp_path / "a")
    assert metrics["episodes"] == {"train": 14, "selection": 6, "heldout": 10}
    run(world, tmp_path / "b")
    run(world, tmp_path / "c", seed=4)
    for split in FAMILIES:
        a, b, c = ((tmp_path / x / f"{split}.jsonl").read_bytes() for x in "abc")
        assert a == b != c
    assert {e.draw for e in read_episodes(tmp_path / "a", "heldout")} == {0, 1}


def test_episodes_do_not_share_questions_with_the_other_sets(world, tmp_path):
    run(world, tmp_path / "out")
    for split in FAMILIES:
        taken = questions(world.path, split)
        assert taken
        found = read_episodes(tmp_path / "out", split)
        assert not taken & {normalised_question(e.messages) for x in found for e in (*x.support, *x.query)}


def test_family_with_too_few_questions_is_refused():
    with pytest.raises(DataError, match="family 'place' has too few different questions for an episode of 3010"):
        draw_set("heldout", 1, Config(support=(3000, 3000), query=(10, 10)), 1, ())


def test_unusable_episode_files_are_refused_by_name(world, tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl does not exist: build the `episodes` step"):
        read_episodes(tmp_path, "train")
    with pytest.raises(DataError, match="unknown set of episodes 'test'"):
        read_episodes(tmp_path, "test")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_episodes(tmp_path, "train")
    run(world, tmp_path / "out")
    line = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    (tmp_path / "train.jsonl").write_text(json.dumps({**line, "query": []}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the query set of episode .* is empty"):
        read_episodes(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1 is not an episode"):
        read_episodes(tmp_path, "train")


@pytest.mark.parametrize("wrong", [{"support": (0, 3)}, {"query": (5, 4)}, {"train": 0}, {"colour": 1}])
def test_inconsistent_configurations_are_refused(wrong):
    with pytest.raises(ValidationError):
        Config(**wrong)

"""Stage `world`: data sets are seeded and disjoint, and every reference answer passes its own check."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.core.types import ABSTENTION, Example, Message
from cogumi.data.examples import SPLITS, normalised_question, read_examples, split_path
from cogumi.data.world import DIFFICULTIES, SYNTHETIC, make
from cogumi.data.world import UNANSWERABLE as ALL_KINDS
from cogumi.data.world import questions as world_stage
from cogumi.grading.graders import grade, grade_all

UNANSWERABLE = {kind: made for kind, made in ALL_KINDS.items() if made[0] in SYNTHETIC}
SMALL = {"train": 30, "selection": 3, "fit": 5, "threshold": 5, "heldout": 5, "unanswerable": 10}


def context(seed=7):
    return Context(seed, 1, Path(), lambda done, total, figures: None)


def run(out, seed=7, **config):
    out.mkdir()
    return world_stage.run(world_stage.Config(**{**SMALL, **config}), {}, out, context(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "data"
    return out, run(out)


def everything(out):
    return {name: read_examples(split_path(out, name)) for name in SPLITS}


def test_checks_accept_reference_answers_and_reject_other_texts():
    rng = random.Random(3)
    examples = []
    for domain in SYNTHETIC:
        for difficulty in DIFFICULTIES:
            for _ in range(4):
                task = make(domain, difficulty, rng)
                message = Message("user", task.question)
                examples.append(
                    Example("x", domain, difficulty, (message,), task.answer, "", {"check": dict(task.check)})
                )
    assert all(v.correct for v in grade_all([(e, e.answer) for e in examples]))
    assert not any(v.correct for v in grade_all([(e, "pudding") for e in examples]))
    assert not any(v.correct for v in grade_all([(e, ABSTENTION) for e in examples]))


@given(st.sampled_from(sorted(UNANSWERABLE)), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_only_an_abstention_is_correct_for_unanswerable_questions(kind, seed):
    domain, make_task = UNANSWERABLE[kind]
    task = make_task(random.Random(seed))
    example = Example("x", domain, 0, (Message("user", task.question),), task.answer, "", {"check": dict(task.check)})
    assert grade(example, "i don't know").correct
    assert not grade(example, "Paris").correct


@given(st.sampled_from(sorted(SYNTHETIC)), st.sampled_from(DIFFICULTIES), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_question_depends_only_on_the_generator_state(domain, difficulty, seed):
    assert make(domain, difficulty, random.Random(seed)) == make(domain, difficulty, random.Random(seed))


def test_sets_are_disjoint_and_have_the_configured_sizes(world):
    out, metrics = world
    sets = everything(out)
    cells = len(SYNTHETIC) * len(DIFFICULTIES) + 2  # two kinds of unanswerable questions are known
    more = {n: 0 if n == "train" else 2 * (world_stage.UNANSWERABLE_FACTOR - 1) for n in SPLITS}
    assert metrics["rows"] == {**{n: SMALL[n] * (cells + more[n]) for n in SPLITS}, "unanswerable": 30}
    questions = [normalised_question(e.messages) for rows in sets.values() for e in rows]
    questions += [normalised_question(e.messages) for e in read_examples(out / "unanswerable.jsonl")]
    assert len(set(questions)) == len(questions)


def test_unseen_kind_appears_only_in_its_own_file(world):
    out, _ = world
    assert not any(e.meta.get("unanswerable") == "invented_thing" for rows in everything(out).values() for e in rows)
    kinds = [e.meta["unanswerable"] for e in read_examples(out / "unanswerable.jsonl")]
    assert kinds.count("invented_thing") == 10


def test_bytes_depend_only_on_the_seed(world, tmp_path):
    out, _ = world
    run(tmp_path / "again")
    run(tmp_path / "other", seed=8)
    for name in SPLITS:
        first = split_path(out, name).read_bytes()
        assert split_path(tmp_path / "again", name).read_bytes() == first
        assert split_path(tmp_path / "other", name).read_bytes() != first


def test_small_cells_limit_the_training_set_but_other_sets_are_exact_or_refused(tmp_path):
    metrics = run(tmp_path / "much", train=1000)
    assert metrics["rows"]["train"] < 1000 * 32
    assert metrics["rows"]["heldout"] == SMALL["heldout"] * (30 + 2 * world_stage.UNANSWERABLE_FACTOR)
    with pytest.raises(DataError, match=r"too few different questions in .*heldout"):
        run(tmp_path / "too-much", heldout=5000)


def test_fresh_questions_are_new_and_from_the_held_out_part(world):
    out, _ = world
    found = world_stage.draw_fresh(12, 7, lambda done, total, figures: None)
    questions = [normalised_question(e.messages) for e in found]
    assert len(set(questions)) == len(questions) == 12 * 33
    read = {
        normalised_question(e.messages) for n in SPLITS if n != "heldout" for e in read_examples(split_path(out, n))
    }
    assert not read & set(questions)
    assert {e.source for e in found} == {*(f"{d}/{k}" for d in SYNTHETIC for k in DIFFICULTIES), *UNANSWERABLE}
    assert found == world_stage.draw_fresh(12, 7, lambda done, total, figures: None)


def test_training_questions_can_be_counted_by_domain(tmp_path):
    run(tmp_path / "more", train=3, train_by_domain={"math": 7})
    rows = read_examples(split_path(tmp_path / "more", "train"))
    counts = {domain: sum(e.domain == domain and e.answerable for e in rows) for domain in ("math", "code")}
    assert counts == {"math": 5 * 7, "code": 5 * 3}
    run(tmp_path / "kinds", train=3, train_by_domain={"tools": 7})
    rows = read_examples(split_path(tmp_path / "kinds", "train"))
    kinds = Counter(e.meta["unanswerable"] for e in rows if not e.answerable)
    assert kinds == {"missing_tool": 7, "missing_fact": 3}


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"unknown kinds \['sphinx'\] in `unseen`"):
        run(tmp_path / "a", unseen=("sphinx",))
    with pytest.raises(DataError, match="in `train_by_domain`"):
        run(tmp_path / "b", train_by_domain={"maths": 3})


def test_rows_are_plain_json(world):
    row = json.loads(split_path(world[0], "train").read_text().splitlines()[0])
    assert {"id", "domain", "difficulty", "messages", "answer", "meta"} <= set(row)


NATURAL = {"wording": "natural", "domains": SYNTHETIC}
IDS_OF_SEED_7 = {
    "train": "667ea36ce8a3a8dfa7e0985c4641d5e1",
    "selection": "3aa51f1857828c69423e3c7b39c48f11",
    "fit": "ba2ddccb7ff7357e78923ef62cbc2351",
    "threshold": "562679e448d4e682982904c0665c5722",
    "heldout": "ea26f9ca36e4d5032e142d553b251f70",
}
"""Start of the SHA-256 of the sets before natural wordings existed: recipes without them must not change."""


def test_the_default_world_keeps_its_bytes(world):
    out, _ = world
    found = {name: hashlib.sha256(split_path(out, name).read_bytes()).hexdigest()[:32] for name in SPLITS}
    assert found == IDS_OF_SEED_7


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    out = tmp_path_factory.mktemp("natural") / "data"
    return out, run(out, **NATURAL)


def test_natural_questions_have_a_short_system_prompt_and_bounded_length(natural):
    rows = [e for examples in everything(natural[0]).values() for e in examples]
    assert {tuple(m.role for m in e.messages) for e in rows} == {("system", "user")}
    assert {e.messages[0].content for e in rows} == {world_stage.NATURAL_SYSTEM}
    assert max(len(e.messages[1].content) for e in rows) < 300
    assert not {e.meta["check"]["kind"] for e in rows} & {"exact"}


@pytest.mark.parametrize("domain", SYNTHETIC)
def test_natural_checks_accept_sentences_and_reject_other_texts(domain):
    rng, pairs, wrong = random.Random(11), [], []
    for difficulty in DIFFICULTIES:
        for _ in range(6):
            task = make(domain, difficulty, rng, "natural")
            meta = {"check": dict(task.check)}
            example = Example("x", domain, difficulty, (Message("user", task.question),), task.answer, "", meta)
            pairs.append((example, task.answer))
            wrong += [(example, "pudding"), (example, ABSTENTION), (example, task.question)]
            if task.check["kind"] == "short_answer":
                pairs.append((example, f"The answer is {task.answer}."))
                wrong += [(example, rival) for rival in task.check["rivals"]]
    assert [
        (e.messages[0].content, o) for (e, o), v in zip(pairs, grade_all(pairs), strict=True) if not v.correct
    ] == []
    assert [(e.messages[0].content, o) for (e, o), v in zip(wrong, grade_all(wrong), strict=True) if v.correct] == []


def test_system_prompt_can_be_changed_or_left_out(tmp_path):
    small = {"wording": "natural", "domains": ("math",)}
    run(tmp_path / "own", system="Be brief.", **small)
    assert read_examples(split_path(tmp_path / "own", "fit"))[0].messages[0] == Message("system", "Be brief.")
    run(tmp_path / "none", system="", **small)
    assert len(read_examples(split_path(tmp_path / "none", "fit"))[0].messages) == 1


def test_chosen_domains_bring_only_their_own_unanswerable_kinds(tmp_path):
    metrics = run(tmp_path / "a", domains=("reading", "math"))
    assert metrics["domains"] == ["reading", "math"]
    assert metrics["unanswerable_kinds"] == ["missing_fact"]
    assert metrics["unseen_kinds"] == []
    assert {e.domain for rows in everything(tmp_path / "a").values() for e in rows} == {"reading", "math"}
    with pytest.raises(DataError, match=r"unknown domains \['maths'\] in `domains`"):
        run(tmp_path / "b", domains=("maths",))


def test_fresh_questions_follow_the_config(natural):
    config = world_stage.Config(wording="natural", domains=("reading",))
    found = world_stage.draw_fresh(4, 7, lambda done, total, figures: None, config=config)
    assert {e.source for e in found} == {*(f"reading/{k}" for k in DIFFICULTIES), "missing_fact"}
    read = {normalised_question(e.messages) for n in SPLITS if n != "heldout" for e in everything(natural[0])[n]}
    assert not read & {normalised_question(e.messages) for e in found}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_natural_sums_show_their_work(difficulty, seed):
    """Every step is right, and the last one ends with the result that the grader expects."""
    task = make("math", difficulty, random.Random(seed), "natural")
    steps = task.answer.removesuffix(".").split(", ")
    for step in steps:
        left, right = step.split(" = ")
        assert eval(left) == int(right)
    assert steps[-1].endswith(f"= {task.check['value']}")

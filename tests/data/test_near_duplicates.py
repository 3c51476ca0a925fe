"""Stage `deduplicate`: exact similarities, near-duplicates, conflicts, clusters that stay in one split, resuming."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.stage import CHECKPOINT
from cogumi.data.curation import deduplicate, near_pairs
from cogumi.data.curation.near_pairs import connected, find_groups, recall
from cogumi.data.curation.shingles import WIDTH, Texts, padded
from cogumi.data.curation.sketches import SketchFiles
from cogumi.data.examples import POOL, SPLIT_GROUP, SPLITS, read_examples, split_path
from support.pools import dropped, pool, questions, row, rows, run

LONG = "Explain in three sentences why the sky over the harbour of Lisbon looks blue on a clear day in summer"
COUNT = 240
OTHER = "List the five largest rivers of South America with their lengths and the countries they flow through"


def texts(contents):
    encoded = [padded(text) for text in contents]
    return Texts(np.frombuffer(b"".join(encoded), np.uint8), np.array([len(e) for e in encoded], np.int64))


def exact(one, other):
    """Jaccard similarity by Python sets: the definition."""
    sets = []
    for text in (padded(one), padded(other)):
        sets.append({text[i : i + WIDTH] for i in range(len(text) - WIDTH + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@given(st.lists(st.text(max_size=30) | st.text(alphabet="ab", max_size=40), min_size=2, max_size=6))
def test_similarity_is_that_of_sets_of_shingles(contents):
    contents = [content.encode("utf-8", "replace").decode() for content in contents]
    pairs = np.array(list(combinations(range(len(contents)), 2)))
    expected = [exact(contents[i], contents[j]) for i, j in pairs]
    assert texts(contents).jaccard(pairs) == pytest.approx(expected)


def test_similarities_of_many_pairs_are_computed_in_batches(monkeypatch):
    monkeypatch.setattr("cogumi.data.curation.shingles.BATCH_BYTES", 300)
    contents = [LONG[: 20 + 5 * i] for i in range(15)] + [LONG * 10]
    pairs = np.array(list(combinations(range(16), 2)))
    assert texts(contents).jaccard(pairs) == pytest.approx([exact(contents[i], contents[j]) for i, j in pairs])


def test_no_pairs_have_no_similarities():
    assert texts([LONG]).jaccard(np.empty((0, 2), np.int64)).shape == (0,)


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=15))
def test_components_are_those_of_a_graph(count, edges):
    edges = [(a, b) for a, b in edges if a < count and b < count]
    groups = [{i} for i in range(count)]
    for a, b in edges:
        one, other = (next(g for g in groups if x in g) for x in (a, b))
        if one is not other:
            groups.remove(other)
            one |= other
    some = np.array(edges, np.int64).reshape(-1, 2)
    found = connected(connected(np.arange(count), some[: len(edges) // 2]), some)
    assert found.tolist() == [min(next(g for g in groups if i in g)) for i in range(count)]


def varied(count, seed=0):
    """Questions of 12 to 40 words; each second one is an earlier one with up to an eighth of its words changed."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("bdfgklmnprstaeiou", k=draw.randint(2, 8))) for _ in range(3000)]
    made = []
    for i in range(count):
        if i % 2:
            words = draw.choice(made).split()
            for _ in range(draw.randint(0, len(words) // 8)):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        else:
            words = draw.choices(vocabulary, k=draw.randint(12, 40))
        made.append(" ".join(words))
    return made


@pytest.mark.parametrize("answers", [1, 3, 1000])
def test_groups_are_those_of_all_comparisons(tmp_path, answers):
    """With one answer for all questions, with three, and with a different one for each."""
    contents, said = varied(COUNT), [f"answer {i % answers}" for i in range(COUNT)]
    files = SketchFiles(tmp_path)
    for start in range(0, COUNT, 100):
        files.append(list(zip(contents, said, strict=True))[start : start + 100])
    groups = find_groups(files.open(), 0.8, lambda done, total: None)
    everything = np.array(list(combinations(range(COUNT), 2)))
    similar = everything[texts(contents).jaccard(everything) >= 0.8]
    agree = texts(said).jaccard(similar) >= 0.8
    assert len(similar) > 25
    assert groups.cluster.tolist() == connected(np.arange(COUNT), similar).tolist()
    assert groups.original.tolist() == connected(np.arange(COUNT), similar[agree]).tolist()


def test_recall_of_the_bands():
    assert recall(0.8) == pytest.approx(0.9982, abs=1e-4)
    assert recall(0) == 0
    assert recall(1) == 1


def test_first_of_the_duplicates_is_kept_and_the_others_say_what_they_repeat(tmp_path):
    given_rows = rows(
        (LONG, "Because of Rayleigh scattering."),
        (OTHER, "Amazon"),
        (f"  {LONG.upper()} ", "because of Rayleigh scattering"),
        (LONG.replace("clear day", "clear days"), "Because of Rayleigh scattering."),
        (LONG.replace("blue", "red at the horizon even if the weather is bad"), "Because of Rayleigh scattering."),
    )
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert questions(kept) == [given_rows[i].messages[0].content for i in (0, 1, 4)]
    assert [(r["source"], r["rule"], r["reason"]) for r in dropped(kept)] == [
        ("rows.jsonl:3", "duplicate", "repeats rows.jsonl:1"),
        ("rows.jsonl:4", "near_duplicate", "nearly repeats rows.jsonl:1"),
    ]
    assert dropped(kept)[0]["text"].startswith("  EXPLAIN IN THREE")
    assert kept.metrics["dropped"] == {"duplicate": 1, "near_duplicate": 1}
    assert (kept.metrics["rows"], kept.metrics["read"]) == (3, 5)
    assert kept.metrics["found_at_threshold"] == 0.9982


def test_similar_questions_with_other_answers_are_kept_as_one_cluster(tmp_path):
    given_rows = rows((LONG, "Scattering."), (LONG.replace("clear day", "clear days"), "Reflections."), (OTHER, "x"))
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    found = read_examples(kept.path / POOL)
    assert [e.meta.get(SPLIT_GROUP) for e in found] == [given_rows[0].id, given_rows[0].id, None]
    assert kept.metrics["clusters"] == {"number": 1, "rows": 2, "largest": 2}
    assert kept.metrics["conflicts"] == {"questions": 0, "rows": 0}


CONFLICT = (
    ("What is the largest city of Turkey?", "Ankara"),
    (LONG, "x"),
    ("what is the largest city of turkey?", "Izmir"),
)


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_same_question_with_another_answer_is_a_conflict(tmp_path, policy):
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", rows(*CONFLICT))}, tmp_path / "out", conflicts=policy)
    assert kept.metrics["conflicts"] == {"questions": 1, "rows": 2}
    listed = [json.loads(line) for line in (kept.path / deduplicate.CONFLICTS).read_text().splitlines()]
    assert [(one["question"], one["answer"]) for one in listed] == [
        ("rows.jsonl:1", "Ankara"),
        ("rows.jsonl:1", "Izmir"),
    ]
    assert len(questions(kept)) == (3 if policy == "keep" else 1)
    assert [r["rule"] for r in dropped(kept)] == ([] if policy == "keep" else ["conflict", "conflict"])


def test_answers_that_nearly_agree_are_no_conflict(tmp_path):
    answer = "The sky is blue because air scatters short waves of sunlight far more strongly than long ones do."
    given_rows = rows((LONG, answer), (LONG, answer.replace("do.", "do!")), (LONG, answer + " Indeed."))
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert kept.metrics["dropped"] == {"near_duplicate": 1, "duplicate": 1}
    assert kept.metrics["conflicts"]["rows"] == 0


def test_short_questions_that_differ_in_a_number_are_different(tmp_path):
    given_rows = rows(*[(f"What is {i} + {i % 7}?", "yes") for i in range(50)])
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert kept.metrics["rows"] == 50


@pytest.mark.parametrize("count", [1, 2, 3, near_pairs.NEIGHBOURS])
def test_pool_smaller_than_the_window_of_neighbours(tmp_path, count):
    given_rows = [row(LONG, "yes", i) for i in range(count)]
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert kept.metrics["rows"] == 1
    assert len(dropped(kept)) == count - 1


def test_many_repeats_are_said(tmp_path):
    given_rows = [row(question, "yes", i) for i, question in enumerate([LONG, OTHER, LONG])]
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert kept.metrics["warnings"] == [
        "1 of 3 rows repeat another: look at some of dropped.jsonl; questions that share a long template look alike, "
        "then raise `threshold`"
    ]


def test_empty_pool_is_refused(tmp_path):
    with pytest.raises(DataError, match="the pool has no rows"):
        run("deduplicate", {"pool": pool(tmp_path / "pool", [])}, tmp_path / "out")


def test_pool_of_conflicts_only_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no row is left: the rule 'conflict' dropped 2 of 2 .*set `conflicts: keep`"):
        run(
            "deduplicate",
            {"pool": pool(tmp_path / "pool", rows(("Who?", "I"), ("Who?", "you")))},
            tmp_path / "out",
            conflicts="drop",
        )


def test_damaged_pool_is_refused_with_its_line(tmp_path):
    made = pool(tmp_path / "pool", rows((LONG, "x"), (OTHER, "y")))
    (made.path / POOL).write_text((made.path / POOL).read_text() + '{"id": 1}\n')
    with pytest.raises(DataError, match=r"pool\.jsonl:3 is not an example"):
        run("deduplicate", {"pool": made}, tmp_path / "out")


def test_template_that_holds_everything_together_is_said(tmp_path):
    long = " ".join(varied(8))
    given_rows = [row(f"{long} Which number follows {i}?", str(i), i) for i in range(60)]
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert kept.metrics["rows"] == 60
    assert kept.metrics["warnings"] == [
        "60 of 60 rows are similar to one another and will be in one split: they share a long text; raise "
        "`threshold`, or ask without it"
    ]


def test_near_duplicates_never_straddle_two_splits(tmp_path):
    contents = varied(COUNT)
    given_rows = [row(content, f"answer {i}", i) for i, content in enumerate(contents)]
    kept = run("deduplicate", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert kept.metrics["rows"] == COUNT
    run("split", {"pool": kept}, tmp_path / "data")
    place = {e.answer: name for name in SPLITS for e in read_examples(split_path(tmp_path / "data", name))}
    pairs = np.array(list(combinations(range(COUNT), 2)))
    near = pairs[texts(contents).jaccard(pairs) >= 0.8].tolist()
    ends = [[place[f"answer {i}"] for i in pair if f"answer {i}" in place] for pair in near]
    assert len(near) > 25
    assert all(len(set(names)) <= 1 for names in ends)
    assert {name for names in ends for name in names} == set(SPLITS)


KILLED = """
import os, signal, sys
from pathlib import Path
from cogumi.core.artifact import load
from cogumi.data.curation import deduplicate
from support.pools import run

deduplicate.CHUNK = 50
def progress(done, total, figures):
    if done == 150:
        os.kill(os.getpid(), signal.SIGKILL)
run("deduplicate", {"pool": load(Path(sys.argv[1]))}, Path(sys.argv[2]), progress=progress)
"""


def test_killed_run_continues_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(deduplicate, "CHUNK", 50)
    given_rows = [row(content, "yes", i) for i, content in enumerate(varied(300))]
    made = pool(tmp_path / "pool", given_rows)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(made.path), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    state = json.loads((tmp_path / "out" / CHECKPOINT / "done.json").read_text())
    assert state["rows"] > 0
    with (tmp_path / "out" / CHECKPOINT / "questions.bin").open("ab") as file:  # half a chunk was written
        file.write(b"rest")
    read = []
    again = run("deduplicate", {"pool": made}, tmp_path / "out", progress=lambda done, total, _: read.append(done))
    whole = run("deduplicate", {"pool": made}, tmp_path / "whole")
    assert read[0] == 200
    for name in (POOL, "dropped.jsonl", deduplicate.CONFLICTS):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert again.metrics == whole.metrics

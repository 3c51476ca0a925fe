"""Stages `language`, `decontaminate`, `mix` and `curation_report`, split groups, and the recipe of docs/curation.md."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import cogumi
from cogumi.core import artifact
from cogumi.core.errors import DataError, PackageError
from cogumi.core.estimate import Given, Input
from cogumi.core.facts import RowFacts
from cogumi.data.curation import decontaminate, mix
from cogumi.data.examples import POOL, SPLIT_GROUP, SPLITS, read_examples, split_path
from support.cli import cogumi as command
from support.pools import dropped, pool, questions, row, rows, run

PAGE = (Path(cogumi.__file__).parents[2] / "docs" / "curation.md").read_text("utf-8")

TEXTS = {
    "en": "The committee will meet again next week to decide which of the proposals should be accepted this year.",
    "de": "Der Ausschuss trifft sich nächste Woche wieder, um zu entscheiden, welche Vorschläge angenommen werden.",
    "fr": "Le comité se réunira la semaine prochaine pour décider quelles propositions devraient être acceptées.",
}


def test_rows_of_other_languages_are_dropped_and_short_ones_kept(tmp_path):
    given_rows = rows(*[(text, "x") for text in TEXTS.values()], ("Bonjour", "oui"), ("2 + 2 * 7 = ?" * 8, "28"))
    kept = run("language", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "out")
    assert questions(kept) == [TEXTS["en"], "Bonjour", "2 + 2 * 7 = ?" * 8]
    assert kept.metrics["languages"] == {"unknown": 2, "en": 1, "de": 1, "fr": 1}
    assert [(r["source"], r["rule"], r["reason"]) for r in dropped(kept)] == [
        ("rows.jsonl:2", "language", "its language is 'de'"),
        ("rows.jsonl:3", "language", "its language is 'fr'"),
    ]
    both = run("language", {"pool": pool(tmp_path / "pool", given_rows)}, tmp_path / "both", languages=["en", "fr"])
    assert both.metrics["dropped"] == {"language": 1}


def test_language_that_no_row_has_and_unknown_language(tmp_path):
    made = pool(tmp_path / "pool", rows((TEXTS["de"], "x")))
    with pytest.raises(DataError, match=r"the rule 'language' dropped 1 of 1 .* add their language to `languages`"):
        run("language", {"pool": made}, tmp_path / "out")
    with pytest.raises(DataError, match="'english' is not a language that can be identified"):
        run("language", {"pool": made}, tmp_path / "out", languages=["english"])


@pytest.mark.parametrize(
    ("stage", "module", "config"),
    [("language", "py3langid.langid", {}), ("deduplicate", "rensa", {}), ("score", "phonenumbers", {})],
)
def test_missing_library_names_the_extra(tmp_path, monkeypatch, stage, module, config):
    def load(name, needed_by):
        if name == module:
            from cogumi.core.packages import missing

            raise missing(ModuleNotFoundError(name=name), needed_by)
        return __import__(name, fromlist=["x"])

    for place in ("language", "sketches", "personal_data"):
        monkeypatch.setattr(f"cogumi.data.curation.{place}.load", load)
    made = pool(tmp_path / "pool", rows(("Call +49 30 901820", "x")))
    with pytest.raises(PackageError, match=rf"needs the package '{module}': pip install 'cogumi\[data\]'"):
        run(stage, {"pool": made}, tmp_path / "out", **config)


LONG = "how many people live in the largest city on the longest river of the smallest continent that has one"


def write(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs), "utf-8")
    return path


def test_rows_that_share_text_with_the_reported_files_are_dropped(tmp_path):
    write(tmp_path / "test.jsonl", [("Capital of Chad?", "N'Djamena"), (f"Tell me {LONG}.", "5 million")])
    given_rows = rows(
        ("capital  of CHAD?", "x"),
        ("Capital of Peru?", "Lima"),
        ("Guess!", f"Please say {LONG.upper()} today"),
        ("Guess?", " ".join(LONG.split()[:12])),
    )
    kept = run(
        "decontaminate",
        {"pool": pool(tmp_path / "pool", given_rows)},
        tmp_path / "out",
        root=tmp_path,
        files=["test.jsonl"],
    )
    assert questions(kept) == ["Capital of Peru?", "Guess?"]
    assert [(r["rule"], r["reason"]) for r in dropped(kept)] == [
        ("same_question", "its question is that of test.jsonl:1"),
        ("shared_words", "shares 13 words with test.jsonl:2: 'how many people live in the largest city ...'"),
    ]
    assert kept.metrics["reference_rows"] == 2


def test_words_of_a_template_are_no_evidence(tmp_path):
    template = "answer the following question by choosing one of the options that are given below"
    write(tmp_path / "test.jsonl", [(f"{template}: question {i}", "A") for i in range(12)])
    made = {"pool": pool(tmp_path / "pool", rows((f"{template}: another", "B"), ("Who?", "I")))}
    kept = run("decontaminate", made, tmp_path / "out", root=tmp_path, files=["test.jsonl"])
    assert kept.metrics["rows"] == 2
    kept = run("decontaminate", made, tmp_path / "out", root=tmp_path, files=["test.jsonl"], common=12)
    assert kept.metrics["dropped"] == {"shared_words": 1}


def test_splits_made_before_are_references_without_their_training_set(tmp_path):
    asked = rows(*[(f"Question number {i}?", str(i)) for i in range(100)])
    data = run("split", {"pool": pool(tmp_path / "old", asked)}, tmp_path / "data")
    train = len(read_examples(split_path(data.path, "train")))
    inputs = {"pool": pool(tmp_path / "new", asked), "against_data": data}
    assert run("decontaminate", inputs, tmp_path / "out").metrics["rows"] == train
    other = {"pool": inputs["pool"], "against_pool": pool(tmp_path / "few", asked[:10])}
    assert run("decontaminate", other, tmp_path / "two").metrics["rows"] == 90


def test_decontamination_needs_references(tmp_path):
    assert decontaminate.needs(decontaminate.Config(), ["pool"]) == {"against_*": "examples|pool"}
    assert decontaminate.needs(decontaminate.Config(files=["a"]), ["pool"]) == {}
    made = pool(tmp_path / "pool", rows(("a?", "b")))
    (tmp_path / "bad.jsonl").write_text("3\n")
    with pytest.raises(DataError, match=r"bad\.jsonl has no usable row to compare with"):
        run("decontaminate", {"pool": made}, tmp_path / "out", root=tmp_path, files=["bad.jsonl"])
    write(tmp_path / "same.jsonl", [("a?", "b")])
    with pytest.raises(DataError, match=r"'same_question' dropped 1 of 1 .* the pool is the reference itself"):
        run("decontaminate", {"pool": made}, tmp_path / "out", root=tmp_path, files=["same.jsonl"])


def mixture(tmp_path):
    made = [row(f"Math {i}?", "x" * 9, i, "math", 1 + i % 5) for i in range(40)]
    return pool(tmp_path / "pool", made + [row(f"Code {i}?", "y" * 90, i, "code") for i in range(20)])


def test_quotas_are_met_exactly_and_drawn_with_the_seed(tmp_path):
    made = mixture(tmp_path)
    kept = run("mix", {"pool": made}, tmp_path / "out", quotas={"math": 7, "code": 5})
    assert kept.metrics["groups"] == {"code": 5, "math": 7}
    assert kept.metrics["dropped"] == {"quota": 48}
    assert kept.metrics["token_shares"]["code"] > 0.5
    order = questions(made)
    assert questions(kept) == sorted(questions(kept), key=order.index)
    again = run("mix", {"pool": made}, tmp_path / "again", quotas={"math": 7, "code": 5})
    assert (again.path / POOL).read_bytes() == (kept.path / POOL).read_bytes()
    other = run("mix", {"pool": made}, tmp_path / "other", seed=1, quotas={"math": 7, "code": 5})
    assert questions(other) != questions(kept)
    more = run("mix", {"pool": made}, tmp_path / "more", quotas={"math": 9})
    assert {q for q in questions(kept) if q.startswith("Math")} < set(questions(more))
    assert more.metrics["dropped"] == {"quota": 31, "no_quota": 20}


def test_mixing_by_difficulty_ease_and_source(tmp_path):
    made = mixture(tmp_path)
    assert run("mix", {"pool": made}, tmp_path / "a", by="difficulty", quotas={1: 3, 5: 2}).metrics["groups"] == {
        "1": 3,
        "5": 2,
    }
    assert run("mix", {"pool": made}, tmp_path / "b", preset="easy-hard", total=20).metrics["groups"] == {
        "easy": 8,
        "hard": 12,
    }
    found = run("mix", {"pool": made}, tmp_path / "c", by="source", quotas={"rows.jsonl": 4})
    assert found.metrics["groups"] == {"rows.jsonl": 4}


def test_quotas_that_cannot_be_met_are_one_error_before_any_work(tmp_path):
    made = mixture(tmp_path)
    with pytest.raises(DataError) as caught:
        run("mix", {"pool": made}, tmp_path / "out", quotas={"math": 10, "code": 1500})
    assert str(caught.value) == (
        "quotas cannot be met: 'code' has 20 of 1,500 rows; add rows, lower these quotas, or set `total: 20` for the "
        "same shares"
    )
    assert not (tmp_path / "out" / POOL).exists()
    kept = run("mix", {"pool": made}, tmp_path / "out", quotas={"math": 10, "code": 1500}, total=20)
    assert sum(kept.metrics["groups"].values()) == 20
    with pytest.raises(DataError, match=r"'tools' has 0 of 1 rows; the pool's groups by domain are 'math', 'code'"):
        run("mix", {"pool": made}, tmp_path / "out", quotas={"tools": 1})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "give either `quotas` or a `preset`"),
        ({"quotas": {"a": 1}, "preset": "plan-60k"}, "give either `quotas` or a `preset`"),
        ({"preset": "plan60k"}, "there is no preset 'plan60k': did you mean 'plan-60k'?"),
        ({"quotas": {"a": 0}}, "a quota is at least 1"),
    ],
)
def test_bad_quotas_are_refused(config, says):
    with pytest.raises(ValidationError, match=re.escape(says)):
        mix.Config(**config)


def test_presets_have_the_sizes_of_their_names():
    assert sum(mix.Config(preset="corpus-600k").wanted.values()) == 600_000
    assert sum(mix.Config(preset="plan-60k").wanted.values()) == 60_000


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 10_000))
def test_shares_add_up_to_the_total_and_are_closest(shares, total):
    found = mix.apportion(shares, total)
    assert sum(found.values()) == total
    whole = sum(shares.values())
    assert all(abs(found[name] - share * total / whole) < 1 for name, share in shares.items())


def test_plans_know_the_rows_that_are_left():
    given_rows = Given("x", Path(), {"pool": Input("pool", (RowFacts(1000, 50, 10, 30.0),))})
    assert mix.estimate(mix.Config(quotas={"a": 30}), given_rows).facts == (RowFacts(30, 50, 10, 30.0),)
    assert decontaminate.estimate(decontaminate.Config(), given_rows).facts == (RowFacts(1000, 50, 10, 30.0),)


def test_rows_of_a_split_group_are_in_one_set(tmp_path):
    made = [row(f"Question {i}?", str(i), i, **{SPLIT_GROUP: f"g{i // 4}"}) for i in range(400)]
    data = run("split", {"pool": pool(tmp_path / "pool", made)}, tmp_path / "data")
    places = Counter((e.meta[SPLIT_GROUP], name) for name in SPLITS for e in read_examples(split_path(data.path, name)))
    assert set(places.values()) == {4}


def test_report_shows_the_waterfall_with_samples(tmp_path):
    pairs = [(text, "mail me@uni-jena.de") for text in TEXTS.values()]
    first = pool(tmp_path / "pool", rows(*pairs, ("What | is <this>?", "y")))
    second = run("language", {"pool": first}, tmp_path / "language")
    scores = run("score", {"pool": second}, tmp_path / "scores")
    third = run(
        "filter",
        {"pool": second, "statistics": scores},
        tmp_path / "filter",
        length={"min": 6, "max": 50, "unit": "words"},
        offensive={},
        personal_data={},
    )
    inputs = {"raw": first, "english": second, "good": third}
    report = run("curation_report", inputs, tmp_path / "report", steps=["raw", "english", "good"])
    page = (report.path / "report.md").read_text("utf-8")
    assert "1 of 4 rows are kept (25.0%)" in page
    assert "| english | language | 2 |  |  | 2 |" in page
    assert "| good | length | 1 | 1 | 1 | 1 |" in page
    assert "| good | offensive | 0 | 0 | 0 | 1 |" in page
    assert "- its language is 'de': Der Ausschuss" in page
    assert "What \\| is &lt;this>?" in page
    assert "Personal data is redacted in 1 rows of good." in page
    assert (report.path / "curation.png").stat().st_size > 5_000
    assert report.metrics["kept"] == 0.25
    with pytest.raises(DataError, match="'raw' is not a step of curation"):
        run("curation_report", inputs, tmp_path / "wrong", steps=["english", "raw", "good"])
    with pytest.raises(DataError, match=r"'good' did not read the rows of 'raw': list `steps` in their order"):
        run("curation_report", inputs, tmp_path / "wrong", steps=["raw", "good"])


def test_recipe_of_the_page_runs_on_files(tmp_path):
    recipe = re.findall(r"^```yaml\n(name:.*?)^```", PAGE, re.M | re.S)[0]
    (tmp_path / "curated.yaml").write_text(recipe, "utf-8")
    (tmp_path / "questions").mkdir()
    (tmp_path / "reported").mkdir()
    topics = [f"{a} {b}" for a in ("rivers", "towns", "birds", "laws") for b in ("of Peru", "in spring", "at sea")]
    pairs = [
        (f"What should one know about the {topic} number {i}?", f"The {topic} are old and well worth {i} visits.")
        for i, topic in enumerate(topics * 10)
    ]
    write(tmp_path / "questions" / "travel.jsonl", [*pairs, pairs[0], (TEXTS["de"], "ja"), pairs[3]])
    write(tmp_path / "questions" / "sums.jsonl", [(f"{i} + {i * i}?", str(i + i * i)) for i in range(80)])
    write(tmp_path / "reported" / "test.jsonl", [pairs[1]])
    planned = command("plan", tmp_path / "curated.yaml", "--check")
    assert planned.returncode == 0, planned.stderr
    done = command("build", tmp_path / "curated.yaml", "--runs", tmp_path / "runs", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    home = tmp_path / "runs" / "curated"
    assert "rows are kept" in (home / "report.md").read_text("utf-8")
    assert (home / "curation.png").is_file()
    report = json.loads((home / "report.json").read_text())
    assert report["dropped"]["unique"] == {"duplicate": 2}
    assert report["dropped"]["clean"] == {"same_question": 1}
    assert report["dropped"]["english"]["language"] >= 1
    assert artifact.load(home / "data").metrics["rows"]["train"] > 0


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", [(f"Question {i}?", "x") for i in range(5)])
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nseed: 1\nsteps:\n"
        "  - {name: pool, stage: load, config: {files: {a: [rows.jsonl]}}}\n"
        "  - {name: unique, stage: deduplicate, inputs: {pool: pool}}\n"
    )
    from cogumi.core.errors import CogumiError
    from cogumi.data.curation.pool_writer import PoolWriter
    from cogumi.pipeline.build import build
    from cogumi.pipeline.recipe import load_recipe

    def full(self, line):
        with open("/dev/full", "w", buffering=1) as file:
            file.write(line)

    monkeypatch.setattr(PoolWriter, "keep", full)
    with pytest.raises(
        CogumiError, match=r"^step 'unique': the disk is full while writing .*unique .*free space and run"
    ):
        build(load_recipe(str(tmp_path / "mine.yaml")), tmp_path / "runs", jobs=1)

"""Stages `score` and `filter`: each rule on real wordings, decisions from statistics, a reference model, resuming."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import DataError
from cogumi.core.stage import CHECKPOINT
from cogumi.core.types import Artifact, Request
from cogumi.data.curation import boilerplate, coherence, copyright, length, offensive, personal_data, score
from cogumi.data.curation.filter import Config
from cogumi.data.examples import POOL, read_examples
from cogumi.engine.llama.engine import LlamaEngine
from support.pico import make_model
from support.pools import dropped, pool, questions, row, rows, run


def reason(rule, value, values=(), **settings):
    return rule.judge(rule.Settings(**settings), values)(value)


def test_length_in_words_and_tokens():
    value = length.measure(row("one two", "three")) | {"tokens": 7}
    assert reason(length, value, min=3, max=3, unit="words") is None
    assert reason(length, value, min=8, max=9) == "7 tokens, fewer than 8"
    assert reason(length, value, min=0, max=2, unit="words") == "3 words, more than 2"
    with pytest.raises(ValidationError, match="min 5 is larger than max 4"):
        length.Settings(min=5, max=4)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("As an AI language model, I cannot do that.", "says 'As an AI language model'"),
        ("as a large language model I ...", None),
        ("Please click here to read more.", "says 'click here'"),
        ("You need to enable JavaScript to run this app.", "says 'enable JavaScript'"),
        ("JavaScript runs in browsers; enable it with care.", None),
        ("and so say all of us\n" * 4 + "one line that is different", "60% of the lines repeat another"),
        ("and so say all of us\n" * 2 + "".join(f"line {i} of this poem\n" for i in range(9)), None),
        ("if a {\n    b = 1;\n}\n" * 9, None),
    ],
)
def test_boilerplate(answer, says):
    assert reason(boilerplate, boilerplate.measure(row("Why?", answer))) == says


def test_a_corrected_text_repeats_the_one_in_the_question():
    program = "".join(f"the line number {i} of it\n" for i in range(9))
    fixed = program.replace("number 4", "number four")
    assert reason(boilerplate, boilerplate.measure(row(f"Correct this:\n{program}", fixed))) is None
    assert reason(boilerplate, boilerplate.measure(row(f"Shorten this:\n{program}{program}", "Nine lines.")))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Copyright (c) 2019 Somebody", "Copyright (c)"),
        ("© 2020 ACME. All rights reserved.", "© 2"),
        ("# SPDX-License-Identifier: MIT", "SPDX-License-Identifier:"),
        ("The copyright of a song lasts for 70 years.", None),
        ("Choose (c) or (d).", None),
    ],
)
def test_copyright_notices(answer, found):
    said = reason(copyright, copyright.measure(row("Why?", answer)))
    assert (said is None) == (found is None)
    assert found is None or said.startswith(f"has the notice '{found}")


@pytest.mark.parametrize(
    ("licences", "allowed", "says"),
    [
        (["MIT"], ["mit", "apache-2.0"], None),
        (["cc-by-nc-4.0"], ["mit"], "has the licence 'cc-by-nc-4.0'"),
        (["mit", "gpl-3.0"], ["MIT "], "has the licence 'gpl-3.0'"),
        (None, ["mit"], "its source names no licence"),
        (None, ["mit", "unknown"], None),
        (["cc-by-nc-4.0"], None, None),
        (None, None, None),
    ],
)
def test_licences_of_sources(licences, allowed, says):
    one = row("Why?", "Because.", **({"licence": licences} if licences else {}))
    assert reason(copyright, copyright.measure(one), licences=allowed) == says
    with pytest.raises(ValidationError):
        copyright.Settings(licences=[])


def test_offensive_words_are_whole_words():
    assert reason(offensive, offensive.measure(row("Why?", "What a Bastard."))) == "says 'bastard'"
    for innocent in ("Scunthorpe", "a shitake mushroom", "Dick Turpin", "pricked finger", "assess the class"):
        assert offensive.measure(row("Why?", innocent)) == []


def test_worst_share_is_dropped():
    values = [i / 10 for i in range(10)] + [None]
    judged = [reason(coherence, value, values, drop=0.2) for value in values]
    assert [bool(said) for said in judged] == [False] * 8 + [True] * 2 + [False]
    assert judged[9] == f"perplexity {math.exp(0.9):.1f}, above {math.exp(0.7):.1f} of the best 80%"
    assert reason(coherence, 3.0, [None]) is None


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_never_more_than_the_share_is_dropped(values, drop):
    judged = coherence.judge(coherence.Settings(drop=drop), values)
    assert sum(judged(value) is not None for value in values) <= drop * len(values) + 1e-9


PERSONAL = [
    ("Write to jane.doe+spam@mail.uni-jena.de, please.", ["e-mail address"], "Write to <e-mail address>, please."),
    ("Write to someone@example.com or root@localhost.", [], None),
    ("def f(a): return a @ b", [], None),
    ("Call +49 30 901820 today.", ["telephone number"], "Call <telephone number> today."),
    ("Call (650) 253-0000 today.", ["telephone number"], "Call <telephone number> today."),
    ("Pi is 3.14159265358979, e is 2.718281828.", [], None),
    ("In 1999-12-31 there were 1,234,567,890 of 6502530000.", [], None),
    ("Count: 1 2 3 4 5 6 7 8 9 10.", [], None),
    ("IBAN DE89 3704 0044 0532 0130 00 it is.", ["bank account number"], "IBAN <bank account number> it is."),
    ("IBAN DE88 3704 0044 0532 0130 00 it is.", [], None),
    ("Card 4111 1111 1111 1111!", ["card number"], "Card <card number>!"),
    ("Card 4111 1111 1111 1112!", [], None),
    ("SSN 536-22-8726.", ["social security number"], "SSN <social security number>."),
    ("SSN 666-22-8726.", [], None),
    ("Ask 8.8.8.8 or 127.0.0.1 or 192.168.1.1.", ["IP address"], "Ask <IP address> or 127.0.0.1 or 192.168.1.1."),
    ("key AKIAIOSFODNN7EXAMPLE end", ["key"], "key <key> end"),
    ("ghp_" + "a1B2" * 9, ["key"], "<key>"),
    ("-----BEGIN RSA PRIVATE KEY-----", ["key"], "<key>"),
    ("a@b.org and c@d.org", ["e-mail address"] * 2, "<e-mail address> and <e-mail address>"),
]


@pytest.mark.parametrize(("text", "kinds", "redacted"), PERSONAL, ids=[text for text, *_ in PERSONAL])
def test_personal_data_is_found_and_redacted(text, kinds, redacted):
    found = personal_data.find(text, "US")
    assert [kind for kind, *_ in found] == kinds
    example = row(text, text)
    clean = personal_data.redact(example, personal_data.measure(example, "US"))
    assert clean.messages[0].content == clean.answer == (redacted or text)
    assert (clean.id == example.id) == (redacted is None)


def test_national_telephone_numbers_need_their_region():
    text = "Ruf an: 030 901820."
    assert personal_data.find(text, "US") == []
    assert [kind for kind, *_ in personal_data.find(text, "DE")] == ["telephone number"]


@given(st.text(max_size=80) | st.text(alphabet="0123456789+-(). @abAK", max_size=60))
def test_pieces_found_are_in_order_and_do_not_overlap(text):
    ends = [0]
    for _, begin, end in personal_data.find(text, "US"):
        assert ends[-1] <= begin < end <= len(text)
        ends.append(end)


GOOD = "The river flows from the mountains to the sea and passes three towns on its way."
ROWS = rows(
    ("Where does it flow?", GOOD),
    ("Who are you?", f"As an AI language model I know: {GOOD}"),
    ("What is it?", "Water."),
    ("And the law?", "All rights reserved."),
    ("Whom do I ask?", f"Ask jane@uni-jena.de. {GOOD}"),
)
SETTINGS = {
    "length": {"min": 5, "max": 100, "unit": "words"},
    "boilerplate": {},
    "copyright": {},
    "offensive": {},
    "personal_data": {},
}


@pytest.fixture
def scored(tmp_path):
    made = pool(tmp_path / "pool", ROWS)
    return {"pool": made, "statistics": run("score", {"pool": made}, tmp_path / "scores")}


def test_rows_are_dropped_with_their_reasons_and_effects_are_counted(scored, tmp_path):
    reports = []
    kept = run("filter", scored, tmp_path / "out", progress=lambda *report: reports.append(report), **SETTINGS)
    assert reports[-1] == (5, 5, {"dropped": 3})
    assert questions(kept) == ["Where does it flow?", "Whom do I ask?"]
    assert [(r["source"], r["rule"], r["reason"]) for r in dropped(kept)] == [
        ("rows.jsonl:2", "boilerplate", "says 'As an AI language model'"),
        ("rows.jsonl:3", "length", "4 words, fewer than 5"),
        ("rows.jsonl:4", "copyright", "has the notice 'All rights reserved'"),
    ]
    assert kept.metrics["redacted"] == 1
    assert read_examples(kept.path / POOL)[1].answer.startswith("Ask <e-mail address>.")
    assert kept.metrics["effects"]["length"] == {"alone": 1, "only": 1}
    strict = run("filter", scored, tmp_path / "strict", **SETTINGS | {"length": {"min": 7, "max": 90, "unit": "words"}})
    assert strict.metrics["effects"]["copyright"] == {"alone": 1, "only": 0}
    assert strict.metrics["dropped"] == {"length": 2, "boilerplate": 1}


def test_effects_are_those_of_running_without_the_rule(scored, tmp_path):
    settings = SETTINGS | {"length": {"min": 7, "max": 90, "unit": "words"}, "personal_data": {"action": "drop"}}
    whole = run("filter", scored, tmp_path / "whole", **settings)
    for number, rule in enumerate(settings):
        rest = {name: value for name, value in settings.items() if name != rule}
        without = run("filter", scored, tmp_path / f"without{number}", **rest)
        alone = run("filter", scored, tmp_path / f"alone{number}", **{rule: settings[rule]})
        assert without.metrics["rows"] - whole.metrics["rows"] == whole.metrics["effects"][rule]["only"]
        assert len(dropped(alone)) == whole.metrics["effects"][rule]["alone"]


def test_personal_data_can_drop_rows(scored, tmp_path):
    kept = run("filter", scored, tmp_path / "out", personal_data={"action": "drop"})
    (only,) = dropped(kept)
    assert (only["source"], only["reason"]) == ("rows.jsonl:5", "holds: e-mail address")


def test_rule_that_leaves_nothing_is_named_with_a_remedy(scored, tmp_path):
    with pytest.raises(DataError) as caught:
        run("filter", scored, tmp_path / "out", length={"min": 500, "max": 600, "unit": "words"})
    assert str(caught.value) == (
        f"no row is left: the rule 'length' dropped 5 of 5 ({tmp_path / 'out' / 'dropped.jsonl'} lists them); "
        "lower `min` or raise `max` of `length`"
    )


def test_statistics_of_another_pool_are_refused(scored, tmp_path):
    for other in (ROWS[:3], [*ROWS, row("One more?", GOOD)], ROWS[::-1]):
        with pytest.raises(DataError, match="statistics are those of another pool"):
            run(
                "filter", scored | {"pool": pool(tmp_path / f"pool{len(other)}", other)}, tmp_path / "out", offensive={}
            )


def test_rules_that_need_a_model_say_so(scored, tmp_path):
    with pytest.raises(DataError, match=r"no model has measured coherence: give step `score` the input `reference`"):
        run("filter", scored, tmp_path / "out", coherence={})
    with pytest.raises(DataError, match=r"no model has measured length in tokens: .* or count in `unit: words`"):
        run("filter", scored, tmp_path / "out", length={})


def test_filter_without_a_rule_is_refused():
    with pytest.raises(ValidationError, match="name at least one rule: length, boilerplate, copyright"):
        Config()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    export_model(make_model(root / "model"), root / "model.gguf")
    return Artifact("gguf", root, "model")


def test_reference_model_measures_tokens_and_coherence(reference, tmp_path):
    long = row("Tell everything.", "word " * 2000, 9)
    made = pool(tmp_path / "pool", [*ROWS, long])
    inputs = {"pool": made, "reference": reference}
    scores = run("score", inputs, tmp_path / "scores", context=256)
    found = [json.loads(line) for line in (scores.path / score.STATISTICS).read_text().splitlines()]
    engine = LlamaEngine(reference.path / "model.gguf", slots=1, context=256, threads=1, lookup=False)
    for example, values in zip(ROWS, found, strict=False):
        expected = engine.score(Request(messages=example.messages), example.answer)
        assert values["coherence"] == pytest.approx(expected.nats / expected.tokens, abs=1e-4)
        assert values["length"]["tokens"] > values["length"]["words"]
    engine.close()
    assert found[-1]["coherence"] is None
    assert scores.metrics["warnings"] == ["1 answers do not fit the reference model's context and are not scored"]
    kept = run("filter", {"pool": made, "statistics": scores}, tmp_path / "out", coherence={"drop": 0.4})
    worst = sorted(found[:-1], key=lambda one: -one["coherence"])[:2]
    assert {r["id"] for r in dropped(kept)} == {one["id"] for one in worst}


def test_interrupted_scoring_continues_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "CHUNK", 2)
    made, counted = pool(tmp_path / "pool", ROWS), Counter()
    measure = length.measure
    monkeypatch.setattr(length, "measure", lambda example: counted.update([example.id]) or measure(example))

    def stop(done, total, figures):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("score", {"pool": made}, tmp_path / "out", progress=stop)
    assert len(list((tmp_path / "out" / CHECKPOINT).iterdir())) == 2
    again = run("score", {"pool": made}, tmp_path / "out")
    assert set(counted.values()) == {1}
    whole = run("score", {"pool": made}, tmp_path / "whole")
    assert (again.path / score.STATISTICS).read_bytes() == (whole.path / score.STATISTICS).read_bytes()

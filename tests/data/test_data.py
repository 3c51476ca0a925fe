"""Stages `load` and `split`: usable rows are kept, rejected rows listed, and each question is in one set only."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core import artifact
from cogumi.core.errors import DataError
from cogumi.core.estimate import Given
from cogumi.core.stage import Context
from cogumi.core.types import Example, Message
from cogumi.data import load as load_stage
from cogumi.data import split as split_stage
from cogumi.data.examples import (
    POOL,
    SPLITS,
    example_id,
    is_easy,
    level,
    level_title,
    normalised_question,
    read_examples,
    split_of,
    split_path,
    to_line,
    write_examples,
)
from cogumi.data.sources.question_files import Rejected, Seen, iterate, load
from support.public_data import public_data

TEXT = st.text(alphabet=st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.builds(Message, ROLES, TEXT), max_size=4).map(tuple)
EXAMPLES = st.builds(
    Example, TEXT, TEXT, st.integers(0, 5), MESSAGES, TEXT, TEXT, st.dictionaries(TEXT, JSON, max_size=3)
)
ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
}


def context(root, seed=0):
    return Context(seed, 1, root, lambda done, total, figures: None)


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@given(st.lists(EXAMPLES, max_size=5))
def test_examples_round_trip_through_files(folder, examples):
    path = folder / "examples.jsonl"
    assert write_examples(path, examples) == len(examples)
    assert read_examples(path) == examples


def test_failed_write_keeps_the_old_file(tmp_path):
    path = split_path(tmp_path, "train")
    good = Example("1", "d", 1, (Message("user", "q"),), "a")
    write_examples(path, [good])
    with pytest.raises(UnicodeEncodeError):
        write_examples(path, [good, Example("2", "d", 1, (), "\ud800")])
    assert read_examples(path) == [good]
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_split_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    write_examples(path, [Example("1", "d", 1, (), "a")])
    with open(path, "a") as file:
        file.write('{"id": 1}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        read_examples(path)
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="unknown split 'test'"):
        split_path(tmp_path, "test")


def test_ids_are_stable_and_depend_on_the_content():
    question = (Message("user", "q"),)
    assert example_id("d", question) == "381c2d14675b14c8"
    others = [
        ("e", question),
        ("d", (Message("system", "q"),)),
        ("d", (Message("user", "q "),)),
        ("d", question * 2),
    ]
    assert len({example_id(*other) for other in others} | {example_id("d", question)}) == 5


def test_jsonl_and_json_array_formats_are_read(tmp_path):
    rows = [
        ALPACA,
        {"instruction": "Add", "input": "1 2", "response": "3", "domain": "math", "difficulty": 2},
        {**CHAT, "check": {"kind": "numeric"}},
    ]
    examples, rejected = load(write(tmp_path / "a.jsonl", *rows), domain="mine")
    assert not rejected
    assert [e.messages[-1].content for e in examples] == ["Say hi", "Add\n\n1 2", "2+2?"]
    assert [e.answer for e in examples] == ["hi", "3", "4"]
    assert [e.domain for e in examples] == ["mine", "math", "mine"]
    assert [e.difficulty for e in examples] == [0, 2, 0]
    assert [e.source for e in examples] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert examples[2].messages[0] == Message("system", "Be brief.")
    assert examples[2].meta == {"check": {"kind": "numeric"}}
    array = tmp_path / "a.json"
    array.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode())
    as_array, rejected = load(array, domain="mine")
    assert not rejected
    assert [e.id for e in as_array] == [e.id for e in examples]
    assert [e.source for e in as_array] == ["a.json:2", "a.json:7", "a.json:14"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"instruction": "a", \n', "not JSON"),
        ("nonsense\n", "not JSON"),
        ("[" * 100_000 + "\n", "recursion"),
        ("9" * 5_000 + "\n", "digits"),
        ("3\n", "a row must be a JSON object"),
        ({"colour": "a"}, "no form fits a row with 'colour'"),
        ({"prompt": "a"}, "there is no answer"),
        ({"instruction": "a"}, "there is no answer"),
        ({"instruction": "a", "output": " "}, "output is empty"),
        ({"instruction": ["x"], "output": "a"}, "instruction is missing or not a text"),
        ({"instruction": "a", "output": ["x"]}, "output is missing or not a text"),
        ({**ALPACA, "output": "\ud800"}, "surrogate"),
        ({**ALPACA, "domain": ["x"]}, "domain must"),
        ({**ALPACA, "difficulty": 6}, "difficulty must"),
        ({**ALPACA, "difficulty": True}, "difficulty must"),
        ({**ALPACA, "check": {"kind": "magic"}}, "check must"),
        ({**ALPACA, "check": {"kind": "code"}}, "lacks tests"),
        ({"messages": []}, "no form fits a row with 'messages'"),
        ({"messages": CHAT["messages"][:2]}, "there is no answer to it"),
        ({"messages": CHAT["messages"][2:]}, "must end with"),
        ({"messages": "hi"}, "no form fits a row with 'messages'"),
        ({"messages": [3]}, "must be a list of objects"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "role 'judge' is not one of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role .* is not one of"),
        ({"messages": [CHAT["messages"][1], {"role": "assistant", "content": None}]}, "content is empty"),
    ],
)
def test_invalid_row_is_listed_with_its_reason_and_skipped(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", ALPACA, "\n", row, CHAT)
    examples, rejected = load(path)
    assert len(examples) == 2
    (only,) = rejected
    assert (only.file, only.line) == (str(path), 3)
    assert str(only).startswith(f"{path}:3: ")
    assert re.search(reason, only.reason)


def test_lines_that_are_not_utf8_are_listed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ALPACA).encode() + b'\n{"instruction": "\xff", "output": "a"}\n')
    assert "not UTF-8" in load(path)[1][0].reason


@given(st.lists(st.one_of(st.just(json.dumps(ALPACA).encode()), st.binary(max_size=40)), max_size=6))
def test_invalid_lines_never_abort_a_load_and_are_counted(folder, lines):
    lines = [json.dumps(CHAT).encode(), *(line.replace(b"\n", b"?").replace(b"\r", b"?") for line in lines)]
    path = folder / "garbage.jsonl"
    path.write_bytes(b"\n".join(lines))
    examples, rejected = load(path)
    good = lines.count(json.dumps(ALPACA).encode()) + 1
    assert len(examples) == good
    assert len(rejected) == sum(1 for line in lines if line.strip()) - good


@given(st.lists(st.tuples(TEXT, TEXT), max_size=6), st.sampled_from([None, 0, 3]), st.booleans())
def test_json_array_of_any_text_is_read_completely(folder, pairs, indent, ascii_only):
    rows = [{"instruction": f"x{a}", "output": f"y{b}"} for a, b in pairs]
    path = folder / "array.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    got = list(iterate(path))
    assert [(e.messages[0].content, e.answer) for e in got] == [(r["instruction"], r["output"]) for r in rows]


@given(st.binary(max_size=60))
def test_invalid_json_array_never_aborts_a_load(folder, garbage):
    path = folder / "broken.json"
    path.write_bytes(b"[" + json.dumps(CHAT).encode() + b"," + garbage + b",]")
    rows = list(iterate(path))
    assert isinstance(rows[0], Example)
    assert any(isinstance(row, Rejected) for row in rows[1:])


def test_invalid_array_element_does_not_affect_its_neighbours(tmp_path):
    good = json.dumps(ALPACA)
    path = tmp_path / "a.json"
    path.write_text(f'[\n{good},\n{{"instruction": [1}},\n{good},\n,\n{good}}}\n,{good}')
    rows = list(iterate(path))
    assert [(type(row), row.line) for row in rows if isinstance(row, Rejected)] == [
        (Rejected, line) for line in (3, 5, 6, 7)
    ]
    assert len([row for row in rows if isinstance(row, Example)]) == 3


def test_json_array_longer_than_a_chunk_is_split_between_elements(tmp_path, monkeypatch):
    monkeypatch.setattr("cogumi.data.sources.layouts._CHUNK", 7)
    rows = [{"instruction": f'"{i}\\\\" ]}},é\n', "output": "\\" * i + "x"} for i in range(40)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [e.answer for e in load(path)[0]] == [row["output"] for row in rows]


def test_input_without_a_usable_row_is_refused(tmp_path):
    for text, message in (
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("[]", "is empty"),
        ("x\ny\n", "2 were rejected"),
        ("question,answer\n2+2?,4\n", "docs/your-data.md shows the forms that are read"),
        (json.dumps({"data": []}), "no form fits a row with 'data'"),
        (json.dumps({"question": "2+2?"}), "there is no answer"),
    ):
        with pytest.raises(DataError, match=message):
            load(write(tmp_path / "a.jsonl", text))
    for encoding, message in (("latin-1", "not UTF-8 text"), ("utf-16", "save it as UTF-8")):
        (tmp_path / "a.jsonl").write_text('{"question": "Où?", "answer": "là"}', encoding)
        with pytest.raises(DataError, match=message):
            load(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of these kinds"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="no file fits the pattern"):
        load(tmp_path / "*.nothing")


@given(st.lists(TEXT, max_size=30), st.integers(0, 3))
def test_set_of_a_question_does_not_depend_on_its_formatting(questions, seed):
    shares = dict.fromkeys(SPLITS, 1)
    for question in questions:
        one, other = (Message("user", question),), (Message("user", f"  {question}\n"),)
        name = split_of(normalised_question(one), shares, seed)
        assert name in SPLITS
        assert split_of(normalised_question(other), shares, seed) == name


def loaded(folder, files, root):
    """The output of stage `load` for these files, as an artifact."""
    folder.mkdir(exist_ok=True)
    metrics = load_stage.run(load_stage.Config(files=files), {}, folder, context(root))
    return artifact.finish(folder, kind=load_stage.KIND, fingerprint="0", parents={}, metrics=metrics, environment={})


def split(folder, pool, root, seed=0, **shares):
    folder.mkdir(exist_ok=True)
    return split_stage.run(split_stage.Config(**shares), {"pool": pool}, folder, context(root, seed))


def test_load_and_split_make_five_disjoint_sets(tmp_path):
    rows = [{"instruction": f"Question {i % 400}", "output": str(i)} for i in range(600)]
    uppercase = [{"instruction": f"QUESTION  {i}", "output": "!"} for i in range(400)]
    write(tmp_path / "a.jsonl", *rows, "broken\n")
    write(tmp_path / "b.jsonl", *uppercase)
    pool = loaded(tmp_path / "pool", {"one": ["a.jsonl"], "two": ["b.jsonl"]}, tmp_path)
    found = {name: pool.metrics[name] for name in ("rows", "domains", "rejected")}
    assert found == {"rows": 1000, "domains": {"one": 600, "two": 400}, "rejected": 1}
    (listed,) = [json.loads(line) for line in (pool.path / load_stage.REJECTED_FILE).read_text().splitlines()]
    assert (listed["line"], listed["file"]) == (601, str(tmp_path / "a.jsonl"))
    out = tmp_path / "out"
    metrics = split(out, pool, tmp_path)
    sets = {name: read_examples(split_path(out, name)) for name in SPLITS}
    assert metrics["rows"] == {name: len(rows) for name, rows in sets.items()}
    assert metrics["domains"] == {"one": 400, "two": 400}
    assert metrics["warnings"] == ["200 rows repeat a question and are left out; 200 of them have another answer"]
    assert len({e.id for rows in sets.values() for e in rows}) == sum(metrics["rows"].values()) == 800
    questions = [{normalised_question(e.messages) for e in rows} for rows in sets.values()]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 400
    split(tmp_path / "again", pool, tmp_path)
    assert all(split_path(out, n).read_bytes() == split_path(tmp_path / "again", n).read_bytes() for n in SPLITS)
    split(tmp_path / "again", pool, tmp_path, seed=1)
    assert split_path(out, "train").read_bytes() != split_path(tmp_path / "again", "train").read_bytes()


def test_set_depends_on_the_hash_of_the_question(tmp_path):
    """Sets equal those of a direct pass over the files, so a step between `load` and `split` moves no other row."""
    rows = [{"instruction": f"Naïve {i}?", "output": str(i), "difficulty": i % 6} for i in range(200)]
    path = write(tmp_path / "a.jsonl", *rows, {**CHAT, "check": {"kind": "numeric"}})
    shares = {"train": 3, "selection": 1, "fit": 2, "threshold": 2, "heldout": 2}
    expected = dict.fromkeys(SPLITS, "")
    for example in load(path, "one")[0]:
        expected[split_of(normalised_question(example.messages), shares, 4)] += to_line(example)
    pool = loaded(tmp_path / "pool", {"one": ["a.jsonl"]}, tmp_path)
    split(tmp_path / "all", pool, tmp_path, seed=4, **shares)
    assert {name: split_path(tmp_path / "all", name).read_text("utf-8") for name in SPLITS} == expected
    kept = [example for example in read_examples(pool.path / POOL) if example.difficulty != 3]
    write_examples(pool.path / POOL, kept)
    split(tmp_path / "some", pool, tmp_path, seed=4, **shares)
    for name in SPLITS:
        left = [line for line in expected[name].splitlines() if '"difficulty": 3' not in line]
        assert split_path(tmp_path / "some", name).read_text("utf-8").splitlines() == left


def test_load_and_split_refuse_too_few_examples(tmp_path):
    write(tmp_path / "a.jsonl", ALPACA)
    write(tmp_path / "b.jsonl", "broken\n")
    pool = loaded(tmp_path / "pool", {"one": ["a.jsonl"]}, tmp_path)
    with pytest.raises(DataError, match="1 usable rows leave nothing for"):
        split(tmp_path / "out", pool, tmp_path)
    with pytest.raises(DataError, match="no usable row; 1 were rejected"):
        loaded(tmp_path / "none", {"one": ["b.jsonl"]}, tmp_path)
    assert '"line": 1' in (tmp_path / "none" / load_stage.REJECTED_FILE).read_text()


@pytest.mark.parametrize(
    ("name", "usable", "rejected"),
    [
        ("alpaca_subset/claude_t45.json", 5301, 4),
        ("alpaca_subset/dolly_3k.json", 2996, 0),
        ("gpteacher/codegen-instruct.json", 4535, 0),
        ("codealpaca/code_alpaca_2k.json", 2015, 2),
        ("llamafactory_demo/alpaca_en_demo.json", 999, 0),
    ],
)
def test_every_row_of_public_files_is_accepted_or_listed(name, usable, rejected):
    path = public_data(name)
    rows = list(iterate(path))
    assert len(rows) == len(json.loads(path.read_text()))
    assert sum(isinstance(row, Example) for row in rows) == usable
    assert sum(isinstance(row, Rejected) for row in rows) == rejected


def test_truncated_public_file_is_read_up_to_its_last_line():
    path = public_data("multihop_reading/musique_test.jsonl")
    rows = list(iterate(path))
    assert len(rows) == len(path.read_bytes().splitlines())
    assert "not JSON" in rows[-1].reason
    assert all("there is no answer" in row.reason for row in rows[:-1])


def test_forms_of_rows_and_columns_that_are_not_used(tmp_path):
    check = {"kind": "numeric"}
    own = {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4", "meta": {"check": check, "topic": "sums"}}
    rows = [
        {"question": "2+2?", "answer": "4", "colour": "red"},
        {"instruction": "2+2?", "output": "4", "difficulty": None, "response": "5"},
        own,
        CHAT | {"check": check},
    ]
    seen = Seen()
    found = list(iterate(write(tmp_path / "rows.jsonl", *rows), "math", seen))
    assert all(isinstance(row, Example) for row in found)
    assert {row.answer for row in found} == {"4"}
    assert [row.check["kind"] for row in found] == ["exact", "exact", "numeric", "numeric"]
    assert found[2].meta == {"check": check, "topic": "sums"}
    assert {row.difficulty for row in found} == {0}
    assert seen.unused == {"colour": 1, "response": 1}
    assert seen.forms == {"question": 1, "instruction": 1, "messages": 2}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "2+2?"}, "there is no answer"),
        ({"messages": [{"role": "user", "content": "x"}], "answer": " "}, "content is empty"),
        ({"messages": 3, "answer": "4"}, "no form fits"),
        ({"question": "x", "answer": "y", "meta": 3}, "meta must be an object"),
        ({"question": "x", "answer": "y", "meta": {"check": {"kind": "vague"}}}, "kind is one of exact"),
        ({"text": "x"}, "gives no question"),
        ({"question": "x", "answer": "four", "check": {"kind": "numeric"}}, "without a number"),
        (
            {"question": "x", "answer": "E", "check": {"kind": "choice", "options": ["a", "b"]}},
            "not one of the options",
        ),
    ],
)
def test_unusable_row_is_rejected_with_its_reason(row, reason, tmp_path):
    (found,) = iterate(write(tmp_path / "rows.jsonl", row))
    assert reason in found.reason


def test_rows_of_a_build_are_read_as_they_were_written(tmp_path):
    examples = [
        Example(example_id("math", (Message("user", "2+2?"),)), "math", 2, (Message("user", "2+2?"),), "4", "f:1")
    ]
    write_examples(tmp_path / "heldout.jsonl", examples)
    (found,) = iterate(tmp_path / "heldout.jsonl")
    assert (found.id, found.domain, found.difficulty, found.messages, found.answer) == (
        examples[0].id,
        "math",
        2,
        examples[0].messages,
        "4",
    )


def test_load_warns_of_columns_and_rejected_rows(tmp_path):
    write(tmp_path / "rows.jsonl", ALPACA | {"topic": "x"}, ALPACA | {"instruction": "Say ho", "topic": "y"}, "3\n")
    config = load_stage.Config(files={"a": [Path("rows.jsonl")]})
    found = load_stage.run(config, {}, tmp_path, context(tmp_path))
    assert found["unused_columns"] == {"topic": 2}
    assert [line.partition(":")[0] for line in found["warnings"]] == [
        "1 rows rejected, all of them in rejected.jsonl of this step, the first",
        "columns not used",
    ]
    notes = load_stage.estimate(config, Given("pool", tmp_path)).notes
    assert list(notes) == found["warnings"]


def test_an_answer_that_the_domains_grader_cannot_use_is_rejected(tmp_path):
    write(tmp_path / "rows.jsonl", {"question": "3 + 4?", "answer": "7"}, {"question": "5 + 2?", "answer": "seven"})
    config = load_stage.Config(files={"sums": [Path("rows.jsonl")]}, graders={"sums": "numeric"})
    found = load_stage.run(config, {}, tmp_path, context(tmp_path))
    assert (found["rows"], found["rejected"]) == (1, 1)
    assert "rows.jsonl:2: numeric check without a number" in found["warnings"][0]
    assert "the grader of the domain 'sums'" in found["warnings"][0]


def test_level_of_a_question_and_what_is_easy():
    def of(difficulty, **meta):
        return Example("1", "math", difficulty, (Message("user", "x"),), "y", "", meta)

    refused = {"check": {"kind": "abstain"}}
    assert [level(one) for one in (of(3), of(0), of(0, **refused), of(3, **refused))] == ["3", "none", "0", "0"]
    assert [level_title(key) for key in ("3", "none", "0")] == ["level 3", "no level", "unanswerable"]
    assert [is_easy(of(2), 2, right) for right in (True, False)] == [True, True]  # a level decides
    assert [is_easy(of(3), 2, right) for right in (True, False)] == [False, False]
    assert [is_easy(of(0), 2, right) for right in (True, False)] == [True, False]  # else the base's answer
    assert not is_easy(of(0, **refused), 2, True)

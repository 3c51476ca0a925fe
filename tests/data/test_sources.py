"""Rows in the forms, layouts and containers of real files."""

import csv
import gzip
import io
import json
import tarfile
import zipfile
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.types import Example, Message
from cogumi.data.sources.question_files import Reading, Rejected, Seen, iterate, load
from support.public_data import public_data

USER, GPT = {"role": "user", "content": "w?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "SF"}'}}


def read(path, row, reading=None):
    """The examples of one row, and what was seen."""
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    seen = Seen()
    return list(iterate(path, "d", seen, reading)), seen


FORMS = {
    "dolly": (
        {"instruction": "When?", "context": "It began in 2000.", "response": "2000", "category": "qa"},
        [("user", "When?\n\nIt began in 2000.")],
        "2000",
    ),
    "openorca": (
        {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        [("system", "Be brief."), ("user", "2+2?")],
        "4",
    ),
    "alpaca with system and history": (
        {"system": "In French.", "instruction": "Capital?", "input": "", "output": "Paris", "history": [["Hi", "Ho"]]},
        [("system", "In French."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Capital?")],
        "Paris",
    ),
    "no input": ({"instruction": "Name one.", "input": "<noinput>", "output": "Red"}, [("user", "Name one.")], "Red"),
    "No Input.": ({"instruction": "Name one.", "input": "No Input.", "output": "Red"}, [("user", "Name one.")], "Red"),
    "number as output": ({"instruction": "2+2", "output": 4}, [("user", "2+2")], "4"),
    "empty output, other response": ({"instruction": "2+2", "output": None, "response": "4"}, [("user", "2+2")], "4"),
    "short answer beside a model's output": (
        {"instruction": "8?", "input": "", "output": "A: it is 32", "answer": "8.0"}, [("user", "8?")], "8.0",
    ),
    "capital names": ({"Instruction": "a", "Output": "1"}, [("user", "a")], "1"),
    "sharegpt": (
        {"system": "Be brief", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        [("system", "Be brief"), ("user", "Hi")],
        "Ho",
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, GPT]}, [("user", "Hi")], "4",
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief"}, USER, GPT]},
        [("system", "Be brief"), ("user", "w?")],
        "4",
    ),
    "roles in capitals": (
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Ho"}]},
        [("user", "Hi")],
        "Ho",
    ),
    "prompt and completion": ({"prompt": "Q", "completion": "A<|endoftext|>"}, [("user", "Q")], "A"),
    "conversational prompt": ({"prompt": [USER], "completion": [GPT]}, [("user", "w?")], "4"),
    "result of a tool": (
        {"messages": [USER, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "72F"}, GPT]},
        [("user", "w?"), ("assistant", "call"), ("user", "Result of the tool: 72F")],
        "4",
    ),
    "drop": ({"context": "83. Answer:", "completion": " 83", "ref_text": "83"}, [("user", "83. Answer:")], "83"),
    "titled text": ({"title": "Owls", "text": "Owls fly."}, [("user", 'Write the text "Owls".')], "Owls fly."),
    "hh": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        [("user", "Hi")],
        "Ho",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_rows(tmp_path, name):
    row, messages, answer = FORMS[name]
    (found,), seen = read(tmp_path / "a.jsonl", row)
    assert isinstance(found, Example), found
    assert [(m.role, m.content) for m in found.messages] == messages
    assert found.answer == answer
    assert seen.unused == ({"category": 1} if name == "dolly" else {})


CHECKS = {
    "gsm8k": ({"question": "How many?", "answer": "48/2 = 24\n#### 24"}, {"kind": "numeric"}),
    "mbpp": (
        {"text": "Add.", "code": "f = abs", "test_list": ["assert f(1) == 1"], "test_setup_code": "import math"},
        {"kind": "code", "tests": ["import math", "assert f(1) == 1"]},
    ),
    "bbh": (
        {"input": "Which?\nOptions:\n(A) Louis\n(B) Gwen", "target": "(B)"},
        {"kind": "choice", "options": ["Louis", "Gwen"]},
    ),
    "bbh yes": ({"input": "Is it?", "target": "Yes"}, {"kind": "choice", "options": ["Yes", "No"]}),
    "strategyqa": ({"question": "Is it?", "answer": False}, {"kind": "choice", "options": ["Yes", "No"]}),
    "mmlu": (
        {"question": "2+2?", "choices": ["3", "4"], "answer": 1}, {"kind": "choice", "options": ["3", "4"]},
    ),
    "arc": (
        {"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"},
        {"kind": "choice", "options": ["3", "4"]},
    ),
    "several answers": (
        {"question": "Who?", "answer": ["Ann", "Anne"]}, {"kind": "short_answer", "answers": ["Ann", "Anne"]},
    ),
    "unanswerable": ({"question": "Who?", "answer": None, "answerable": False}, {"kind": "abstain"}),
    "bfcl": (
        {"id": "x", "question": [[USER]], "function": [TOOL], "ground_truth": [{"f": {"a": [1]}}]},
        {"kind": "tool_call", "possible": [{"f": {"a": [1]}}]},
    ),
    "bfcl irrelevance": (
        {"id": "irrelevance_0", "question": [[USER]], "function": [TOOL]}, {"kind": "tool_call", "possible": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_known_sets_bring_their_checks(tmp_path, name):
    row, check = CHECKS[name]
    (found,), _ = read(tmp_path / "a.jsonl", row)
    assert isinstance(found, Example), found
    assert found.meta["check"] == check


def test_tables_give_a_question_for_each_answer(tmp_path):
    row = {
        "table": {"table": [["", "2019"], ["Sales", "$1.5"]]},
        "paragraphs": [{"text": "In millions."}],
        "questions": [
            {"question": "Sales?", "answer": 1.5, "answer_type": "arithmetic", "scale": "million"},
            {"question": "Growth?", "answer": "-5.2", "answer_type": "arithmetic", "scale": "percent"},
            {"question": "Unit?", "answer": ["millions"], "answer_type": "span", "scale": ""},
        ],
    }
    found, _ = read(tmp_path / "a.jsonl", row)
    assert [e.answer for e in found] == ["1.5 million", "-5.2%", "millions"]
    assert [e.check["kind"] for e in found] == ["numeric", "numeric", "short_answer"]
    assert found[0].messages[0].content.startswith(" | 2019\nSales | $1.5\n\nIn millions.\n\nSales?")


def test_tools_are_shown_and_calls_are_answers(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]}
    (found,), _ = read(tmp_path / "a.jsonl", row)
    assert found.messages[0].role == "system"
    assert '"name": "weather"' in found.messages[0].content
    assert json.loads(found.answer) == [CALL]
    (again,), _ = read(tmp_path / "a.jsonl", {**row, "tools": json.dumps([TOOL])})
    assert again.messages == found.messages


def test_rejected_answers_are_never_references(tmp_path):
    (found,), _ = read(tmp_path / "a.jsonl", {"messages": [USER, GPT], "label": False})
    assert "label is false" in found.reason
    (found,), _ = read(tmp_path / "a.jsonl", {"messages": [USER, {**GPT, "weight": 0}]})
    assert "weight 0" in found.reason
    for row in (
        {"instruction": "w?", "input": "", "chosen": "4", "rejected": "5"},
        {"prompt": "w?", "chosen": "4", "rejected": "5"},
        {"conversations": [{"from": "human", "value": "w?"}], "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}},
    ):  # fmt: skip
        (found,), seen = read(tmp_path / "a.jsonl", row)
        assert (found.answer, found.meta["rejected"], seen.unused) == ("4", "5", {})


def test_what_cannot_be_used_is_counted_or_refused(tmp_path):
    (found,), seen = read(tmp_path / "a.jsonl", {"messages": [USER, {**GPT, "reasoning_content": "2+2"}]})
    assert found.answer == "4"
    assert seen.unused == {"reasoning_content of a turn": 1}
    _, seen = read(tmp_path / "a.jsonl", {"messages": [USER, GPT, USER]})
    assert seen.unused == {"a last turn of the user": 1}
    (found,), _ = read(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, GPT]})
    assert "only text can be used" in found.reason
    (found,), _ = read(tmp_path / "a.jsonl", {"colour": 1, "size": 2})
    assert "no form fits a row with 'colour', 'size'" in found.reason


def test_columns_can_be_named(tmp_path):
    row = {"Problem": "2+2?", "Rationale": "4", "Story": "Two pairs.", "Level": "easy"}
    columns = {"question": "Problem", "answer": "Rationale", "passage": "Story", "difficulty": "Level"}
    (found,), seen = read(tmp_path / "a.jsonl", row | {"other": 1}, Reading(columns=columns))
    assert (found.messages[0].content, found.answer, found.difficulty) == ("2+2?\n\nTwo pairs.", "4", 1)
    assert seen.unused == {"other": 1}
    (found,), _ = read(tmp_path / "a.jsonl", {"Problem": "x"}, Reading(columns=columns))
    assert "no column 'Rationale': the row has 'Problem'" in found.reason
    for options in ({"columns": {"question": "a"}}, {"columns": {"colour": "a"}}, {"form": "alpca"}, {"layout": "xls"}):
        with pytest.raises(DataError):
            Reading(**options)


@pytest.mark.parametrize(
    ("more", "licences"),
    [
        ({"license": "MIT "}, ["MIT"]),
        ({"licence": ["mit", "gpl-3.0"]}, ["mit", "gpl-3.0"]),
        ({"meta": {"license": "cc0-1.0"}}, ["cc0-1.0"]),
        ({"license": ""}, ["cc-by-4.0"]),
        ({}, ["cc-by-4.0"]),
    ],
)
def test_licences_of_rows_and_of_their_file(tmp_path, more, licences):
    row = {"question": "2+2?", "answer": "4"} | more
    (found,), seen = read(tmp_path / "a.jsonl", row, Reading(licence="cc-by-4.0"))
    assert found.meta["licence"] == licences
    assert not seen.unused
    (found,), _ = read(tmp_path / "a.jsonl", {"question": "2+2?", "answer": "4"})
    assert "licence" not in found.meta
    columns = {"question": "Q", "answer": "A", "licence": "L"}
    (found,), _ = read(tmp_path / "a.jsonl", {"Q": "2?", "A": "2", "L": "mit"}, Reading(columns=columns))
    assert found.meta["licence"] == ["mit"]


def test_a_form_can_be_prescribed(tmp_path):
    row = {"question": "2+2?", "answer": "4", "text": "A text of many words. " * 10}
    (found,), _ = read(tmp_path / "a.jsonl", row, Reading(form="text"))
    assert found.messages[0].content.startswith("Continue this text:")


ROWS = [{"question": f"q{i} é", "answer": f"a{i}"} for i in range(50)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def tar(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def archive(name, content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, content)
    return out.getvalue()


def parquet():
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


FILES = {
    "a.jsonl": lambda: LINES,
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + LINES,
    "a.json": lambda: json.dumps(ROWS).encode(),
    "lines.json": lambda: LINES,
    "object.json": lambda: json.dumps({"version": "[1]", "tags": ["x", "y"], "data": ROWS}).encode(),
    "pretty.json": lambda: json.dumps({"version": 1, "data": ROWS}, indent=2).encode(),
    "a.csv": table,
    "semicolons.csv": lambda: table(";"),
    "a.tsv": lambda: table("\t"),
    "a.parquet": parquet,
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "two.jsonl.gz": lambda: gzip.compress(LINES[: len(LINES) // 2]) + gzip.compress(LINES[len(LINES) // 2 :]),
    "a.csv.gz": lambda: gzip.compress(table()),
    "a.jsonl.zst": lambda: zstandard.compress(LINES),
    "a.tar.gz": lambda: tar(("d/a.jsonl", LINES), ("d/README", b"no rows"), ("d/.hidden.jsonl", LINES)),
    "wrong-name.json.gz": lambda: tar(("a.jsonl", LINES)),
    "a.zip": lambda: archive("a.jsonl", LINES),
}


@pytest.mark.parametrize("name", FILES)
def test_layouts_and_containers(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    examples, rejected = load(tmp_path / name)
    assert [(e.messages[0].content, e.answer) for e in examples] == [(r["question"], r["answer"]) for r in ROWS]
    assert not rejected


def test_folders_and_patterns(tmp_path):
    for name in ("a.jsonl", "b.csv", "inner/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(FILES[{"b.csv": "a.csv", "inner/c.json": "a.json"}.get(name, name)]())
    (tmp_path / "notes.docx").write_bytes(b"x")
    assert len(load(tmp_path)[0]) == 150
    assert len(load(tmp_path / "*.*")[0]) == 100 + 0
    assert len(load(tmp_path / "**/c.*")[0]) == 50


def rejected_by(path):
    return [row for row in iterate(path) if isinstance(row, Rejected)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.parquet", "a.tar.gz"])
def test_a_truncated_file_gives_its_rows_and_one_line(tmp_path, name):
    whole = FILES[name]()
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    rows = list(iterate(tmp_path / name))
    assert isinstance(rows[-1], Rejected)
    assert "is it complete?" in rows[-1].reason
    assert all(isinstance(row, Example) for row in rows[:-2])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "object.json"])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_short_file_that_is_cut_off_gives_all_complete_rows(tmp_path, name, share):
    """The whole file is shorter than what is decompressed at once."""
    packed = gzip.compress(FILES[name]())
    whole = packed[: int(share * len(packed))]
    (tmp_path / f"{name}.gz").write_bytes(whole)
    before = zlib.decompressobj(31).decompress(whole)
    complete = before.count(b'"}') if "json" in name else before.count(b"\n") - 1
    rows = [row for row in iterate(tmp_path / f"{name}.gz") if isinstance(row, Example)]
    assert [row.answer for row in rows] == [row["answer"] for row in ROWS[: len(rows)]]
    assert complete - 1 <= len(rows) <= complete > 0
    (bad,) = rejected_by(tmp_path / f"{name}.gz")
    assert "is it complete?" in bad.reason
    assert bad.line == {"a.jsonl": len(rows) + 1, "a.csv": len(rows) + 2}.get(name, 2)  # the JSON files are one line


def test_gzip_members_may_be_filled_up_with_zeros(tmp_path):
    half = len(LINES) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(LINES[:half]) + bytes(512) + gzip.compress(LINES[half:]) + bytes(9)
    )
    assert len(load(tmp_path / "a.jsonl.gz")[0]) == 50
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES) + b"more")
    (bad,) = rejected_by(tmp_path / "a.jsonl.gz")
    assert bad.line == 51


@given(
    name=st.sampled_from(["a.zip", "a.tar.gz", "a.jsonl.gz", "a.jsonl.zst", "a.tar"]),
    at=st.floats(0, 1),
    cut=st.booleans(),
)
def test_a_damaged_file_is_never_read_as_a_whole_one(folder, name, at, cut):
    whole = gzip.decompress(FILES["a.tar.gz"]()) if name == "a.tar" else FILES[name]()
    place = min(int(at * len(whole)), len(whole) - 1)
    damaged = whole[:place] if cut else whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
    (folder / name).write_bytes(damaged)
    rows = list(iterate(folder / name))
    examples = [(row.messages[0].content, row.answer) for row in rows if isinstance(row, Example)]
    if cut and examples != [(row["question"], row["answer"]) for row in ROWS]:
        assert any(isinstance(row, Rejected) for row in rows) or not damaged


def test_bad_archives_and_tables(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tar(("../evil.jsonl", LINES), ("a.jsonl", LINES)))
    (bad,) = rejected_by(tmp_path / "a.tar.gz")
    assert "names a path outside of itself" in bad.reason
    (tmp_path / "a.csv").write_text('question,answer\n2+2?,4\n1+1?,2,3\n"open,4\n')
    reasons = [(row.line, row.reason) for row in rejected_by(tmp_path / "a.csv")]
    assert reasons[0] == (3, "3 cells, but the first line names 2 columns")
    assert "not a row of the table" in reasons[1][1]
    assert len(load(tmp_path / "a.csv")[0]) == 1
    (tmp_path / "mixed.csv").write_bytes("question,answer\nOù?,là\n".encode("latin-1") + "Où?,là\n".encode())
    (bad,) = rejected_by(tmp_path / "mixed.csv")
    assert "not UTF-8" in bad.reason
    (tmp_path / "object.json").write_text('{\n"a": 1,\n"b": [1, 2]}')
    (bad,) = rejected_by(tmp_path / "object.json")
    assert "holds no list of rows" in bad.reason


def test_a_row_that_is_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("cogumi.data.sources.layouts.MAX_ROW", 100)
    long = json.dumps({"question": "x" * 300, "answer": "y"}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(LINES + long + LINES)
    rows = list(iterate(tmp_path / "a.jsonl"))
    assert len(rows) == 101
    assert (rows[50].line, "longer than" in rows[50].reason) == (51, True)


def test_plain_texts_become_pairs(tmp_path):
    text = "\n".join(["# Owls", "Owls are birds.", "", "# Cats", "Cats are not.", ""])
    (tmp_path / "a.md").write_text(text)
    found = list(iterate(tmp_path / "a.md"))
    assert [e.messages[0].content for e in found] == ['Write the text "Owls".', 'Write the text "Cats".']
    (tmp_path / "b.txt").write_text("\n\n".join(f"Paragraph {i} " + "word " * 50 for i in range(20)))
    found = list(iterate(tmp_path / "b.txt"))
    assert 2 <= len(found) <= 5
    assert all(e.messages[0].content.startswith("Continue this text:") for e in found)
    code = 'def f(x):\n    """Add one to x."""\n    return x + 1\n\n\ndef g():\n    pass\n'
    (tmp_path / "c.py").write_text(code)
    (found,) = iterate(tmp_path / "c.py")
    assert found.messages[0].content == "Write a Python function.\n\ndef f(x)\n\nAdd one to x."
    assert found.answer.startswith("def f(x):")


def test_bfcl_finds_the_right_calls_beside_it():
    rows = list(iterate(public_data("bfcl/BFCL_v4_parallel.json")))
    assert len(rows) == 200
    assert all(isinstance(row, Example) and row.check["possible"] for row in rows)


USABLE = {
    "gsm8k/test.jsonl": (1319, 0),
    "mbpp/mbpp.jsonl": (974, 0),
    "mbpp/sanitized-mbpp.json": (427, 0),
    "bbh/word_sorting.json": (250, 0),
    "bfcl/BFCL_v4_irrelevance.json": (240, 0),
    "llamafactory_demo/kto_en_demo.json": (150, 150),
    "llamafactory_demo/dpo_en_demo.json": (300, 0),
    "llamafactory_demo/glaive_toolcall_en_demo.json": (300, 0),
    "multihop_reading/drop_test.jsonl": (None, 0),
    "self_instruct/seed_tasks.jsonl": (None, 0),
    "strategyqa/dev.json": (229, 0),
    "t0_mix/t0_mix.jsonl.gz": (None, None),
    "mmlu/abstract_algebra_test.csv": (100, 0),
    "metamath/GSM8K_Backward.jsonl": (None, 0),
    "truthfulqa/TruthfulQA.csv": (None, 0),
    "alpaca_subset/koala_test_set.jsonl": (0, None),
}


@pytest.mark.parametrize("name", USABLE)
def test_public_files(name):
    rows = list(iterate(public_data(name)))
    usable = sum(isinstance(row, Example) for row in rows)
    wanted, rejected = USABLE[name]
    if wanted is not None:
        assert usable == wanted
    else:
        assert usable > 100
    if rejected is not None:
        assert len(rows) - usable == rejected, next(row for row in rows if isinstance(row, Rejected))


WORDS = """question answer messages instruction output choices table questions chosen function source target text
test_list code instances context tools history difficulty meta"""
NAMES = st.sampled_from(WORDS.split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_any_row_is_an_example_or_rejected(folder, row):
    found, _ = read(folder / "any.jsonl", row)
    assert found
    for one in found:
        assert isinstance(one, Rejected) or (one.answer.strip() and isinstance(one.messages[-1], Message))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")

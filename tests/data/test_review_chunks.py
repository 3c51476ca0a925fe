"""Chunks for outside review: nothing is lost or mixed up on the way out and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.core.errors import DataError
from cogumi.data.review_chunks import SUMMARY, join, split


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("review")


def review(out, order=lambda rows: rows):
    """Verdicts of every chunk: the output of the line, so that a mix-up is seen."""
    for path in sorted(out.glob("chunk_*_model.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        verdicts = [{"id": row["id"], "said": row["output"]} for row in rows]
        lines(path.with_name(path.name.replace("model", "verdict")), order(verdicts))


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([None, 120, 1000]), st.booleans(), st.randoms())
def test_verdicts_come_back_to_their_lines(tmp_path_factory, count, chunks, largest, with_ids, random):
    folder = tmp_path_factory.mktemp("r")
    tests = [{"question": f"q{i}", **({"id": f"x{i}"} if with_ids else {})} for i in range(count)]
    models = [{"output": f"o{i}"} for i in range(count)]
    summary = split(lines(folder / "a", tests), lines(folder / "b", models), folder / "out", chunks, largest)
    files = sorted((folder / "out").glob("*.jsonl"))
    if largest:
        assert max(path.stat().st_size for path in files) <= largest
    else:
        assert [chunk["lines"] for chunk in summary["chunks"][:-1]] == [chunks] * ((count - 1) // chunks)
    review(folder / "out", lambda rows: random.sample(rows, len(rows)))
    found = join(folder / "out", strict=True)
    assert [row["example"]["question"] for row in found.rows] == [f"q{i}" for i in range(count)]
    assert [row["verdict"]["said"] for row in found.rows] == [row["output"]["output"] for row in found.rows]
    assert [row["output"]["output"] for row in found.rows] == [f"o{i}" for i in range(count)]


@pytest.fixture
def chunked(tmp_path):
    tests, models = [{"id": i, "q": i} for i in range(6)], [{"output": i} for i in range(6)]
    split(lines(tmp_path / "a.jsonl", tests), lines(tmp_path / "b.jsonl", models), tmp_path / "out", 3)
    review(tmp_path / "out")
    return tmp_path / "out"


def test_missing_and_foreign_verdicts_are_named(chunked):
    verdict = chunked / "chunk_001_verdict.jsonl"
    lines(verdict, [{"id": "0", "said": 0}, {"id": "77", "said": 0}])
    (chunked / "chunk_002_verdict.jsonl").unlink()
    found = join(chunked)
    assert ([row["id"] for row in found.rows], found.missing, found.foreign) == (
        ["0"],
        ["1", "2", "3", "4", "5"],
        ["77"],
    )
    with pytest.raises(DataError, match=r"5 lines have no verdict, the first is id 1; leave out --strict"):
        join(chunked, strict=True)


def test_changed_files_are_refused(chunked):
    model = chunked / "chunk_001_model.jsonl"
    original = model.read_text()
    model.write_text("".join(reversed(original.splitlines(keepends=True))))
    with pytest.raises(DataError, match=r"chunk_001_model.jsonl:1 has id 2, but 0 was written"):
        join(chunked)
    model.write_text(original.splitlines(keepends=True)[0])
    with pytest.raises(DataError, match="has 1 lines, but 3 were written"):
        join(chunked)
    model.write_text(original)
    verdict = chunked / "chunk_001_verdict.jsonl"
    for rows, message in (([{"id": "0"}] * 2, "a second verdict for id 0"), ([{"said": 1}], "has no id")):
        lines(verdict, rows)
        with pytest.raises(DataError, match=message):
            join(chunked)
    (chunked / SUMMARY).write_text("{}")
    with pytest.raises(DataError, match="is no folder of `cogumi data split`"):
        join(chunked)


@pytest.mark.parametrize(
    ("tests", "models", "message"),
    [
        ([{"id": 1}], [{"id": 2}], "line 1: a.jsonl has id 1, b.jsonl has id 2"),
        ([{"id": 1}, {"id": 1}], [{}, {}], "the id 1 is repeated"),
        ([{"q": 1}], [{}, {}], "a.jsonl has 1 lines, b.jsonl 2"),
        ([], [], "has 0 lines"),
        ([3], [{}], "a.jsonl:1 is no JSON object"),
    ],
)
def test_files_that_do_not_pair_are_refused(tmp_path, tests, models, message):
    with pytest.raises(DataError, match=message):
        split(lines(tmp_path / "a.jsonl", tests), lines(tmp_path / "b.jsonl", models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands(tmp_path):
    a, b = (
        lines(tmp_path / "a.jsonl", [{"id": i} for i in range(9)]),
        lines(tmp_path / "b.jsonl", [{"output": i} for i in range(9)]),
    )
    done = CliRunner().invoke(app, ["data", "split", str(a), str(b), str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "chunk_002" in done.stdout
    assert "chunk_003" not in done.stdout
    review(tmp_path / "out")
    done = CliRunner().invoke(app, ["data", "join", str(tmp_path / "out"), str(tmp_path / "joined.jsonl"), "--json"])
    assert json.loads(done.stdout) == {"joined": 9, "missing": [], "foreign": []}
    assert len((tmp_path / "joined.jsonl").read_text().splitlines()) == 9
    again = CliRunner().invoke(app, ["data", "split", str(a), str(b), str(tmp_path / "out")])
    assert "is not empty" in str(again.exception)
    large = CliRunner().invoke(
        app, ["data", "split", str(a), str(b), str(tmp_path / "new"), "--largest", "5KB", "--lines", "2"]
    )
    assert large.exit_code == 2
    with pytest.raises(DataError, match="more than a chunk may have"):
        split(a, b, tmp_path / "new", largest=3)

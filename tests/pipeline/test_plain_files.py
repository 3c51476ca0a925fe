"""The recipe of docs/your-data.md, run as it stands on plain question files and a pico model, and its table of rows."""

import json
import random
import re
from pathlib import Path

import pytest

import cogumi
from cogumi.confidence.guarantee import trials_needed
from cogumi.data.examples import read_examples
from cogumi.data.sources.question_files import load
from cogumi.grading.checks import CHECKS
from support.cli import cogumi as command
from support.pico import make_model

PAGE = (Path(cogumi.__file__).parents[2] / "docs" / "your-data.md").read_text("utf-8")
RECIPE = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)[0]
LONG = 90
"""Repeated words of the longest question: more tokens than the 256 that engines once had at most."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with question files without checks and levels, a model, and the finished build."""
    folder = tmp_path_factory.mktemp("plain")
    make_model(folder / "model")
    (folder / "questions").mkdir()
    draw = random.Random(0)
    names = ["".join(draw.choices("bdfgklmnprst", k=6)) for _ in range(200)]
    capitals = [
        {"question": f"What is the capital of {name}?", "answer": name[:3], "region": "south"} for name in names
    ]
    capitals[3]["question"] += " Please." * LONG
    sums = [{"instruction": f"What is {i} + {i // 3}?", "output": str(i + i // 3)} for i in range(200)]
    for name, rows in (("capitals", capitals), ("sums", sums)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "questions" / f"{name}.jsonl").write_text(text, "utf-8")
    (folder / "mine.yaml").write_text(re.sub(r"steps: \d+", "steps: 2", RECIPE), "utf-8")
    planned = command("plan", folder / "mine.yaml", "--check")
    done = command("build", folder / "mine.yaml", "--runs", folder / "runs", "--jobs", "1")
    return folder, planned, done


def test_what_plan_accepts_build_finishes(built):
    folder, planned, done = built
    assert planned.returncode == 0, planned.stderr
    assert done.returncode == 0, done.stderr
    assert "pool: columns not used: 'region' (200 rows)" in done.stderr
    assert "Not certified" in done.stdout
    page = (folder / "runs" / "mine" / "report.md").read_text("utf-8")
    assert "Not certified" in page
    assert "promise holds" not in page
    assert "level 0" not in page


def test_questions_without_a_level_are_not_unanswerable(built):
    folder, _, _ = built
    report = json.loads((folder / "runs" / "mine" / "report.json").read_text("utf-8"))
    levels = {level for cells in report["accuracy"].values() for row in cells.values() for level in row}
    assert levels == {"none"}
    assert report["gate"]["certified"] is False


def test_heldout_questions_of_the_build_can_be_evaluated(built):
    folder, _, _ = built
    heldout = folder / "runs" / "mine" / "data" / "heldout.jsonl"
    wrong = {"question": "How many?", "answer": "none", "check": {"kind": "numeric"}}
    long = {"question": "word " * 20_000, "answer": "a"}
    (folder / "asked.jsonl").write_text(
        heldout.read_text("utf-8") + "".join(json.dumps(row) + "\n" for row in (wrong, long, {"question": 3}))
    )
    bundle, out = folder / "runs" / "mine" / "bundle", folder / "answers.jsonl"
    found = json.loads(command("eval", bundle, "--data", folder / "asked.jsonl", "--out", out, "--json").stdout)
    examples, _ = load(heldout)
    assert [e.id for e in examples] == [e.id for e in read_examples(heldout)]
    assert found["n"] == len(examples)
    assert sum(row["n"] for row in found["domains"].values()) == found["n"]
    low, high = found["interval"]
    assert low <= found["correct"] / found["n"] <= high
    assert [len(found["rejected"]), len(found["failed"])] == [2, 1]
    assert any("numeric check without a number" in line for line in found["rejected"])
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert sum(row["correct"] for row in rows) == found["correct"]
    assert {"question", "answer", "output", "p_correct", "accepted", "tier", "domain"} <= rows[0].keys()


def test_bundle_shows_its_promises(built):
    folder, _, _ = built
    shown = command("inspect", folder / "runs" / "mine" / "bundle")
    assert "base: Not certified: " in shown.stdout


def test_page_lists_every_grader():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.split("## Graders")[1].split("##")[0], re.M)
    assert set(CHECKS) <= set(rows)
    for kind in CHECKS:
        check = re.search(rf'^\| `{kind}` .*`({{"kind".*}})` \|$', PAGE, re.M)
        assert set(CHECKS[kind]) < set(json.loads(check[1]))


def test_table_of_rows_is_computed():
    rows = re.findall(r"^\| (\d)% \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.M)
    assert [int(percent) for percent, *_ in rows] == [0, 1, 2, 3]
    for percent, *shown in rows:
        n = 100 if int(percent) else 1
        needed = trials_needed(int(percent), n, 0.05, 0.95)
        assert [int(cell.replace(",", "")) for cell in shown] == [needed, 3 * needed, 15 * needed]

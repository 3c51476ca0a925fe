"""`cogumi plan MODEL --types` and `cogumi adopt --type`: the table, the choice, and one-line errors."""

import json

import pytest
from typer.testing import CliRunner

from cogumi.cli import type_table
from cogumi.cli.main import app
from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import CogumiError
from cogumi.evaluate.bench import type_comparison
from cogumi.evaluate.bench.type_comparison import Comparison, TypeFigures
from support.cli import cogumi, one_line
from support.gguf_rewrite import rewritten
from support.pico import make_model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    found = tmp_path_factory.mktemp("home")
    export_model(make_model(found / "model"), found / "some.gguf", "q4_1")
    (found / "mine.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {i} plus 1?", "answer": str(i + 1)}) + "\n" for i in range(60))
    )
    return found


def row(type, speed, rise, area=0.76, matrices=None):
    rounds = (0.95 * speed, speed, 1.05 * speed)
    error = 0.06 if area else None
    return TypeFigures(
        type, 1_234_567_890, matrices or {type: 211}, rounds, rounds, rounds, 2.913 + rise, rise, 0.004, 1000, 1000,
        (0.9, 1.0), area, error,
    )  # fmt: skip


def found(best_rise=0.01):
    small = {"q5_0": 166, "q4_k": 16, "q8_0": 15, "q6_k": 14}
    return Comparison(
        2,
        (row("q4_1", 1470.0, 0.0), row("q4_k_m", 2440.0, best_rise, matrices=small), row("q4_0", 2980.0, 0.5, None)),
    )


@pytest.fixture
def compared(monkeypatch):
    """Replaces the measurement; collects what it was asked for."""
    asked = []

    def compare(model, types, questions, progress):
        asked.append((model, tuple(types), questions))
        return found()

    monkeypatch.setattr(type_comparison, "compare", compare)
    return asked


def plan(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "100"})


def test_the_table_fits_100_columns_and_says_what_was_chosen(compared, home):
    done = plan(home / "some.gguf", "--types", "--questions", "25")
    assert done.exit_code == 0
    assert compared == [(home / "some.gguf", type_comparison.TYPES, 25)]
    table = [line for line in done.stdout.splitlines() if line.startswith(("│", "┃"))]
    assert len(table) == 4  # a heading and three rows, none of them broken
    assert max(map(len, table)) <= 100
    assert "q4_1 *" in table[1]
    assert "2.913" in table[1]
    assert "+0.010 ±0.004" in table[2]
    assert "2,440 ±5%" in table[2]
    assert "0.76 ±0.06" in table[2]
    assert "1000/1000" in table[2]
    assert "q4_k_m: the rows of 181 of 211 matrices do not fill blocks of 256 values" in done.stdout
    assert "fastest: q4_k_m, 1.66x at 8 streams, of the types faster in every round, whose loss rises" in done.stdout


def test_json_has_every_round(compared, home):
    document = json.loads(plan(home / "some.gguf", "--types", "--json").stdout)
    assert document["fastest"] == "q4_k_m"
    assert document["types"][0]["many"] == pytest.approx([0.95 * 1470, 1470, 1.05 * 1470])
    assert document["types"][2]["auroc"] is None
    assert compared[0][2] == type_comparison.QUESTIONS


def test_check_looks_at_the_disk_only(home, monkeypatch):
    assert plan(home / "some.gguf", "--types", "--check").stdout.endswith("the disk has room\n")
    monkeypatch.setattr(type_comparison, "missing_room", lambda model, types: "no room for it")
    done = plan(home / "some.gguf", "--types", "--check")
    assert (done.exit_code, done.stderr) == (1, "no room for it\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.gguf", "--types"), "there is no model 'nowhere.gguf'"),
        (("some.gguf", "--types", "--disk", "1GB"), "leave out --disk, --ram and the like"),
        (("some.gguf", "--questions", "9"), "--questions is for --types"),
        (("empty", "--types"), "has no config.json"),
        (("strange.gguf", "--types"), "llama.cpp could not quantize"),
    ],
)
def test_what_cannot_be_measured_is_one_line(home, words, message, monkeypatch):
    monkeypatch.chdir(home)
    (home / "empty").mkdir(exist_ok=True)
    if not (home / "strange.gguf").exists():
        rewritten(home / "some.gguf", home / "strange.gguf", **{"general.architecture": "strange"})
    done = plan(*words)
    assert isinstance(done.exception, CogumiError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_the_choice_of_adopt(compared, home):
    name = str(home / "some.gguf")
    assert type_table.chosen_type(name, None) == (None, None)
    assert compared == []
    assert type_table.chosen_type(name, "fastest")[0] == "q4_k_m"
    assert type_table.chosen_type(name, "q4_0")[0] == "q4_0"
    assert type_table.chosen_type(name, "q4_1")[0] is None
    assert [types for _, types, _ in compared] == [type_comparison.TYPES, ("q4_0",), ("q4_1",)]
    assert "it is not your file byte for byte" in type_table.base_line(found(), "q4_0")
    assert type_table.base_line(found(), None).endswith("the file as it came (q4_1), byte for byte")


def test_without_a_faster_type_the_file_stays(home, monkeypatch):
    monkeypatch.setattr(type_comparison, "compare", lambda *_: found(best_rise=0.4))
    chosen, table = type_table.chosen_type(str(home / "some.gguf"), "fastest")
    assert chosen is None
    assert table.fastest.type == "q4_1"


def test_adopt_requantizes_and_its_recipe_says_so(compared, home, monkeypatch):
    """A real build after a given measurement; the recipe builds the same again."""
    monkeypatch.chdir(home)
    words = ("--out", "runs/mine", "--type", "q4_0", "--modifiers", "none", "--yes", "--jobs", "1", "--json")
    done = CliRunner().invoke(app, ["adopt", "some.gguf", "--data", "mine.jsonl", *words])
    report = json.loads(done.stdout)
    assert report["type"] == "q4_0"
    assert report["types"]["fastest"] == "q4_k_m"
    assert compared[0][1] == ("q4_0",)
    text = (home / "runs" / "mine.yaml").read_text("utf-8")
    assert '{"model": "../some.gguf", "type": "q4_0"}' in text
    assert "# The model, requantized to q4_0: not its own bytes." in text
    bundle = home / "runs" / "mine" / "bundle"
    assert not (bundle / "base.gguf").is_symlink()
    base = json.loads((bundle / "bundle.json").read_text("utf-8"))["description"]["measured"]["base"]
    assert (base["type"], base["requantized_from"]["type"]) == ("q4_0", "q4_1")
    done = CliRunner().invoke(app, ["build", "runs/mine.yaml", "--runs", "runs", "--jobs", "1", "--json"])
    again = json.loads(done.stdout)
    assert again["fingerprint"] == report["fingerprint"]
    assert all(step["skipped"] for step in again["steps"])


def test_adopt_refuses_an_unknown_type_before_any_work(home):
    done = cogumi("adopt", "some.gguf", "--data", "mine.jsonl", "--type", "q4", "--yes", cwd=home, ok=1)
    assert "unknown type 'q4'" in one_line(done)

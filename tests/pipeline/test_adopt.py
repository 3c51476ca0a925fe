"""`cogumi adopt`: from a GGUF file and question files to a calibrated bundle, in one command."""

import json

import pytest
import yaml

import cogumi
from cogumi.compress.gguf.export import export_model
from cogumi.core.files import sha256
from cogumi.core.types import Message, Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import replies
from cogumi.pipeline.adopt import least_accepted, rows_for_promise
from support.cli import cogumi as command
from support.pico import make_model

ROWS = 150
LONG = "Because it is so, and there is nothing more to say about it than that."
FREE_TEXT = [{"question": f"Why {i}?", "answer": LONG} for i in range(9)]
EXACT = {"check": {"kind": "exact"}}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model, and files of two domains; the model is right on every second question of the first."""
    folder = tmp_path_factory.mktemp("adopt")
    export_model(make_model(folder / "model"), folder / "model.gguf")
    questions = [f"What is {i} plus {i % 11}?" for i in range(2 * ROWS)]
    engine = LlamaEngine(folder / "model.gguf", slots=16, context=512, threads=1, lookup=False)
    asked = [Request(messages=(Message("user", q),), max_tokens=256, speculate=False) for q in questions]
    said = [reply.text for reply in replies(engine, asked)]
    engine.close()
    rows = [
        {"question": q, "answer": a if i % 2 and i < ROWS and a.strip() else "other"} | EXACT
        for i, (q, a) in enumerate(zip(questions, said, strict=True))
    ]
    for name, part in (("known", rows[:ROWS]), ("unknown", rows[ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return folder


def adopt(given, *words, data=("known", "unknown"), ok=0):
    files = [word for name in data for word in ("--data", given / f"{name}.jsonl")]
    return command("adopt", given / "model.gguf", *files, "--yes", "--jobs", "1", *words, ok=ok)


@pytest.fixture(scope="module")
def built(given):
    done = adopt(given, "--out", given / "runs" / "mine", "--modifiers", "unknown", "--json")
    assert done.returncode == 0, done.stderr
    return given / "runs", json.loads(done.stdout), done.stderr


def test_the_bundle_is_calibrated_and_ships_the_very_file(built, given):
    runs, report, _ = built
    with cogumi.open(runs / "mine" / "bundle", threads=1) as bot:
        reply = bot.ask("What is 3 plus 4?")
        assert 0 <= reply.p_correct <= 1
        assert bot.adapters == ("unknown",)
    assert sha256(runs / "mine" / "bundle" / "base.gguf") == sha256(given / "model.gguf")
    assert report["modifier_reasons"]["known"] == "no modifier, as asked"
    assert "modifier: " in report["modifier_reasons"]["unknown"]
    assert {"base", "modifier", "cascade"} <= set(report["accuracy"])


def test_the_written_recipe_builds_the_same_bundle_again(built):
    runs, report, _ = built
    recipe = runs / "mine.yaml"
    steps = {step["name"]: step for step in yaml.safe_load(recipe.read_text("utf-8"))["steps"]}
    assert steps["answers"]["inputs"]["modifier_unknown"] == "modifier_unknown_gguf"
    again = command("build", recipe, "--runs", runs, "--jobs", "1", "--json")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["fingerprint"] == report["fingerprint"]
    assert all(step["skipped"] for step in found["steps"])


def test_few_rows_are_no_promise_and_the_number_that_it_takes(given):
    (given / "few.jsonl").write_text(
        "".join((given / "known.jsonl").read_text("utf-8").splitlines(keepends=True)[:60]), "utf-8"
    )
    done = adopt(given, "--out", given / "runs" / "few", "--modifiers", "none", data=("few",))
    assert done.returncode == 0, done.stderr
    assert f"about {rows_for_promise(0.05, 0.5):,} are needed" in " ".join(done.stderr.split())
    assert "Not certified" in done.stdout


def test_the_promise_takes_59_answers_without_an_error():
    """0.95 to the 59th is below 0.05; with a fifth of the rows to test on, that is 295 rows if all are accepted."""
    assert least_accepted(0.05) == 59
    assert rows_for_promise(0.05, 1.0) == 295


def test_other_models_are_refused_before_any_work(given):
    for model, message in (
        ("nowhere.gguf", "there is no model 'nowhere.gguf'"),
        (given / "model", "is a folder, not a .gguf file; make one of it: cogumi convert"),
    ):
        done = command("adopt", model, "--data", given / "known.jsonl", "--yes", ok=1)
        assert done.returncode == 1
        assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"question": "What?"}], "no usable row"),
        (
            [
                {"question": f"Why {i}?", "answer": "Because it is so, and nobody can say more about it than this."}
                for i in range(9)
            ],
            "no grader can judge",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_any_work(given, tmp_path, rows, message):
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    done = command(
        "adopt", given / "model.gguf", "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "out", "--yes", ok=1
    )
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_unknown_domains_are_named(given):
    for option in ("--domains", "--modifiers"):
        done = adopt(given, "--out", given / "runs" / "other", option, "maths", ok=1)
        assert done.returncode == 1
        assert "no question is of the domain 'maths'" in " ".join(done.stderr.split())

"""What `cogumi adopt` refuses before any work: questions, folders, modifiers that it cannot train."""

import json
import signal
import subprocess
from dataclasses import replace

import pytest

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import CogumiError, DataError, TrainingError
from cogumi.core.files import write_text
from cogumi.core.types import Message, Request
from cogumi.data.sources.survey import Survey, survey
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import replies
from cogumi.pipeline.adopt import adopt, only_adoption
from cogumi.pipeline.adopted_recipe import Adoption
from cogumi.pipeline.adoption_checks import check, room_for_answers, usable_model
from cogumi.pipeline.build import build
from support.cli import COGUMI, cogumi
from support.gguf_rewrite import rewritten
from support.pico import make_model
from support.waiting import PATIENCE

WHY = "Because it is so, and nobody can say more about it than this."


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def sums(count, **more):
    return [{"question": f"What is {i} plus {i % 7}?", "answer": str(i + i % 7)} | more for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("adoption")
    export_model(make_model(found / "model"), found / "some.gguf")
    rewritten(found / "some.gguf", found / "gemma.gguf", general__architecture="gemma")
    write(found / "sums.jsonl", sums(80))
    return found


def plan_of(home, folder, *files, model="some.gguf"):
    return Adoption(
        home.name, str(folder / model), survey(files or [folder / "sums.jsonl"]), home.parent, 0.05, 1, 256, 256
    )


def checked(plan, wanted=None):
    return check(plan, usable_model(plan.model), wanted)


def refused(match, plan, wanted=None, error=CogumiError):
    """The check refuses with one line, and leaves no folder behind."""
    before = {*plan.root.rglob("*")}
    with pytest.raises(error, match=match) as caught:
        checked(plan, wanted)
    assert "\n" not in str(caught.value)
    assert {*plan.root.rglob("*")} == before


def test_ten_questions_are_refused_before_any_work(folder, tmp_path):
    rows = write(tmp_path / "ten.jsonl", sums(10))
    refused(
        "10 different questions cannot be divided into 5 sets; give at least 40", plan_of(tmp_path / "x", folder, rows)
    )


def test_a_model_that_cannot_be_trained_is_adopted_without_modifiers(folder, tmp_path):
    plan = plan_of(tmp_path / "mine", folder, model="gemma.gguf")
    reason = "cannot be trained: it is a gemma; supported: llama, qwen2; llama.cpp may still serve it"
    assert reason in checked(plan)
    assert checked(plan, []) == ""
    refused(f"{reason}: leave out --modifiers", plan, ["sums"], TrainingError)
    assert checked(plan_of(tmp_path / "mine", folder)) == ""


def test_the_reason_is_shown_and_the_build_ends(folder, tmp_path):
    """The base fails every question, often enough for a modifier."""
    rows = write(tmp_path / "many.jsonl", sums(260))
    out = tmp_path / "mine"
    words = ("adopt", folder / "gemma.gguf", "--data", rows, "--out", out, "--yes", "--jobs", "1", "--json")
    done = cogumi(*words)
    (reason,) = json.loads(done.stdout)["modifier_reasons"].values()
    assert reason.startswith("no modifier: ")
    assert "it is a gemma" in reason
    assert "answers: up to 256 tokens" in done.stderr  # the files' answers take 32, this model goes on
    assert (out.parent / "mine.yaml").read_text("utf-8").count("max_tokens: 256") == 3
    assert (out / "bundle" / "bundle.json").is_file()


def test_domains_are_known_and_can_be_graded(folder, tmp_path):
    free = write(tmp_path / "free.jsonl", [{"question": f"Why {i}?", "answer": WHY} for i in range(9)])
    home = tmp_path / "mine"
    refused("no question is of the domain 'maths'", plan_of(home, folder), ["maths"])
    both = plan_of(home, folder, folder / "sums.jsonl", free)
    refused(
        "the answers of 'free' are free text, which no grader can judge; no modifier can be trained", both, ["free"]
    )
    refused("the answers are free text", plan_of(home, folder, free), error=DataError)


def test_a_question_longer_than_the_context_is_named(folder, tmp_path):
    for text in ("word " * 3000, "zq" * 700):  # the second one has fewer bytes than three times the context
        rows = write(tmp_path / "long.jsonl", [*sums(60), {"question": f"{text}?", "answer": "4"}])
        with pytest.raises(
            DataError, match=r"the question long\.jsonl:61 has \d+ tokens; .* the model's context of 1024"
        ):
            room_for_answers(survey([rows]), usable_model(str(folder / "some.gguf")))


def test_an_answer_has_the_room_that_the_longest_question_leaves(folder, tmp_path):
    model = usable_model(str(folder / "some.gguf"))
    assert room_for_answers(survey([folder / "sums.jsonl"]), model) == 256
    rows = write(tmp_path / "long.jsonl", [*sums(60), {"question": f"{'zq' * 450}?", "answer": "4"}])
    question = survey([rows]).domains[0].longest
    tokens = len(model.tokenizer.render(Request(messages=question.messages)))
    assert room_for_answers(survey([rows]), model) == 1024 - tokens < 256


@pytest.mark.parametrize("right", [True, False])
def test_few_rows_all_right_or_all_wrong_end_without_a_promise(folder, tmp_path, right):
    """Answers of one kind, the same questions in two domains: gates are constant, and nothing is promised."""
    questions = [row["question"] for row in sums(40)]
    engine = LlamaEngine(folder / "some.gguf", slots=8, context=512, threads=1, lookup=False)
    asked = [Request(messages=(Message("user", q),), max_tokens=256, speculate=False) for q in questions]
    said = [reply.text.strip() or "nothing" for reply in replies(engine, asked)]
    engine.close()
    rows = [
        {"question": q, "answer": a if right else "yes", "check": {"kind": "exact"}}
        for q, a in zip(questions, said, strict=True)
    ]
    plan = plan_of(tmp_path / "mine", folder, *(write(tmp_path / f"{name}.jsonl", rows) for name in ("one", "two")))
    assert not right or plan.survey.max_tokens == 256  # as the model was asked, so that it repeats its answers
    assert checked(plan, []) == ""
    done = adopt(plan, tmp_path, [], lambda recipe: build(recipe, tmp_path, jobs=1), lambda line: None)
    for domain in ("one", "two"):
        ((correct, asked_of),) = done.report["accuracy"]["base"][domain].values()
        assert correct == (asked_of if right else 0)
    assert not done.report["gate"]["certified"]
    assert (tmp_path / "mine" / "bundle" / "bundle.json").is_file()


@pytest.fixture(scope="module")
def adopted(folder):
    """A finished adoption of 80 questions, 40 of which are asked twice, in files of one name; with another type."""
    root = folder / "runs"
    root.mkdir()
    for name, rows in (("a", sums(40)), ("b", sums(80))):
        (folder / name).mkdir()
        write(folder / name / "q.jsonl", rows)
    plan = plan_of(root / "mine", folder, folder / "a" / "q.jsonl", folder / "b" / "q.jsonl")
    said = []
    typed = replace(plan, type="q8_0")
    done = adopt(typed, root, [], lambda recipe: build(recipe, root, jobs=1), said.append)
    return typed, done


def test_files_of_one_name_and_repeated_questions(adopted):
    plan, done = adopted
    (domain,) = plan.survey.domains
    assert (domain.name, domain.rows, domain.questions, len(domain.files)) == ("q", 120, 80, 2)
    steps = {step["name"]: step["metrics"] for step in done.report["steps"]}
    assert steps["rows"]["rows"] == 120
    assert sum(steps["data"]["rows"].values()) == 80
    assert steps["data"]["warnings"] == ["40 rows repeat a question and are left out"]


def test_a_folder_of_another_model_or_other_questions_is_kept(folder, adopted):
    plan, done = adopted
    home = plan.root / plan.name
    advice = "choose another --out, or remove that folder"
    refused(f"mine holds a bundle made from other questions: {advice}", plan_of(home, folder))
    files = plan.survey.domains[0].files
    refused(f"holds a bundle made from another model: {advice}", plan_of(home, folder, *files, model="gemma.gguf"))
    for same in (plan, replace(plan, type=None)):  # the type is chosen after the check
        assert checked(same, []) == ""
    done.recipe.write_text("# changed by hand\n")
    said = []
    adopt(plan, plan.root, [], lambda recipe: build(recipe, plan.root, jobs=1), said.append)
    kept = done.recipe.with_suffix(".old.yaml")
    assert kept.read_text() == "# changed by hand\n"
    assert f"the recipe that was in {done.recipe} is now {kept}" in said


def test_a_folder_with_other_files_is_never_built_in(folder, tmp_path):
    """A build replaces folders named like its steps: `data` may be the user's own."""
    home = tmp_path / "project"
    write_text(home / "data" / "mine.txt", "precious")
    plan = plan_of(home, folder)
    refused("project has files, but not those of a build, and would lose some; choose another folder", plan)
    with pytest.raises(CogumiError, match="would lose some"):
        adopt(plan, tmp_path, [], lambda recipe: build(recipe, tmp_path, jobs=1), lambda line: None)
    assert (home / "data" / "mine.txt").read_text() == "precious"
    write_text(tmp_path / "file", "x")
    refused("file is a file; choose another folder", plan_of(tmp_path / "file", folder))
    refused("'my runs' cannot be the name of a build; use letters, digits", plan_of(tmp_path / "my runs", folder))


def test_one_adoption_at_a_time(tmp_path):
    home = tmp_path / "mine"
    with only_adoption(home), pytest.raises(CogumiError, match="another adoption is running in"), only_adoption(home):
        pass
    with only_adoption(home):
        pass


def test_ctrl_c_says_how_to_continue(folder, tmp_path):
    words = ["adopt", folder / "some.gguf", "--data", folder / "sums.jsonl", "--out", tmp_path / "mine", "--yes"]
    words += ["--jobs", "1", "--modifiers", "none"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        process = subprocess.Popen([*COGUMI, *map(str, words)], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    for line in process.stderr:
        if "responses (respond)" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "cogumi: stopped; finished steps are kept: run the same command again to continue" in rest
    assert "Traceback" not in rest
    done = cogumi(*words, "--json")
    steps = {step["name"]: step["skipped"] for step in json.loads(done.stdout)["steps"]}
    assert steps["data"]
    assert (tmp_path / "mine" / "bundle" / "bundle.json").is_file()


def test_a_survey_of_no_domain_is_refused(folder, tmp_path):
    plan = plan_of(tmp_path / "mine", folder)
    empty = replace(plan, survey=Survey(()))
    refused("no grader can judge", empty, error=DataError)

"""What `adopt` finds in question files before it builds anything."""

import json

import pytest
import yaml

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.data import load as load_stage
from cogumi.data.examples import POOL, read_examples
from cogumi.data.sources.question_files import Reading
from cogumi.data.sources.survey import OWN, domain_name, files_by_domain, survey
from cogumi.grading.graders import grade
from cogumi.pipeline.adopted_recipe import Adoption, head, modifiers


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_domains_graders_and_lengths(tmp_path):
    sums = write(tmp_path / "sums.jsonl", [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(40)])
    mixed = write(
        tmp_path / "mixed set.jsonl",
        [{"question": f"Is {i} even?", "answer": "yes" if i % 2 == 0 else "no", "domain": "parity"} for i in range(40)]
        + [{"question": "Capital of Peru?", "answer": "Lima"}, {"question": "capital of  peru?", "answer": "Lima"}]
        + [{"question": "broken"}],
    )
    own = write(tmp_path / "own.jsonl", [{"question": "a?", "answer": "b", "check": {"kind": "exact"}}])
    found = {d.name: d for d in survey([sums, mixed, own]).domains}
    assert {name: d.grader for name, d in found.items()} == {
        "sums": "numeric",
        "parity": "choice",
        "mixed_set": "short_answer",
        "own": OWN,
    }
    assert (found["mixed_set"].rows, found["mixed_set"].questions, found["mixed_set"].rejected) == (2, 1, 1)
    assert files_by_domain(found.values()) == {"sums": [sums], "parity": [mixed], "own": [own]}


def test_answers_leave_room_for_a_sentence_but_not_for_ever(tmp_path):
    short = write(tmp_path / "short.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(30)])
    long = write(
        tmp_path / "long.jsonl", [{"question": f"{i}?", "answer": "x " * 900 + f"#### {i}"} for i in range(30)]
    )
    assert survey([short]).max_tokens == 32
    assert survey([short, long]).max_tokens == 256


def test_named_columns_reach_the_recipe(tmp_path):
    file = tmp_path / "exam.csv"
    file.write_text("nr,Problem,Key\n" + "".join(f"{i},What is {i} + 1?,{i + 1}\n" for i in range(30)), "utf-8")
    with pytest.raises(DataError, match="name its columns with `--column question=NAME"):
        survey([file])
    found = survey([file], Reading(columns={"question": "Problem", "answer": "Key"}))
    assert [(d.questions, d.grader) for d in found.domains] == [(30, "numeric")]
    written = yaml.safe_load(head(Adoption("mine", "smollm2", found, tmp_path, 0.05, 2, 32, 256)))
    config = load_stage.Config.model_validate(written["steps"][0]["config"])
    load_stage.run(config, {}, tmp_path, Context(0, 1, tmp_path, lambda *_: None))
    assert [(e.messages[0].content, e.answer) for e in read_examples(tmp_path / POOL)][:2] == [
        ("What is 0 + 1?", "1"),
        ("What is 1 + 1?", "2"),
    ]


def test_modifier_of_a_choice_is_trained_on_random_questions(tmp_path):
    parity = write(
        tmp_path / "parity.jsonl",
        [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(40)],
    )
    sums = write(tmp_path / "sums.jsonl", [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(40)])
    plan = Adoption("mine", "smollm2", survey([parity, sums]), tmp_path, 0.05, 2, 32, 256)
    steps = yaml.safe_load(head(plan) + modifiers(plan, ["parity", "sums"]))["steps"]
    assert {s["config"]["domain"]: s["config"]["rows"] for s in steps if s["stage"] == "modifier"} == {
        "parity": "random",
        "sums": "failures",
    }


def test_free_text_has_no_grader(tmp_path):
    text = "Because many things depend on many others, and nobody can know all of them beforehand."
    free = write(tmp_path / "free.jsonl", [{"question": f"Why {i}?", "answer": text} for i in range(20)])
    assert survey([free]).gradable == ()


@pytest.mark.parametrize("files", [[], ["nowhere.jsonl"]])
def test_nothing_to_read_is_refused(tmp_path, files):
    with pytest.raises(DataError):
        survey([tmp_path / name for name in files])


def test_names_of_files_become_names_of_domains():
    assert [domain_name(text) for text in ("a b", "ä/ö", "x-1_y")] == ["a_b", "general", "x-1_y"]


def test_load_gives_rows_the_grader_of_their_domain(tmp_path):
    rows = [("Is 2 even?", "yes", {}), ("Is 3 even?", "no", {}), ("Who?", "Eve", {"domain": "names"})]
    rows.append(("Why?", "x", {"domain": "other"}))
    write(tmp_path / "q.jsonl", [{"question": q, "answer": a, **more} for q, a, more in rows])
    config = load_stage.Config(
        files={"parity": ["q.jsonl"]},
        domains=("parity", "names"),
        graders={"parity": "choice", "names": "short_answer"},
    )
    out = tmp_path / "out"
    out.mkdir()
    load_stage.run(config, {}, out, Context(0, 1, tmp_path, lambda *_: None))
    rows = read_examples(out / POOL)
    assert [row.domain for row in rows] == ["parity", "parity", "names"]
    assert rows[0].check == {"kind": "choice", "options": ["no", "yes"]}
    assert grade(rows[2], "It is Eve.").correct
    with pytest.raises(ValueError, match="'code' is not a grader that needs no further data"):
        load_stage.Config(files={"a": ["q.jsonl"]}, graders={"a": "code"})


def test_the_answer_inside_a_sentence_is_used(tmp_path):
    row = {"instruction": "Choose.", "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
    (found,) = survey([write(tmp_path / "arc.jsonl", [row])]).domains
    assert found.example.answer == "answer2"

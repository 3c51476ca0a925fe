"""The further domains of the world: their answers are right by their own checks, and wrong ones are wrong."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.types import Example
from cogumi.data.world import DIFFICULTIES, DOMAINS, SYNTHETIC, UNANSWERABLE, make
from cogumi.grading.graders import grade, problem_of

FURTHER = [domain for domain in DOMAINS if domain not in (*SYNTHETIC, "knowledge")]
KINDS = [kind for kind, (domain, _) in UNANSWERABLE.items() if domain in FURTHER]


def example(task):
    return Example("id", "d", 1, task.messages, task.answer, meta={"check": task.check})


def task_of(domain, level, seed):
    return make(domain, level, random.Random(f"{domain}/{level}/{seed}"), "natural")


@given(st.sampled_from(FURTHER), st.sampled_from(DIFFICULTIES), st.integers(0, 10**6))
def test_answers_are_right_and_other_answers_wrong(domain, level, seed):
    task, other = task_of(domain, level, seed), task_of(domain, level, seed + 1)
    question = example(task)
    assert problem_of(question) is None
    assert grade(question, task.answer).correct, (task.question, task.answer)
    assert not grade(question, "").correct
    assert not grade(question, "I don't know.").correct
    if other.answer != task.answer and domain not in ("creative", "instructions"):
        assert not grade(question, other.answer).correct or other.answer.lower() in task.question.lower()


@given(st.sampled_from(FURTHER), st.sampled_from(DIFFICULTIES), st.integers(0, 10**6))
def test_a_broken_rule_is_seen(domain, level, seed):
    task = task_of(domain, level, seed)
    if task.check["kind"] == "constraints":
        for broken in (f"{task.answer} {task.answer}\n- {task.answer}", task.answer.split()[0], "word " * 60):
            assert not grade(example(task), broken).correct, (task.question, broken)


@pytest.mark.parametrize("domain", FURTHER)
def test_a_domain_has_many_questions_of_each_level_and_no_two_levels_alike(domain):
    for level in DIFFICULTIES:
        assert len({task_of(domain, level, seed).question for seed in range(300)}) > 200


def test_kinds_of_questions_without_an_answer_have_names_of_their_own():
    assert len(UNANSWERABLE) == sum(len(module.UNANSWERABLE) for module in DOMAINS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_questions_without_an_answer_want_an_abstention(kind):
    for seed in range(50):
        task = UNANSWERABLE[kind][1](random.Random(seed))
        assert grade(example(task), "I don't know.").correct
        assert not grade(example(task), "12").correct

"""Multiple-choice questions among a user's rows: the bare question, its choices, and the right one (SPEC A1).

A row has its choices in one of two places:

check    {"question": ..., "answer": B or the text of a choice, "check": {"kind": "choice", "options": [...]}}
question the form of LLM-Adapters (Hu et al. 2023), with the name of the right choice as the answer:
         Please choose the correct answer to the question: QUESTION

         Answer1: CHOICE Answer2: CHOICE

         Answer format: answer1/answer2
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cogumi.core.text import last_user_message
from cogumi.core.types import Example
from cogumi.data.sources.forms.pairs import lettered
from cogumi.grading.option_choice import gold

_TASK = re.compile(r"\s*Please choose the correct .*?: ", re.DOTALL)
_NAMES = re.compile(r"\s*Answer format: *(\w+(?:/\w+)+)\s*\Z")


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question without its choices, the choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    right: int


def choice_question(example: Example) -> ChoiceQuestion | None:
    """The question of a row and its choices; None if it has none, or the answer is not one of them."""
    text = last_user_message(example.messages)
    if options := example.check.get("options"):
        right = gold(example.answer, options)
        bare = text.removesuffix(lettered("", options))  # tables of choices are read as questions that list them
        return None if right is None else ChoiceQuestion(bare, tuple(options), right)
    return _from_text(text, example.answer)


def _from_text(text: str, answer: str) -> ChoiceQuestion | None:
    task, format_ = _TASK.match(text), _NAMES.search(text)
    if not (task and format_):
        return None
    names = format_[1].split("/")
    parts, rest = [], text[task.end() : format_.start()]
    for name in names:
        before, found, rest = _partition(rest, name)
        if not found:
            return None
        parts.append(before.strip())
    question, *choices = *parts, rest.strip()
    if answer not in names or not question or not all(choices):
        return None
    return ChoiceQuestion(question, tuple(choices), names.index(answer))


def _partition(text: str, name: str) -> tuple[str, bool, str]:
    """The text before and after the heading "Answer1:" of the choice `answer1`, and whether there is one."""
    found = re.search(rf"(?<!\S){name}:", text, re.IGNORECASE)
    return (text[: found.start()], True, text[found.end() :]) if found else (text, False, "")

"""A question or prompt with an answer, under any of the usual names (OpenOrca, TRL, T0, FLAN, BBH, DROP)."""

from __future__ import annotations

import re

from cogumi.data.sources.forms.pairs import (
    Form,
    Pair,
    Row,
    answer_text,
    conversation,
    first_of,
    passage_of,
    system_with_tools,
    text,
    with_passage,
)

QUESTIONS = ("question", "prompt", "query", "problem", "input", "inputs", "source_text")
ANSWERS = ("answer", "response", "completion", "output", "solution", "target", "targets", "chosen", "best answer")
PASSAGES = ("passage", "context", "paragraph", "table")
_FINAL = re.compile(r"####\s*[-$]?\d[^\n]*\s*\Z")
_OPTIONS = re.compile(r"^\(([A-Z])\)\s*(.*\S)\s*$", re.MULTILINE)
_WORDS = (("True", "False"), ("Yes", "No"), ("valid", "invalid"))


def fits(row: Row) -> bool:
    """A text under the name of a question; "context" is one where nothing else is."""
    return isinstance(row.get(first_of(row, QUESTIONS) or ""), str) or _is_completion(row)


def _is_completion(row: Row) -> bool:
    return isinstance(row.get("context"), str) and ("completion" in row or "ref_text" in row)


def read(row: Row) -> list[Pair]:
    """One pair; the check follows from answers that end in "#### 72", name one of listed options, or are yes or no."""
    if _is_completion(row) and not first_of(row, QUESTIONS):
        said = "ref_text" if row.get("ref_text") else "completion"
        used = frozenset({"context", "completion", "ref_text"})
        return [Pair(conversation(text(row["context"], "context").strip()), answer_text(row[said], said).strip(), used)]
    asked = first_of(row, QUESTIONS)
    assert asked is not None
    name = first_of(row, [answer for answer in ANSWERS if answer != asked])
    if name is None:
        if row.get("answerable") is False:
            used = frozenset({asked, "answer", "answerable"})
            return [Pair(conversation(text(row[asked], asked)), "I don't know.", used, {"kind": "abstain"})]
        raise ValueError(f"there is no answer: give one of {', '.join(ANSWERS)}")
    passage, about = passage_of(row, PASSAGES)
    system = first_of(row, ("system", "system_prompt"))
    question = text(row[asked], asked)
    answers = row[name] if isinstance(row[name], list) else [row[name]]
    answer = answer_text(answers[0], name)
    rejected = row.get("rejected")
    return [
        Pair(
            conversation(
                with_passage(question, passage),
                system_with_tools(text(row[system], system) if system else "", row.get("tools")),
                row.get("history"),
            ),
            answer if not isinstance(row[name], bool) else ("Yes" if row[name] else "No"),
            frozenset({asked, name, about or name, system or name, "history", "tools", "rejected", "answerable"}),
            _check(question, row[name], answers),
            rejected if isinstance(rejected, str) else None,
        )
    ]


def _check(question: str, value: object, answers: list[object]) -> dict[str, object] | None:
    """The check that the answer's form implies; None where only the whole set can tell."""
    if isinstance(value, bool):
        return {"kind": "choice", "options": ["Yes", "No"]}
    if isinstance(value, list):
        names = [str(answer) for answer in answers if any(map(str.isalnum, str(answer)))]
        return {"kind": "short_answer", "answers": names} if names else None
    answer = str(value).strip()
    if _FINAL.search(answer):
        return {"kind": "numeric"}
    options = dict(_OPTIONS.findall(question))
    if re.fullmatch(r"\(([A-Z])\)", answer) and list(options) == [chr(ord("A") + i) for i in range(len(options))]:
        return {"kind": "choice", "options": list(options.values())} if answer[1] in options else None
    words = next((words for words in _WORDS if answer in words), None)
    return {"kind": "choice", "options": list(words)} if words else None


FORM = Form("question", '{"question" or "prompt", "answer" or "completion", "passage" or "context"}', fits, read)

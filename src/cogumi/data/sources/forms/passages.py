"""Questions about documents: TAT-QA's tables, HotpotQA's and MuSiQue's paragraphs, SciTLDR's papers."""

from __future__ import annotations

from typing import Any

from cogumi.data.sources.forms.pairs import Form, Pair, Row, answer_text, conversation, text

_SCALES = ("thousand", "million", "billion")


def _fits_tables(row: Row) -> bool:
    return isinstance(row.get("table"), dict) and isinstance(row.get("questions"), list)


def _read_tables(row: Row) -> list[Pair]:
    """A pair for each question about the table and the paragraphs."""
    table = "\n".join(" | ".join(map(str, line)) for line in row["table"].get("table", ()))
    paragraphs = [str(p.get("text", "")) for p in row.get("paragraphs", ()) if isinstance(p, dict)]
    about = "\n\n".join([table, *paragraphs])
    used = frozenset({"table", "paragraphs", "questions"})
    found = []
    for asked in row["questions"]:
        answer, scale = asked.get("answer"), asked.get("scale") or ""
        values = [str(value) for value in (answer if isinstance(answer, list) else [answer]) if value not in (None, "")]
        if not values:
            continue
        written = f"{values[0]}%" if scale == "percent" else f"{values[0]} {scale}".strip()
        check: dict[str, Any] | None = None
        if asked.get("answer_type") in ("arithmetic", "count"):
            check = {"kind": "numeric", "value": values[0]} | ({"scale": scale} if scale in _SCALES else {})
        elif len(values) == 1 and len(values[0].split()) <= 8 and any(c.isalnum() for c in values[0]):
            check = {"kind": "short_answer", "answers": values}
        question = f"{about}\n\n{text(asked.get('question'), 'question')}"
        found.append(Pair(conversation(question), ", ".join(values) if len(values) > 1 else written, used, check))
    if not found:
        raise ValueError("none of the questions has an answer")
    return found


TABLES = Form(
    "tables", '{"table": {"table"}, "paragraphs", "questions": [{"question", "answer"}]}', _fits_tables, _read_tables
)


def _paragraphs(row: Row) -> list[str]:
    """The paragraphs of HotpotQA ([title, [sentence]]) or MuSiQue ({"title", "paragraph_text"})."""
    found = []
    for part in row.get("context") or row.get("paragraphs") or ():
        if isinstance(part, dict) and "paragraph_text" in part:
            found.append(f"{part.get('title', '')}: {part['paragraph_text']}")
        elif isinstance(part, list) and len(part) == 2 and isinstance(part[1], list):
            found.append(f"{part[0]}: {''.join(map(str, part[1]))}")
    return found


def _fits_paragraphs(row: Row) -> bool:
    return isinstance(row.get("question"), str) and bool(_paragraphs(row))


def _read_paragraphs(row: Row) -> list[Pair]:
    """One pair; the answer is a phrase of a paragraph, or yes or no."""
    if row.get("answer") in (None, ""):
        raise ValueError("there is no answer")
    answer = text(row["answer"], "answer")
    question = "\n\n".join([*_paragraphs(row), text(row["question"], "question")])
    names = [answer, *(str(alias) for alias in row.get("answer_aliases") or ())]
    yes_no = answer.casefold() in ("yes", "no")
    check = {"kind": "choice", "options": ["yes", "no"]} if yes_no else {"kind": "short_answer", "answers": names}
    if not yes_no and not all(any(c.isalnum() for c in name) for name in names):
        check = {"kind": "exact"}
    used = frozenset({"question", "context", "paragraphs", "answer", "answer_aliases"})
    return [Pair(conversation(question), answer, used, check)]


PARAGRAPHS = Form(
    "paragraphs", '{"question", "context": [[title, [sentence]]], "answer"}', _fits_paragraphs, _read_paragraphs
)


def _fits_papers(row: Row) -> bool:
    return isinstance(row.get("source"), list) and isinstance(row.get("target"), list)


def _read_papers(row: Row) -> list[Pair]:
    """The paper's text to be summarized, its first summary as the answer."""
    if not row["target"]:
        raise ValueError("there is no target")
    question = f"Summarize in one sentence:\n\n{' '.join(map(str, row['source']))}"
    answers = [str(summary) for summary in row["target"]]
    check = {"kind": "rouge_l", "at_least": 0.3, "answers": answers}
    used = frozenset({"source", "target"})
    return [Pair(conversation(question), answer_text(answers[0], "target"), used, check)]


PAPERS = Form("papers", '{"source": [sentence], "target": [summary]}', _fits_papers, _read_papers)

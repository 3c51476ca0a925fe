"""Multiple choice as tables: MMLU, MMLU-Pro, ARC (a question, its options, and the right one by letter or index)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cogumi.data.sources.forms.pairs import Form, Pair, Row, conversation, first_of, lettered, passage_of, text

_COLUMNS = (("choice0", "choice1", "choice2", "choice3", "choice4"), ("a", "b", "c", "d", "e"),
            ("option_a", "option_b", "option_c", "option_d", "option_e"))  # fmt: skip


def fits(row: Row) -> bool:
    """A question with a list of options, or with a column for each."""
    return first_of(row, ("question", "prompt")) is not None and bool(_options(row)[0])


def _options(row: Row) -> tuple[list[str], Sequence[str]]:
    """The options and their columns."""
    for name in ("options", "choices"):
        value = row.get(name)
        if isinstance(value, dict) and isinstance(value.get("text"), list):
            return [str(option) for option in value["text"]], (name,)
        if isinstance(value, list) and value and all(isinstance(option, (str, int, float)) for option in value):
            return [str(option) for option in value], (name,)
    for names in _COLUMNS:
        found = [name for name in names if row.get(name) not in (None, "")]
        if len(found) >= 2 and found == list(names[: len(found)]):
            return [str(row[name]) for name in found], found
    return [], ()


def read(row: Row) -> list[Pair]:
    """One pair whose answer is a letter."""
    options, columns = _options(row)
    asked = first_of(row, ("question", "prompt"))
    assert asked is not None
    key = first_of(row, ("answer", "answerkey", "label", "answer_index", "gold"))
    if key is None:
        raise ValueError("there is no answer: give the letter, the index or the text of the right option")
    index = _index(str(row[key]).strip(), options, row)
    if index is None:
        raise ValueError(f"the answer {row[key]!r} is not one of the {len(options)} options")
    passage, about = passage_of(row, ("passage", "context"))
    question = lettered("\n\n".join(part for part in (passage, text(row[asked], asked)) if part), options)
    used = frozenset({asked, key, *columns, about or key, "answer_index"})
    check = {"kind": "choice", "options": options}
    return [Pair(conversation(question), chr(ord("A") + index), used, check)]


def _index(answer: str, options: Sequence[str], row: Row) -> int | None:
    """The index of the right option. A number is an index from 0, as in MMLU, unless labels or texts say otherwise."""
    choices = row.get("choices")
    if isinstance(choices, dict) and answer in (labels := [str(x) for x in choices.get("label", ())]):
        return labels.index(answer)
    if re.fullmatch(r"[A-Za-z]", answer) and ord(answer.upper()) - ord("A") < len(options):
        return ord(answer.upper()) - ord("A")
    if answer.isdecimal() and int(answer) < len(options):
        return int(answer)
    return options.index(answer) if answer in options else None


FORM = Form(
    "multiple choice",
    '{"question", "options" or "choices" or "choice0"..., "answer": letter, index or text}',
    fits,
    read,
)

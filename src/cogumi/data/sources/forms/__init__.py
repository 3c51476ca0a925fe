"""The forms of rows that are read, in the order in which they are tried (SPEC A1)."""

from __future__ import annotations

from cogumi.data.sources.forms import (
    choice_table,
    dialogue,
    documents,
    function_calls,
    instruction,
    passages,
    programs_with_tests,
    question,
)
from cogumi.data.sources.forms.pairs import Form

FORMS: tuple[Form, ...] = (
    programs_with_tests.FORM,
    function_calls.FORM,
    passages.TABLES,
    passages.PAPERS,
    passages.PARAGRAPHS,
    dialogue.TRANSCRIPT,
    dialogue.FORM,
    instruction.INSTANCES,
    instruction.FORM,
    choice_table.FORM,
    question.FORM,
    documents.FORM,
)

"""MBPP: a task, its program, and asserts."""

from __future__ import annotations

from cogumi.data.sources.forms.pairs import Form, Pair, Row, conversation, first_of, text


def fits(row: Row) -> bool:
    """A program with a list of tests."""
    return isinstance(row.get("test_list"), list) and "code" in row


def read(row: Row) -> list[Pair]:
    """One pair; the question shows the tests, which name the function."""
    asked = first_of(row, ("text", "prompt"))
    if asked is None:
        raise ValueError("there is no task: give it as text or prompt")
    setup = row.get("test_setup_code") or ""
    tests = [*([setup] if setup else []), *row.get("test_imports", ()), *row["test_list"]]
    if not row["test_list"] or not all(isinstance(test, str) for test in tests):
        raise ValueError("test_list must be a list of asserts")
    shown = "\n".join(row["test_list"])
    question = f"{text(row[asked], asked)}\nYour code must pass these tests:\n\n{shown}"
    hidden = [test for test in row.get("challenge_test_list") or () if isinstance(test, str)]
    used = {asked, "code", "test_list", "test_setup_code", "test_imports", "challenge_test_list"}
    check = {"kind": "code", "tests": [*tests, *hidden]}
    code = text(row["code"], "code").replace("\r\n", "\n")
    return [Pair(conversation(question), code, frozenset(used), check)]


FORM = Form("program with tests", '{"text" or "prompt", "code", "test_list"}', fits, read)

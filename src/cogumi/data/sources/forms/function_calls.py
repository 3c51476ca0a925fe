"""BFCL: questions with functions; the right calls lie in another file, joined by `id`."""

from __future__ import annotations

import json
from typing import Any

from cogumi.core.types import Message
from cogumi.data.sources.forms.pairs import Form, Pair, Row, system_with_tools, text


def fits(row: Row) -> bool:
    """A list of conversations and a list of functions."""
    return isinstance(row.get("question"), list) and isinstance(row.get("function"), list)


def read(row: Row) -> list[Pair]:
    """One pair whose answer is a possible call. Rows named "irrelevance" must not call anything."""
    turns = row["question"][0] if row["question"] and isinstance(row["question"][0], list) else row["question"]
    messages = [Message(str(turn["role"]), text(turn.get("content"), "content")) for turn in turns]
    if "irrelevance" in str(row.get("id", "")):
        possible: list[Any] = []
    elif isinstance(row.get("ground_truth"), list):
        possible = row["ground_truth"]
    else:
        raise ValueError("there is no ground_truth: keep the file of the set's folder possible_answer beside this one")
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    messages.insert(0, Message("system", system_with_tools(system, row["function"])))
    calls = [{"name": tool, "arguments": _first([arguments])} for call in possible for tool, arguments in call.items()]
    used = frozenset({"question", "function", "ground_truth", "id"})
    check = {"kind": "tool_call", "possible": possible}
    return [
        Pair(
            tuple(messages),
            json.dumps(calls, ensure_ascii=False) if calls else "None of the tools can do that.",
            used,
            check,
        )
    ]


def _first(values: Any) -> Any:
    """The first possible value of an argument, in objects and lists too."""
    value = values[0] if isinstance(values, list) and values else values
    if isinstance(value, dict):
        found = {name: _first(inner) for name, inner in value.items()}
        return {name: inner for name, inner in found.items() if inner != ""}
    return [_first([inner]) for inner in value] if isinstance(value, list) else value


FORM = Form(
    "function calls",
    '{"question": [[turn]], "function": [tool], "ground_truth": [{tool: {argument: [value]}}]}',
    fits,
    read,
)

"""How a model without a format of its own is told which tools there are: in training data and when it is served."""

from __future__ import annotations

from collections.abc import Iterable


def tool_question(tools: Iterable[str], asked: str, many: str = "") -> str:
    """The question of a user who offers `tools` ("map(city)"); `many` says that several calls are possible."""
    form = '{"tool": name, "args": {argument: "value"}}'
    return f"Tools: {', '.join(tools)}. Reply in JSON: {form}{many}. Request: {asked}"

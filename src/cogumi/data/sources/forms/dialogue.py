"""Conversations: OpenAI's messages, ShareGPT's turns, Anthropic's transcripts; with tools, weights and preferences."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from cogumi.core.types import Message
from cogumi.data.sources.forms.pairs import Form, Pair, Row, answer_text, system_with_tools, text

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def _turns(row: Row) -> Any:
    return next((row[name] for name in ("messages", "conversations", "conversation") if row.get(name)), None)


def fits(row: Row) -> bool:
    """A list of turns; also as the prompt and the completion."""
    return isinstance(_turns(row), list) or isinstance(row.get("prompt"), list)


def read(row: Row) -> list[Pair]:
    """The last answer of a conversation, with the turns before it. A preferred answer is the answer."""
    if isinstance(row.get("prompt"), list):
        turns, used = list(row["prompt"]), {"prompt"}
    else:
        turns = list(_turns(row))
        used = {name for name in ("messages", "conversations", "conversation") if row.get(name) is not None}
    for name in ("label", "kto_tag"):
        if row.get(name) is False:
            raise ValueError(f"{name} is false: this answer was rejected, so that it is no reference")
    given = next((name for name in ("answer", "chosen", "completion") if row.get(name)), None)
    if given:
        turns += _as_turns(row[given])
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns.insert(0, {"role": "system", "content": row["system"]})
    unused: list[str] = []
    messages = [_message(turn, unused) for turn in turns]
    while messages and messages[-1].role == "user":
        messages.pop()
        if given or not any(m.role == "assistant" for m in messages):
            raise ValueError("the conversation ends with the user's turn: there is no answer to it")
        unused.append("a last turn of the user")
    if not messages or [m.role for m in messages[-2:]] != ["user", "assistant"]:
        raise ValueError("messages must end with a user's turn and the assistant's answer to it")
    if isinstance(turns[len(messages) - 1], dict) and turns[len(messages) - 1].get("weight") == 0:
        raise ValueError("the last answer has weight 0: it is not to be learned")
    system = messages.pop(0).content if messages[0].role == "system" else ""
    if system := system_with_tools(system, row.get("tools")):
        messages.insert(0, Message("system", system))
    rejected = _as_turns(row["rejected"]) if row.get("rejected") else []
    return [
        Pair(
            tuple(messages[:-1]),
            answer_text(messages[-1].content, "content"),
            frozenset({*used, "system", "tools", "label", "kto_tag", "rejected", given or "answer"}),
            rejected=_message(rejected[-1], unused).content if rejected else None,
            unused=tuple(unused),
        )
    ]


def _as_turns(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, dict) else [{"role": "assistant", "content": value}]


def _message(turn: Any, unused: list[str]) -> Message:
    """A turn of any of the forms as a message; the result of a tool is told by the user."""
    if not isinstance(turn, dict):
        raise ValueError("messages must be a list of objects with role and content")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.casefold()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"role {name!r} is not one of {', '.join(_ROLES)}")
    unused += [f"{name} of a turn" for name in ("reasoning_content", "thinking") if turn.get(name)]
    content = _content(turn.get("content", turn.get("value")), unused)
    if calls := turn.get("tool_calls"):
        content = "\n".join(part for part in (content, json.dumps(calls, ensure_ascii=False)) if part)
    content = text(content, "content")
    return Message("user", f"Result of the tool: {content}") if role == "tool" else Message(role, content)


def _content(value: Any, unused: list[str]) -> str:
    """The text of a turn; parts that are no text are refused, a model's reasoning is left out."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else "" if value is None else str(value)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(str(part.get("text", part.get("value", ""))))
        elif kind in ("reasoning", "thinking"):
            unused.append(f"{kind} of a turn")
        elif kind in ("tool_call", "tool_calls"):
            texts.append(str(part.get("value", "")))
        else:
            raise ValueError(f"a turn has content of type {kind!r}: only text can be used")
    return "\n".join(texts)


FORM = Form("messages", '{"messages" or "conversations": [{"role" or "from", "content" or "value"}]}', fits, read)


def _fits_transcript(row: Row) -> bool:
    return isinstance(row.get("chosen"), str) and "\n\nHuman:" in row["chosen"]


def _read_transcript(row: Row) -> list[Pair]:
    """The preferred transcript; the last answer of the other one is kept as rejected."""
    chosen = _transcript(row["chosen"])
    rejected = _transcript(row["rejected"]) if isinstance(row.get("rejected"), str) else []
    found = read({"messages": [*chosen]})[0]
    last = rejected[-1]["content"] if rejected and rejected[-1]["role"] == "assistant" else None
    return [Pair(found.messages, found.answer, frozenset({"chosen", "rejected"}), rejected=last, unused=found.unused)]


def _transcript(raw: str) -> Sequence[dict[str, str]]:
    _, *parts = _TURN.split(raw)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


TRANSCRIPT = Form(
    "transcript", '{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected"}', _fits_transcript, _read_transcript
)

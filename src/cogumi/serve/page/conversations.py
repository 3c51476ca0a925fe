"""A conversation on the page (SPEC G2): what the browser keeps of it, how it is shown, asked and exported; pure.

The browser holds the conversation and sends it with every event, so the server keeps nothing of it and a page survives
a restart. What a browser sends is untrusted: it is validated here.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, computed_field

from cogumi.core.types import Decision
from cogumi.engine.presentation import as_markdown, transcript, verdict
from cogumi.engine.reply_extension import ReplyExtension

TITLE = 40
"""Most characters of a conversation's title."""
MARKS = {"sure": "✓", "not sure": "⚠", "declined": "✕"}
"""Mark before a verdict, by how it begins."""


class Turn(BaseModel):
    """One message; of an answer also its id, the `cogumi` object, and the person's rating."""

    role: Literal["user", "assistant"]
    content: str
    id: str = ""
    cogumi: ReplyExtension | None = None
    right: bool | None = None


class Conversation(BaseModel):
    """The turns so far; `user` is a random name of the browser, which owns the ratings."""

    id: str = ""
    user: str = ""
    turns: list[Turn] = []

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        """The beginning of the first question; the browser lists conversations by it."""
        first = " ".join(self.turns[0].content.split()) if self.turns else "New conversation"
        return first if len(first) <= TITLE else f"{first[: TITLE - 1].rstrip()}…"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages of a chat request; an empty answer, which was stopped before its first word, is left out."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns if turn.content]

    def answer_at(self, shown: int) -> int | None:
        """The number of the turn whose answer is message number `shown` of `rows`, itself or its reasons."""
        owners = [number for number, turn in enumerate(self.turns) for _ in _rows(turn)]
        found = owners[shown] if 0 <= shown < len(owners) else None
        return found if found is not None and self.turns[found].role == "assistant" else None

    def rows(self) -> list[dict[str, Any]]:
        """Messages for `gr.Chatbot`; each answer is followed by a closed section on how sure it is."""
        return [row for turn in self.turns for row in _rows(turn)]

    @property
    def ratings(self) -> list[str | None]:
        """The thumb of each answer, as `gr.Chatbot` wants it."""
        names = {True: "Like", False: "Dislike", None: None}
        return [names[turn.right] for turn in self.turns if turn.role == "assistant"]

    def markdown(self) -> str:
        """The conversation as a Markdown document."""
        turns = [(turn.role, turn.content, verdict(turn.cogumi) if turn.cogumi else "") for turn in self.turns]
        return transcript(self.title, turns)


def _rows(turn: Turn) -> list[dict[str, Any]]:
    content = as_markdown(turn.content) if turn.role == "assistant" else turn.content
    if turn.cogumi is None:
        return [{"role": turn.role, "content": content}]
    line = verdict(turn.cogumi)
    mark = MARKS.get(line.partition(":")[0], "·")
    if mark == MARKS["not sure"]:  # seen even by those who hide the reasons
        content += f"\n\n*{mark} This answer may be wrong.*"
    about = {"title": f"{mark} {line}", "status": "done"}
    reasons = {"role": "assistant", "content": _reasons(turn.cogumi), "metadata": about}
    return [{"role": turn.role, "content": content}, reasons]


def _reasons(known: ReplyExtension) -> str:
    """Every decision as a list, then the tokens."""
    lines = [_decision(decision) for decision in known.decisions] or ["- nothing was decided: one model answered"]
    tokens = [f"- {known.usage.completion_tokens} tokens, all attempts"] if known.usage else []
    return "\n".join([*lines, *tokens])


def _decision(decision: Decision) -> str:
    reason = re.sub(r"([\\`*_\[\]<>])", r"\\\1", decision.reason)
    return f"- {'✓' if decision.accepted else '→'} {decision.tier}: {reason}"

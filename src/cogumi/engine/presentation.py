"""How answers are shown to people, in the terminal and on the page: verdicts, programs, whole conversations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from cogumi.core.types import Decision

PROGRAM = re.compile(r"@\w|(async )?def \w+\(|class \w+[:(]|import \w|from [\w.]+ import ")
"""How a text begins that is Python as a whole; Markdown would lose its indentation."""


class Judged(Protocol):
    """What a `Reply` and the `cogumi` object of a response have in common."""

    @property
    def tier(self) -> str:
        """What answered."""

    @property
    def route(self) -> str:
        """How the answer came about."""

    @property
    def p_correct(self) -> float | None:
        """Calibrated probability that the answer is right."""

    @property
    def accepted(self) -> bool:
        """Whether the guarantee covers the answer."""

    @property
    def decisions(self) -> Sequence[Decision]:
        """Every decision of the cascade."""


def verdict(answer: Judged) -> str:
    """One line: whether the cascade stands by the answer, which tier gave it, P(correct) and what is needed."""
    name, _, domain = answer.tier.partition(":")
    tier = f"{name} {domain}".strip() or "the model"
    if answer.route == "cache":
        return "sure: an earlier accepted answer, repeated"
    if answer.p_correct is None:
        return f"not calibrated: answer of {tier}"
    judged = [d for d in answer.decisions if d.signal == "p_correct" and d.tier == answer.tier]
    needed = judged[-1].threshold if judged else None
    p = f"{answer.p_correct:.0%}"
    if answer.accepted:
        return f"sure: {tier}, {p}" + (f", {needed:.0%} needed" if needed is not None else "")
    if answer.route == "abstained":
        return f"declined: {tier}, {p}"
    limit = "" if needed is None else f", {needed:.0%} needed" if needed < 1 else ", nothing is certified"
    return f"not sure: best guess of {tier}, {p}{limit}"


def as_markdown(answer: str) -> str:
    """An answer as Markdown: a program without a fence gets one."""
    return f"```python\n{answer}\n```" if PROGRAM.match(answer) else answer


def transcript(title: str, turns: Iterable[tuple[str, str, str]]) -> str:
    """A conversation as a Markdown document, of (role, text, verdict); questions have no verdict."""
    parts = [f"# {title}"]
    for role, text, line in turns:
        parts.append(f"**You**\n\n{text}" if role == "user" else f"**Answer**\n\n{as_markdown(text)}")
        if line:
            parts.append(f"> {line}")
    return "\n\n".join(parts) + "\n"

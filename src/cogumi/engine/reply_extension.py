"""The `cogumi` object of a response: a cascade's data about its answer beyond OpenAI's API; written and read here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi.core.types import Decision, Reply, Usage


class ReplyExtension(BaseModel):
    """The object as read by a client; missing keys have the defaults of `Reply`, unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)

    tier: str = ""
    route: str = ""
    p_correct: Annotated[float, Field(ge=0, le=1)] | None = None
    accepted: bool = False
    decisions: tuple[Decision, ...] = ()
    signals: dict[str, float] = {}
    usage: Usage | None = None


def extension(reply: Reply) -> dict[str, Any]:
    """The `cogumi` object of a reply; `tier` is empty if the request went directly to one tier."""
    return {
        "tier": reply.tier,
        "route": reply.route,
        "p_correct": reply.p_correct,
        "accepted": reply.accepted,
        "decisions": [asdict(decision) for decision in reply.decisions],
        "signals": dict(reply.signals),
        "usage": asdict(reply.usage),
    }


def read_extension(value: object) -> ReplyExtension | None:
    """Read the `cogumi` object of a server; None if it is malformed, because the answer is usable without it."""
    try:
        return ReplyExtension.model_validate(value)
    except ValidationError:
        return None

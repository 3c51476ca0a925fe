"""What to write on a screen or a wire for each event of an engine, given that written text cannot be taken back."""

from __future__ import annotations

from cogumi.core.types import Reply, Revision, Token
from cogumi.engine.protocol import Event


def further(so_far: str, event: Event) -> tuple[str, str]:
    """What to write after `so_far` for this event, and the answer's text as it then stands.

    A revision that goes on from it adds its rest (a low-confidence note);
    any other follows as a paragraph of its own.
    """
    if isinstance(event, Token):
        return event.text, so_far + event.text
    if isinstance(event, Revision | Reply):
        goes_on = event.text.startswith(so_far)
        return event.text.removeprefix(so_far) if goes_on else f"\n\n{event.text}", event.text
    return "", so_far

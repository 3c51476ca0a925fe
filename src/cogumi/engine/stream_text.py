"""The text to append to an output stream for each engine event; written text cannot be retracted."""

from __future__ import annotations

from cogumi.core.types import Reply, Revision, Token
from cogumi.engine.protocol import Event


def text_delta(so_far: str, event: Event) -> tuple[str, str]:
    """The text to append after `so_far` for an event, and the answer's current text.

    A revision that starts with `so_far` (for example one with a disclaimer) appends its rest; any other
    revision is appended as a new paragraph.
    """
    if isinstance(event, Token):
        return event.text, so_far + event.text
    if isinstance(event, Revision | Reply):
        continues = event.text.startswith(so_far)
        return event.text.removeprefix(so_far) if continues else f"\n\n{event.text}", event.text
    return "", so_far

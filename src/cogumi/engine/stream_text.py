"""The text that each event of an engine adds to a screen or a stream, from which nothing can be taken back."""

from __future__ import annotations

from cogumi.core.types import Reply, Revision, Token
from cogumi.engine.protocol import Event


def text_delta(so_far: str, event: Event) -> tuple[str, str]:
    """The text to append after `so_far` for this event, and the answer's whole text after it.

    A revision that begins with `so_far` appends its rest (a low-confidence note); any other follows as a paragraph of
    its own.
    """
    if isinstance(event, Token):
        return event.text, so_far + event.text
    if isinstance(event, Revision | Reply):
        goes_on = event.text.startswith(so_far)
        return event.text.removeprefix(so_far) if goes_on else f"\n\n{event.text}", event.text
    return "", so_far

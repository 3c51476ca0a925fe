"""The disclaimers that a cascade adds to an answer's text, and how they are taken off again."""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.confidence.signals import abstains
from cogumi.core.types import ABSTENTION

LOW_CONFIDENCE = "\n\n(Low confidence: this answer may be wrong.)"
AGAIN = "\n\n(Answered again, because the answer before did not satisfy. Low confidence: this one may be wrong too.)"
NOTES = (LOW_CONFIDENCE, AGAIN)


def without_note(text: str) -> str:
    """A reply's text as the tier gave it, for grading and for follow-ups; imitations of our notes are removed too."""
    while any(text.endswith(note) for note in NOTES):
        for note in NOTES:
            text = text.removesuffix(note)
    return text


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer is given: its text, the route, and the `reason` why the cascade does not stand by it (or empty).

    `withheld` if the abstention sentence replaces it.
    """

    text: str
    route: str
    reason: str = ""
    withheld: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the cascade stands by the answer: the one source of `Reply.accepted`."""
        return not self.reason


def ending_of(
    tier: str, text: str, drafted: bool, accepted: bool, withhold: bool, note: str = LOW_CONFIDENCE
) -> Ending:
    """How to give the answer `text` of `tier`; `withhold` if the request wants no answer that was not `accepted`."""
    text = without_note(text)
    if abstains(text):
        return Ending(text, "abstained", f"{tier} says that it does not know")
    if accepted:
        kind = tier.partition(":")[0]
        return Ending(text, "base+draft" if kind == "base" and drafted else kind)
    if withhold:
        reason = "no answer reached the threshold, and the request wants no unsure one"
        return Ending(ABSTENTION, "abstained", reason, withheld=True)
    return Ending(text + note, "low_confidence", f"the likeliest answer, that of {tier}, is not sure enough")

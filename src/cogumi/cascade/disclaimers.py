"""What the cascade adds to an answer's text, and how it is taken off again."""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.confidence.signals import abstains
from cogumi.core.types import ABSTENTION

LOW_CONFIDENCE = "\n\n(Low confidence: this answer may be wrong.)"
AGAIN = "\n\n(Answered again, because the answer before did not satisfy. Low confidence: this one may be wrong too.)"
NOTES = (LOW_CONFIDENCE, AGAIN)


def without_note(text: str) -> str:
    """A reply's text as the tier gave it, for grading and for follow-ups; whatever imitates our notes goes too."""
    while any(text.endswith(note) for note in NOTES):
        for note in NOTES:
            text = text.removesuffix(note)
    return text


@dataclass(frozen=True, slots=True)
class Ending:
    """What becomes of an answer: its text, by which route, and why it is no confident one (empty: it is).

    `withheld` if the abstention sentence stands in its place.
    """

    text: str
    route: str
    reason: str = ""
    withheld: bool = False


def ending_of(
    tier: str, text: str, drafted: bool, accepted: bool, withhold: bool, note: str = LOW_CONFIDENCE
) -> Ending:
    """What to say with the answer `text` of `tier`; `withhold` if the request wants none that was not `accepted`."""
    text = without_note(text)
    if abstains(text):
        return Ending(text, "abstained", f"{tier} says that it does not know")
    if accepted:
        kind = tier.partition(":")[0]
        return Ending(text, "base+draft" if kind == "base" and drafted else kind)
    if withhold:
        reason = "no answer reached the threshold, and the request wants no unsure one"
        return Ending(ABSTENTION, "abstained", reason, withheld=True)
    return Ending(text + note, "low_confidence", f"the likeliest answer is that of {tier}, and it is not sure enough")

"""The disclaimers that a cascade appends to an answer's text, and their removal."""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.confidence.signals import abstains
from cogumi.core.types import ABSTENTION

LOW_CONFIDENCE = "\n\n(Low confidence: this answer may be wrong.)"
AGAIN = "\n\n(Second attempt, because you were not satisfied. Low confidence: this answer may be wrong too.)"
NOTES = (LOW_CONFIDENCE, AGAIN)


def without_note(text: str) -> str:
    """A reply's text without disclaimers, for grading and follow-ups; imitations by the model are removed too."""
    while any(text.endswith(note) for note in NOTES):
        for note in NOTES:
            text = text.removesuffix(note)
    return text


@dataclass(frozen=True, slots=True)
class Ending:
    """The final text of an answer, its route, and the `reason` why it is not accepted (empty if it is).

    `withheld`: the abstention sentence replaces the answer.
    """

    text: str
    route: str
    reason: str = ""
    withheld: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the answer is accepted: the only source of `Reply.accepted`."""
        return not self.reason


def ending_of(
    tier: str, text: str, drafted: bool, accepted: bool, withhold: bool, note: str = LOW_CONFIDENCE
) -> Ending:
    """Finish the answer `text` of `tier`; `withhold`: replace it by an abstention unless it was `accepted`."""
    text = without_note(text)
    if abstains(text):
        return Ending(text, "abstained", f"{tier} says that it does not know")
    if accepted:
        kind = tier.partition(":")[0]
        return Ending(text, "base+draft" if kind == "base" and drafted else kind)
    if withhold:
        reason = "no answer reached the threshold, and the request excludes unsure answers"
        return Ending(ABSTENTION, "abstained", reason, withheld=True)
    return Ending(text + note, "low_confidence", f"the best answer ({tier}) is below the threshold")

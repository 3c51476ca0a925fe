"""The disclaimers that a cascade appends to an answer's text on request, and their removal (SPEC F11)."""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.confidence.signals import abstains
from cogumi.core.types import ABSTENTION

LOW_CONFIDENCE = "\n\n(Low confidence: this answer may be wrong.)"
SECOND_ATTEMPT = "\n\n(Second attempt, because you were not satisfied. Low confidence: this answer may be wrong too.)"
DISCLAIMERS = (LOW_CONFIDENCE, SECOND_ATTEMPT)


def without_disclaimer(text: str) -> str:
    """A text without disclaimers at its end; imitations by the model are removed too."""
    while any(text.endswith(disclaimer) for disclaimer in DISCLAIMERS):
        for disclaimer in DISCLAIMERS:
            text = text.removesuffix(disclaimer)
    return text


@dataclass(frozen=True, slots=True)
class FinalText:
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


def finish(tier: str, text: str, drafted: bool, accepted: bool, withhold: bool, disclaimer: str = "") -> FinalText:
    """Finish the answer `text` of `tier`. Unless it was `accepted`: `withhold` replaces it by an abstention, and
    `disclaimer` is appended.
    """
    text = without_disclaimer(text)
    if abstains(text):
        return FinalText(text, "abstained", f"{tier} says that it does not know")
    if accepted:
        kind = tier.partition(":")[0]
        return FinalText(text, "base+draft" if kind == "base" and drafted else kind)
    if withhold:
        reason = "no answer reached the threshold, and the request excludes unsure answers"
        return FinalText(ABSTENTION, "abstained", reason, withheld=True)
    return FinalText(text + disclaimer, "low_confidence", f"the best answer ({tier}) is below the threshold")

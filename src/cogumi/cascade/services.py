"""What a cascade answers with: models, calibration, the operator's settings, and the optional parts of a bundle."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cogumi.bundle.unpack import BundleFiles
from cogumi.cascade.dissatisfaction import Escalation
from cogumi.cascade.history import History
from cogumi.cascade.modes import Settings
from cogumi.cascade.self_critique import Critic
from cogumi.cascade.template_bank import Templates
from cogumi.cascade.tiers import Tiers
from cogumi.confidence.gate import KINDS, Calibration
from cogumi.engine.protocol import Capability


@dataclass(frozen=True, slots=True, eq=False)
class Services:
    """`gate` is one of `confidence.gate.KINDS`; None for a part that the bundle does not hold.

    `files` are the bundle's, held open as long as the models need them; `added` is the list of modifiers that were
    added while it ran (None: none is kept).
    """

    tiers: Tiers
    calibration: Calibration
    settings: Settings = field(default_factory=Settings)
    gate: str = KINDS[0]
    history: History = field(default_factory=History)
    escalation: Escalation | None = None
    critic: Critic | None = None
    templates: Templates | None = None
    files: BundleFiles | None = None
    added: Path | None = None

    @property
    def wants_hidden(self) -> bool:
        """Whether the base's gate reads the hidden state behind an answer, and the base can tell it."""
        return self.calibration.probe is not None and Capability.HIDDEN_STATES in self.tiers.base.capabilities

    def close(self) -> None:
        """Close what is kept on disk, free the models, and give the files back, in this order."""
        with ExitStack() as closing:
            for part in (self.files, self.tiers, self.history):  # the last first
                if part is not None:
                    closing.callback(part.close)

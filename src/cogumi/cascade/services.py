"""The parts of a cascade: models, calibration, the operator's settings, and the optional parts of a bundle."""

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
    """`gate` is one of `confidence.gate.KINDS`; parts that the bundle lacks are None.

    `system`: the system prompt of a request that has none; empty for none. `systems`: the prompts of the calibration
    questions, as `core.text.system_prompt` gives them (None: unknown). `files`: the bundle's files, open as long as
    the models need them. `added`: path of the list of added modifiers (None: not stored).
    """

    tiers: Tiers
    calibration: Calibration
    settings: Settings = field(default_factory=Settings)
    gate: str = KINDS[0]
    history: History = field(default_factory=History)
    escalation: Escalation | None = None
    critic: Critic | None = None
    templates: Templates | None = None
    system: str = ""
    systems: frozenset[str] | None = None
    files: BundleFiles | None = None
    added: Path | None = None

    @property
    def wants_hidden(self) -> bool:
        """Whether the base's gate uses the hidden state of an answer, and the base provides it."""
        return self.calibration.probe is not None and Capability.HIDDEN_STATES in self.tiers.base.capabilities

    def close(self) -> None:
        """Close the history, free the models, close the bundle's files, in this order."""
        with ExitStack() as closing:
            for part in (self.files, self.tiers, self.history):  # closed in reverse order
                if part is not None:
                    closing.callback(part.close)

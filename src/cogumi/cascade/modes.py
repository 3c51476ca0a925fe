"""What a mode allows (SPEC F9). A new mode is one row."""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.errors import RequestError


@dataclass(frozen=True, slots=True)
class Mode:
    """`modifier`: whether the modifier of the question's domain may answer where the base is not sure enough."""

    name: str
    modifier: bool


MODES = {mode.name: mode for mode in (Mode("fast", modifier=False), Mode("accurate", modifier=True))}
DEFAULT = "accurate"


def mode_of(name: str | None) -> Mode:
    """The mode of that name, or the default one. Raises `RequestError` naming the known modes."""
    try:
        return MODES[name or DEFAULT]
    except KeyError:
        raise RequestError(f"unknown mode '{name}': choose one of {', '.join(MODES)}") from None

"""Modes, and the choice of a mode for a request (SPEC F9). A new mode is a row in `MODES`, or an entry in the settings:

modes:                       # added to the built-in modes, or replacing them by name
  careful: {modifier: true, votes: 7}
default: balanced            # mode if no other rule applies
domains: {math: accurate}    # mode by domain of the question
files: {.py: code}           # domain of a request by the extension of its files
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cogumi.cascade.self_consistency import MAX_PATHS, MIN_PATHS
from cogumi.confidence.policy import Policy
from cogumi.core.errors import CogumiError, RequestError

AUTO = "auto"
RESERVED = (AUTO, "base", "draft")
"""Names that a mode cannot have."""
FAILED_BEFORE = "accurate"
"""Mode for a domain with an earlier wrong answer to the same user."""


class Mode(BaseModel):
    """The tiers that may answer (see `Policy`), and the methods for a hard question without an accepted answer.

    `votes`: number of sampled answers that vote. `critique`: rounds in which the critic may request new answers.
    `examples`: most few-shot examples shown to the base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    draft: bool = False
    modifier: bool = False
    modifier_first: bool = False
    votes: int = 0
    critique: int = Field(0, ge=0, le=3)
    examples: int = Field(0, ge=0, le=10)

    @field_validator("votes")
    @classmethod
    def _can_vote(cls, votes: int) -> int:
        if votes and not MIN_PATHS <= votes <= MAX_PATHS:
            raise ValueError(f"votes is {votes}; give {MIN_PATHS} to {MAX_PATHS}, or 0")
        return votes

    @property
    def policy(self) -> Policy:
        """The tiers that may answer."""
        return Policy(self.draft, self.modifier, self.modifier_first)

    @property
    def deliberates(self) -> bool:
        """Whether the mode has methods for questions without an accepted answer."""
        return bool(self.votes or self.critique or self.examples)


MODES: Mapping[str, Mode] = {
    "fast": Mode(),
    "balanced": Mode(modifier=True),
    "straight": Mode(modifier=True, modifier_first=True),
    "accurate": Mode(modifier=True, votes=5, critique=1),
    "desktop": Mode(modifier=True, votes=5, critique=1, examples=5),
    "mobile": Mode(draft=True, modifier=True, modifier_first=True),
    "turbo": Mode(draft=True),
}
FILES = {
    **dict.fromkeys((".py", ".js", ".ts", ".java", ".c", ".h", ".cpp", ".rs", ".go", ".rb", ".sh", ".sql"), "code"),
    **dict.fromkeys((".tex", ".csv", ".xlsx"), "math"),
}


class Settings(BaseModel):
    """The operator's settings; see the module docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    modes: Mapping[str, Mode] = Field(default_factory=dict)
    default: str = "balanced"
    domains: Mapping[str, str] = Field(default_factory=dict)
    files: Mapping[str, str] = Field(default_factory=lambda: dict(FILES))

    @model_validator(mode="after")
    def _known(self) -> Settings:
        for name in (self.default, *self.domains.values()):
            if name not in self.names:
                raise ValueError(f"unknown mode '{name}': choose one of {', '.join(self.names)}")
        for name in self.modes:
            if name in RESERVED or name.startswith("base+"):
                raise ValueError(f"the mode name '{name}' is reserved; choose another name")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all modes, without `auto`."""
        return tuple({**MODES, **self.modes})

    def mode(self, name: str) -> Mode:
        """The mode `name`. Raises `RequestError` for an unknown one."""
        known = {**MODES, **self.modes}
        if name not in known:
            raise RequestError(f"unknown mode '{name}': choose one of {', '.join((AUTO, *known))}")
        return known[name]

    def check(self, name: str | None) -> None:
        """Raise `RequestError` for an unknown mode; None and `auto` are valid."""
        if name not in (None, AUTO):
            self.mode(str(name))

    def choose(self, asked: str | None, domain: str | None, failed: Collection[str]) -> Choice:
        """The mode for a request with mode `asked` and a question of `domain`; `failed`: domains with wrong answers."""
        if asked not in (None, AUTO):
            return Choice(str(asked), self.mode(str(asked)), "set by the request")
        if domain in failed:
            return Choice(FAILED_BEFORE, self.mode(FAILED_BEFORE), f"an earlier answer about {domain} was wrong")
        if domain in self.domains:
            name = self.domains[str(domain)]
            return Choice(name, self.mode(name), f"set for {domain} in the settings")
        return Choice(self.default, self.mode(self.default), "the default")

    def file_domain(self, files: Sequence[str], domains: Collection[str]) -> str | None:
        """The domain indicated by file names; None if there is none, or if they disagree."""
        found = {self.files.get(PurePath(name).suffix.casefold()) for name in files} & set(domains)
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen mode, its name, and the reason of the choice."""

    name: str
    mode: Mode
    reason: str


def load_settings(path: Path | None) -> Settings:
    """Read settings from a YAML file (None: the defaults). Raises `CogumiError` with the location of an error."""
    if path is None:
        return Settings()
    try:
        return Settings.model_validate(yaml.safe_load(path.read_text("utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogumiError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CogumiError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from error

"""What a mode allows, and which one a request gets (SPEC F9). A new mode is a row here, or a few lines of settings.

modes:                       # beside the built-in ones, or instead of them
  careful: {modifier: true, votes: 7}
default: balanced            # where nothing else says
domains: {math: accurate}    # questions of that domain
files: {.py: code}           # a request that names such a file is of that domain
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cogumi.cascade.self_consistency import FEWEST, MOST
from cogumi.confidence.policy import Policy
from cogumi.core.errors import CogumiError, RequestError

AUTO = "auto"
TAKEN = (AUTO, "base", "draft")
"""Names that mean something else."""
FAILED_BEFORE = "accurate"
"""The mode for a domain in which an answer to the same user was wrong before."""


class Mode(BaseModel):
    """The tiers that may answer (see `Policy`), and what is tried for a hard question to which no answer was sure.

    `votes` sampled answers vote, the critic may have an answer written again (`critique` rounds), and the
    base may see up to so many `examples` that suit the question.
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
        if votes and not FEWEST <= votes <= MOST:
            raise ValueError(f"{votes} answers cannot vote; give {FEWEST} to {MOST}, or 0")
        return votes

    @property
    def policy(self) -> Policy:
        """Which tiers answer."""
        return Policy(self.draft, self.modifier, self.modifier_first)

    @property
    def deliberates(self) -> bool:
        """Whether more may be tried where no answer was sure."""
        return bool(self.votes or self.critique or self.examples)


MODES: Mapping[str, Mode] = {
    "fast": Mode(),
    "balanced": Mode(modifier=True),
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
    """The operator's choices; see the module's text."""

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
            if name in TAKEN or name.startswith("base+"):
                raise ValueError(f"the mode '{name}' would hide what goes by that name already; give it another")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All modes by name, without `auto`."""
        return tuple({**MODES, **self.modes})

    def mode(self, name: str) -> Mode:
        """The mode of that name. Raises `RequestError` naming the known ones."""
        known = {**MODES, **self.modes}
        if name not in known:
            raise RequestError(f"unknown mode '{name}': choose one of {', '.join((AUTO, *known))}")
        return known[name]

    def check(self, name: str | None) -> None:
        """Raise `RequestError` for the name of no mode."""
        if name not in (None, AUTO):
            self.mode(str(name))

    def choose(self, asked: str | None, domain: str | None, failed: Collection[str]) -> Choice:
        """The mode of a request that asks for `asked`, of a question of `domain`; the user had `failed` domains."""
        if asked not in (None, AUTO):
            return Choice(str(asked), self.mode(str(asked)), "the request says so")
        if domain in failed:
            return Choice(FAILED_BEFORE, self.mode(FAILED_BEFORE), f"an answer about {domain} was wrong before")
        if domain in self.domains:
            name = self.domains[str(domain)]
            return Choice(name, self.mode(name), f"the settings choose it for {domain}")
        return Choice(self.default, self.mode(self.default), "the default")

    def file_domain(self, files: Sequence[str], domains: Collection[str]) -> str | None:
        """The domain that the names of files speak for, None unless all that speak agree."""
        found = {self.files.get(PurePath(name).suffix.casefold()) for name in files} & set(domains)
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Choice:
    """A mode with its name and why it was chosen."""

    name: str
    mode: Mode
    reason: str


def load_settings(path: Path | None) -> Settings:
    """Settings from a YAML file (None: the defaults). Raises `CogumiError` with the place of a mistake."""
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

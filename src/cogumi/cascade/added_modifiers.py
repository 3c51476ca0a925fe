"""Modifiers added at run time and listed in the state folder, so that a restart restores them (SPEC E8).

They answer only requests that name them. The router does not choose them and their answers are never accepted, because
no gate was calibrated on them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ConfigDict, ValidationError

from cogumi.core.errors import CogumiError, RequestError, StateError
from cogumi.core.files import FileEntry, difference, file_entries, write_json
from cogumi.engine.protocol import Capability, Engine, ExtensibleEngine, lacking

FILE = "modifiers.json"
"""Name of the list in the state folder."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


class Added(BaseModel):
    """An added file, with its size and checksum at that time."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    entry: FileEntry


class _ModifierList(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    modifiers: Mapping[str, Added] = {}


def add_modifier(engine: Engine, name: str, path: Path, file: Path | None) -> None:
    """Make an adapter file available as `name`, and add it to the list `file` (None: only until the engine closes).

    Raises `RequestError` if the engine lacks the capability, or for an invalid name or one in use; `BundleError` for an
    adapter of another base; `StateError` if the modifier was added but the list could not be written.
    """
    _check(engine, name)
    known = _read(file) if file else {}
    path = path.resolve()
    cast(ExtensibleEngine, engine).add_adapter(name, path)
    if file:
        try:
            added = Added(path=path, entry=file_entries(path.parent, [path.name])[path.name])
            write_json(file, _ModifierList(modifiers={**known, name: added}).model_dump(mode="json"))
        except OSError as error:
            raise StateError(
                f"the modifier {name!r} was added only until the cascade closes: {file} cannot be written ({error})"
            ) from error


def restore_modifiers(engine: Engine, file: Path) -> None:
    """Add the listed modifiers; a failure is a warning. Raises `StateError` for an invalid list."""
    for name, added in _read(file).items():
        try:
            if changed := difference(added.path.parent, {added.path.name: added.entry}):
                raise RequestError(f"in {added.path.parent}, {changed}")
            _check(engine, name)
            cast(ExtensibleEngine, engine).add_adapter(name, added.path)
        except CogumiError as error:
            warnings.warn(f"the earlier added modifier {name!r} is skipped: {error}", stacklevel=2)


def _check(engine: Engine, name: str) -> None:
    if Capability.RUNTIME_ADAPTERS not in engine.capabilities:
        raise lacking(engine, Capability.RUNTIME_ADAPTERS)
    if not _NAME.fullmatch(name):
        raise RequestError(f"{name!r} is not a valid modifier name: use up to 100 letters, digits, '_' and '-'")
    if name in engine.adapters:
        raise RequestError(f"the modifier name {name!r} is already in use; choose another name")


def _read(file: Path) -> Mapping[str, Added]:
    if not file.exists():
        return {}
    try:
        return _ModifierList.model_validate_json(file.read_bytes()).modifiers
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise StateError(
            f"{file} is not a list of modifiers ({reason}); delete it and add the modifiers again"
        ) from error

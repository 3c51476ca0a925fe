"""Modifiers added while a cascade runs, and kept over restarts in the state folder (SPEC E8).

They answer requests that name them. The router never chooses one: no gate was calibrated on its answers, so none of
them counts as sure, whatever domain it is named after.
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
    """A file that was added, as it was then."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    entry: FileEntry


class _List(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    modifiers: Mapping[str, Added] = {}


def add_modifier(engine: Engine, name: str, path: Path, file: Path | None) -> None:
    """Make an adapter file available as `name`, and note it in the list `file` (None: until the engine is closed).

    Raises `RequestError` if the engine cannot, or for a name that is taken or not allowed; `BundleError` if the adapter
    is not one of this base, `StateError` if it was added but could not be noted.
    """
    _check(engine, name)
    known = _read(file) if file else {}
    path = path.resolve()
    cast(ExtensibleEngine, engine).add_adapter(name, path)
    if file:
        try:
            added = Added(path=path, entry=file_entries(path.parent, [path.name])[path.name])
            write_json(file, _List(modifiers={**known, name: added}).model_dump(mode="json"))
        except OSError as error:
            raise StateError(
                f"the modifier {name!r} was added until the end only, because {file} cannot be written ({error})"
            ) from error


def restore_modifiers(engine: Engine, file: Path) -> None:
    """Add what the list holds. What cannot be added is left out with a warning. Raises `StateError` for no list."""
    for name, added in _read(file).items():
        try:
            if changed := difference(added.path.parent, {added.path.name: added.entry}):
                raise RequestError(f"in {added.path.parent}, {changed}")
            _check(engine, name)
            cast(ExtensibleEngine, engine).add_adapter(name, added.path)
        except CogumiError as error:
            warnings.warn(f"the modifier {name!r} that was added before is left out: {error}", stacklevel=2)


def _check(engine: Engine, name: str) -> None:
    if Capability.RUNTIME_ADAPTERS not in engine.capabilities:
        raise lacking(engine, Capability.RUNTIME_ADAPTERS)
    if not _NAME.fullmatch(name):
        raise RequestError(f"{name!r} cannot name a modifier: use up to 100 letters, digits, '_' and '-'")
    if name in engine.adapters:
        raise RequestError(f"there is a modifier {name!r} already; give the new one another name")


def _read(file: Path) -> Mapping[str, Added]:
    if not file.exists():
        return {}
    try:
        return _List.model_validate_json(file.read_bytes()).modifiers
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise StateError(f"{file} does not list modifiers ({what}); delete it and add them again") from error

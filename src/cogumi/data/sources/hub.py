"""Data sets of the Hugging Face Hub, as the library `datasets` keeps them on this machine (SPEC A1).

`hub:owner/name/configuration/split` names one, as the address of its viewer on the Hub does. Nothing is downloaded: a
build reads the files of the newest revision in the cache, so that it neither needs a network nor changes with the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cogumi.core.errors import DataError
from cogumi.core.packages import load

PREFIX = "hub:"


def is_hub_id(path: Path) -> bool:
    """Whether a path is an id of the Hub."""
    return str(path).startswith(PREFIX)


def cached_files(path: Path) -> list[Path]:
    """The Arrow files of a split. Configuration and split may be left out where the cache has only one.

    Raises `DataError`, with the command that fills the cache, if they are not in it.
    """
    owner, name, configuration, split = _parts(path)
    datasets = load("datasets", f"the data set {path}")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    folder = cache / f"{owner}___{load('datasets.naming', str(path)).camelcase_to_snakecase(name)}"
    found = sorted(folder.glob("*/*/*/dataset_info.json"), key=lambda file: file.stat().st_mtime)
    revisions = {file.parts[-4]: file.parent for file in found}  # the newest of each configuration
    if not revisions or (configuration and configuration not in revisions):
        wanted = ", ".join(repr(part) for part in (f"{owner}/{name}", configuration) if part)
        has = f", which has {_ids(owner, name, revisions)}" if revisions else ""
        raise DataError(
            f"{path} is not in the cache of `datasets`{has}; where the Hub can be reached, run "
            f'python -c "import datasets; datasets.load_dataset({wanted})", and copy {folder} from there'
        )
    configuration = configuration or _only(path, "configurations", _ids(owner, name, revisions), list(revisions))
    version, revision = revisions[configuration].parts[-2:]
    builder: Any = load("datasets.packaged_modules.cache.cache", str(path)).Cache(
        repo_id=f"{owner}/{name}", dataset_name=name, config_name=configuration, version=version, hash=revision
    )
    splits = list(builder.info.splits)
    known = _ids(owner, name, [f"{configuration}/{one}" for one in splits])
    if split and split not in splits:
        raise DataError(f"{path} has no such split; it has {known}")
    split = split or _only(path, "splits", known, splits)
    return [Path(file["filename"]) for file in builder.as_dataset(split).cache_files]


def _parts(path: Path) -> tuple[str, str, str, str]:
    """Owner, name, configuration and split; the last two may be empty."""
    parts = str(path).removeprefix(PREFIX).split("/")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise DataError(f"'{path}' is not of the form {PREFIX}owner/name/configuration/split")
    owner, name, configuration, split = [*parts, "", ""][:4]
    return owner, name, configuration, split


def _ids(owner: str, name: str, endings: Iterable[str]) -> str:
    return ", ".join(f"{PREFIX}{owner}/{name}/{ending}" for ending in sorted(endings))


def _only(path: Path, what: str, ids: str, found: list[str]) -> str:
    if len(found) > 1:
        raise DataError(f"{path} has several {what}: name one of {ids}")
    return found[0]

"""The file of the second check of reused answers: fitted by suite `cache`, read by the answer cache (SPEC F12)."""

from __future__ import annotations

import json
from pathlib import Path

from cogumi.confidence.nets import Net
from cogumi.confidence.reuse import FEATURES
from cogumi.core.errors import StateError
from cogumi.core.files import write_json

VERSION = 1
HOW_TO_FIT = "fit it again: cogumi eval BUNDLE --suite cache --data FOLDER --out FOLDER"


def write_check(path: Path, check: Net, encoder: str) -> None:
    """Write a check on `pair_features` with the cosines of the encoder with that identity."""
    value = {"format": VERSION, "encoder": encoder, "features": FEATURES, "check": check.to_json()}
    write_json(path, value)


def read_check(path: Path, encoder: str) -> Net:
    """Read a check. Raises `StateError` for an invalid file, or a check of another encoder."""
    try:
        value = json.loads(path.read_bytes())
        found = value["format"], tuple(value["features"])
        made_for, check = value["encoder"], Net.from_json(value["check"])
    except OSError as error:
        raise StateError(
            f"the reuse check {path} cannot be read ({error.strerror}); name the file, or {HOW_TO_FIT}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"{path} is not a reuse check; {HOW_TO_FIT}") from error
    if found != (VERSION, FEATURES) or len(check.mean) != len(FEATURES) or len(check.layers[-1][1]) != 1:
        raise StateError(f"{path} is a reuse check of another version of cogumi; {HOW_TO_FIT}")
    if made_for != encoder:
        raise StateError(f"{path} was fitted with another encoder than this bundle's; {HOW_TO_FIT}")
    return check

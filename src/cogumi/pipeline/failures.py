"""Adds the step's name to errors, and detects a full disk."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogumi.core.errors import CogumiError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")


@contextmanager
def named(name: str, folder: Path) -> Iterator[None]:
    """Prefix errors of the block with `name`; an error about a full disk names `folder`.

    Libraries raise different exceptions for a full disk (OSError, RuntimeError, safetensors' own), so the message text
    is checked too.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        if full or any(words in str(error) for words in _DISK_WORDS):
            raise CogumiError(
                f"{name}: the disk is full while writing {folder} ({error}); free space and run "
                "the same command again: finished steps are kept"
            ) from error
        if isinstance(error, CogumiError):
            raise type(error)(f"{name}: {error}") from error
        raise

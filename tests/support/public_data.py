"""Public data that some tests read: real files that are not part of the repository (see CONTRIBUTING.md)."""

import os
import random
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("COGUMI_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
"""The environment variable `COGUMI_TEST_DATA`, or `shared/data` beside the checkout."""


def public_data(name: str) -> Path:
    """A file or folder of the public data. Skips the calling test if it is missing."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is missing: set COGUMI_TEST_DATA to the folder of public data")
    return path


def public_lines(count: int) -> list[str]:
    """Lines of books, encyclopedia articles and source code, drawn with a fixed seed."""
    lines = [
        line
        for name in ("input.txt", "test.txt", "1342.txt", "2701.txt")
        for line in public_data(f"corpus_text/{name}").read_text(encoding="utf-8", errors="replace").split("\n")
    ]
    with tarfile.open(public_data("corpus_code/TheAlgorithms+Python.py.tar.gz")) as archive:
        for member in archive.getmembers()[:400]:
            if member.isfile():
                text = archive.extractfile(member).read().decode("utf-8", errors="replace")
                lines += [text[i : i + 200] for i in range(0, len(text), 200)]  # split anywhere, newlines kept
    return random.Random(3).sample(lines, count)

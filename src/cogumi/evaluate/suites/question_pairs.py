"""Labelled pairs of equivalent and different questions, from public files (SPEC F12)."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cogumi.core.errors import DataError

SAME = 4.0
"""Least grade (0 to 5) of equivalent pairs in STS: "mostly equivalent, but some unimportant details differ"."""
_NAMES = (
    ("text_a", "text_b", "label"),
    ("question1", "question2", "is_duplicate"),
    ("sentence1", "sentence2", "label"),
    ("origin", "similar", "label"),
)

Pairs = dict[tuple[str, str], bool]


def read_pairs(path: Path) -> Pairs:
    """(question, question) -> whether they are equivalent, from a file or all files in a folder.

    Formats are JSON and CSV, optionally compressed (`.gz`, also with a tar archive inside): objects with one of the
    key triples in `_NAMES`, or rows (text, text, grade 0 to 5). Pairs without a label are equivalent. Raises
    `DataError` if there are no pairs.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    pairs: Pairs = {}
    for file in files:
        for a, b, same in _rows(file):
            if same is not None or (a, b) not in pairs:
                pairs[a, b] = same is not False
    if not pairs:
        raise DataError(f"{path} holds no pairs: give JSON with text_a, text_b, label, or CSV rows text,text,grade")
    return pairs


def _rows(file: Path) -> Iterator[tuple[str, str, bool | None]]:
    try:
        text = _text(file)
        if ".json" in file.name:
            values = json.loads(text)
            yield from filter(None, map(_labelled, values if isinstance(values, list) else []))
        elif file.suffix == ".csv":
            yield from ((one, other, float(grade) >= SAME) for one, other, grade in csv.reader(io.StringIO(text)))
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{file} cannot be read as pairs of questions: {error}") from error


def _text(file: Path) -> str:
    if file.suffix != ".gz":
        return file.read_text(encoding="utf-8") if file.suffix in (".json", ".csv") else ""
    if not tarfile.is_tarfile(file):
        return gzip.decompress(file.read_bytes()).decode("utf-8")
    with tarfile.open(file) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content and not Path(member.name).name.startswith("."):
                return content.read().decode("utf-8")
    return ""


def _labelled(value: Any) -> tuple[str, str, bool | None] | None:
    for one, other, label in _NAMES:
        if isinstance(value, dict) and isinstance(value.get(one), str) and isinstance(value.get(other), str):
            found = value.get(label)
            return value[one], value[other], None if found is None else bool(int(found))
    return None


def groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Question -> the name of its group: the connected components of the pairs (union-find)."""
    parent: dict[str, str] = {}

    def root(question: str) -> str:
        while (above := parent.setdefault(question, question)) != question:
            parent[question] = question = parent[above]
        return question

    for one, other in pairs:
        parent[root(one)] = root(other)
    return {question: root(question) for question in list(parent)}


def parts(pairs: Pairs, shares: Sequence[float], most: int, seed: int) -> list[Pairs]:
    """About `most` pairs at most, in parts of these shares; no question is in two parts."""
    group = groups(pairs)
    members: dict[str, Pairs] = {}
    for pair, same in pairs.items():
        members.setdefault(group[pair[0]], {})[pair] = same
    order = sorted(members)
    rng = random.Random(seed)
    rng.shuffle(order)
    found: list[Pairs] = [{} for _ in shares]
    taken = 0
    for name in order:
        if taken >= most:
            break
        taken += len(members[name])
        rng.choices(found, shares)[0].update(members[name])
    return found

"""Cuts questions and outputs into chunks for outside review, and joins the verdicts back (SPEC A10).

Two files are paired line by line: examples, and the outputs to them. A chunk is `chunk_001_test.jsonl` with examples
and `chunk_001_model.jsonl` with outputs, the same lines of both. Every line has the key `id`: that of the example, or
its number. A reviewer returns `chunk_001_verdict.jsonl`, a line {"id", ...} for each. `summary.json` has the ids of
every chunk, so that `join` can find a line that is missing, repeated or foreign.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cogumi.core.errors import DataError
from cogumi.core.files import write_text

SUMMARY = "summary.json"
LINES = 7
"""Default number of lines of a chunk."""
Row = dict[str, Any]


class Joined(NamedTuple):
    """Examples with outputs and verdicts, in the order of the examples; ids without a verdict, and foreign ids."""

    rows: list[Row]
    missing: list[str]
    foreign: list[str]


def split(examples: Path, outputs: Path, out: Path, lines: int | None = None, largest: int | None = None) -> Row:
    """Write the chunks into the new folder `out`: of `lines` lines each, or of files of at most `largest` bytes.

    Returns the summary. Raises `DataError` if the files do not pair, or if `out` has files already.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty: name a new folder")
    pairs = _pairs(list(_lines(examples)), list(_lines(outputs)), examples, outputs)
    parts = _by_size(pairs, largest) if largest else _by_count(pairs, lines or LINES)
    out.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, part in enumerate(parts, 1):
        for kind, rows in (("test", [test for test, _ in part]), ("model", [model for _, model in part])):
            write_text(out / f"chunk_{number:03}_{kind}.jsonl", "".join(map(_line, rows)))
        listed.append({"chunk": f"chunk_{number:03}", "lines": len(part), "ids": [test["id"] for test, _ in part]})
    summary = {"examples": examples.name, "outputs": outputs.name, "lines": len(pairs), "chunks": listed}
    write_text(out / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    return summary


def join(folder: Path, strict: bool = False) -> Joined:
    """The verdicts in `folder`, each beside its example and output; verdicts may lack lines or have another order.

    Raises `DataError` for a chunk whose own lines differ from the summary and for a repeated verdict; `strict` also for
    a missing or foreign one.
    """
    summary = _summary(folder)
    rows, missing, foreign = list[Row](), list[str](), list[str]()
    for chunk in summary["chunks"]:
        name, ids = chunk["chunk"], chunk["ids"]
        tests, models = (list(_lines(folder / f"{name}_{kind}.jsonl")) for kind in ("test", "model"))
        for kind, found in (("test", tests), ("model", models)):
            _check_ids([str(row.get("id")) for row in found], ids, folder / f"{name}_{kind}.jsonl")
        verdicts = _verdicts(folder / f"{name}_verdict.jsonl")
        foreign += [id for id in verdicts if id not in set(ids)]
        for id, test, model in zip(ids, tests, models, strict=True):
            if id in verdicts:
                rows.append({"id": id, "example": test, "output": model, "verdict": verdicts[id]})
            else:
                missing.append(id)
    if strict and (missing or foreign):
        what = f"{len(missing)} lines have no verdict" if missing else f"{len(foreign)} verdicts belong to no line"
        raise DataError(
            f"{folder}: {what}, the first is id {(missing or foreign)[0]}; leave out --strict to join the rest"
        )
    return Joined(rows, missing, foreign)


def _lines(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file. Raises `DataError` with the line of anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number} is not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number} is no JSON object")
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path") from error


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _pairs(tests: list[Row], models: list[Row], examples: Path, outputs: Path) -> list[tuple[Row, Row]]:
    """The lines of both files with equal ids. Raises `DataError` if they do not pair."""
    if not tests or len(tests) != len(models):
        raise DataError(
            f"{examples.name} has {len(tests)} lines, {outputs.name} {len(models)}: they must pair line by line"
        )
    pairs = []
    seen: set[str] = set()
    for number, (test, model) in enumerate(zip(tests, models, strict=True), 1):
        ids = {str(row["id"]) for row in (test, model) if row.get("id") not in (None, "")}
        if len(ids) > 1:
            raise DataError(f"line {number}: {examples.name} has id {test['id']}, {outputs.name} has id {model['id']}")
        id = ids.pop() if ids else str(number)
        if id in seen:
            raise DataError(f"line {number}: the id {id} is repeated, so that verdicts could be mixed up")
        seen.add(id)
        pairs.append(({**test, "id": id}, {**model, "id": id}))
    return pairs


def _by_count(pairs: Sequence[tuple[Row, Row]], lines: int) -> list[Sequence[tuple[Row, Row]]]:
    return [pairs[start : start + lines] for start in range(0, len(pairs), lines)]


def _by_size(pairs: Sequence[tuple[Row, Row]], largest: int) -> list[Sequence[tuple[Row, Row]]]:
    """As few parts as keep both files of each below `largest` bytes. Raises `DataError` for a line that is larger."""
    parts: list[list[tuple[Row, Row]]] = [[]]
    sizes = [0, 0]
    for test, model in pairs:
        lines = [len(_line(row).encode()) for row in (test, model)]
        if max(lines) > largest:
            raise DataError(f"the line with id {test['id']} has {max(lines):,} bytes, more than a chunk may have")
        if any(size + line > largest for size, line in zip(sizes, lines, strict=True)):
            parts.append([])
            sizes = [0, 0]
        parts[-1].append((test, model))
        sizes = [size + line for size, line in zip(sizes, lines, strict=True)]
    return list(parts)


def _summary(folder: Path) -> Row:
    try:
        summary: Row = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        assert all(isinstance(chunk["ids"], list) for chunk in summary["chunks"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{folder} is no folder of `cogumi data split`: {SUMMARY} cannot be read ({error})") from error
    return summary


def _check_ids(found: Sequence[str], wanted: Sequence[str], path: Path) -> None:
    """Raise `DataError` at the first line whose id is not that of the summary."""
    if len(found) != len(wanted):
        raise DataError(f"{path} has {len(found)} lines, but {len(wanted)} were written: take the original file")
    for number, (id, right) in enumerate(zip(found, wanted, strict=True), 1):
        if id != right:
            raise DataError(f"{path}:{number} has id {id}, but {right} was written: take the original file")


def _verdicts(path: Path) -> dict[str, Row]:
    """Verdicts by id; none without the file. Raises `DataError` for a line without an id, and for a repeated one."""
    found: dict[str, Row] = {}
    for number, row in enumerate(_lines(path) if path.is_file() else (), 1):
        if row.get("id") in (None, ""):
            raise DataError(f"{path}:{number} has no id")
        if (id := str(row["id"])) in found:
            raise DataError(f"{path}:{number}: a second verdict for id {id}")
        found[id] = {key: value for key, value in row.items() if key != "id"}
    return found

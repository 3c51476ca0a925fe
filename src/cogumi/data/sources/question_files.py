"""Reads a user's question-answer files row by row, in constant memory (SPEC A1).

A path is a file, a folder, a pattern or a data set of the Hub (`containers`); its rows are written in one of
`layouts.LAYOUTS`, and have one of the forms of `forms.FORMS`, or the columns that a `Reading` names. A row may also
have "domain", "difficulty" (a level from 1 to 5, or easy, medium, hard; 0, null or absent: no level) and "check" (see
`grading.graders`), in the row or in its "meta". An unusable row does not stop reading; it is returned as a `Rejected`
with its line and the reason. Columns that are not used are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cogumi.core.errors import DataError
from cogumi.core.files import sha256
from cogumi.core.registry import nearest
from cogumi.core.types import Example
from cogumi.data.examples import LICENCE, example_id, to_line
from cogumi.data.sources.containers import DAMAGED, documents, files_of
from cogumi.data.sources.forms import FORMS
from cogumi.data.sources.forms.pairs import Form, Pair
from cogumi.data.sources.layouts import LAYOUTS, cut_off, rows_of
from cogumi.grading.checks import check_problem
from cogumi.grading.graders import problem_of

_LICENCES = (LICENCE, "license")
USED = ("id", "domain", "difficulty", "check", "meta", "source", *_LICENCES)
"""Columns that a row of any form may have; `id` and `source` are replaced by those of the file's row."""
COLUMNS = ("question", "answer", "passage", "system", "history", "rejected", "domain", "difficulty", "licence")
"""What a mapping of columns may name."""
_LEVELS = {"easy": 1, "medium": 3, "hard": 5}
_KEYS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Rejected:
    """An unusable row; `line` is its first line, counted from 1; 0 for a whole file, or what is missing of it."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read where their names and rows do not say it: a layout, a form, or the columns of a question.

    `columns` maps names of `COLUMNS` to those of the file; `licence` is that of rows which name none. Raises
    `DataError` for unknown names.
    """

    layout: str | None = None
    form: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None

    def __post_init__(self) -> None:
        known = {form.name: form for form in FORMS}
        if self.layout is not None and self.layout not in LAYOUTS:
            raise DataError(f"layout '{self.layout}' is unknown: {nearest(self.layout, list(LAYOUTS))}")
        if self.form is not None and self.form not in known:
            raise DataError(f"form '{self.form}' is unknown: {nearest(self.form, list(known))}")
        for name in self.columns:
            if name not in COLUMNS:
                raise DataError(f"columns: '{name}' is not one of {', '.join(COLUMNS)}")
        if self.columns and not {"question", "answer"} <= set(self.columns):
            raise DataError("columns must name the question and the answer: question=NAME and answer=NAME")


@dataclass(slots=True)
class Seen:
    """What was seen in files: rows of each form, and rows with each column that is not used."""

    forms: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)


def load(path: Path, domain: str = "general", reading: Reading | None = None) -> tuple[list[Example], list[Rejected]]:
    """All usable and all rejected rows of a path; DataError if none is usable."""
    rows = list(iterate(path, domain, reading=reading))
    examples = [row for row in rows if isinstance(row, Example)]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    if not examples:
        raise DataError(no_usable_row(str(path), len(rejected), rejected[0] if rejected else None))
    return examples, rejected


def no_usable_row(where: str, rejected: int, first: Rejected | None) -> str:
    """The message for input without a usable row: the number of rejected rows, and the first of them."""
    if first is None:
        return f"{where} is empty: give a file with at least one row"
    return (
        f"{where} has no usable row; {rejected} were rejected, the first is {first}; docs/your-data.md shows the forms "
        "that are read; name its columns with `--column question=NAME --column answer=NAME`, or `columns` of a recipe"
    )


def iterate(
    path: Path, domain: str = "general", seen: Seen | None = None, reading: Reading | None = None
) -> Iterator[Example | Rejected]:
    """Stream the rows of a path: an `Example` or a `Rejected` for each. `domain` is that of rows without one.

    Raises `DataError` if a file cannot be opened, or if a folder or a pattern has none.
    """
    seen, reading = seen or Seen(), reading or Reading()
    for file in files_of(path):
        try:
            for document in documents(file):
                where = str(file) if document.place == file.name else f"{file.parent / document.place}"
                if document.problem:
                    yield Rejected(where, 0, document.problem)
                    continue
                for line, row in rows_of(document, reading.layout):
                    yield from _examples(row, domain, where, line, seen, reading, file)
        except (*DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{file} cannot be read ({error.strerror}): check the path") from error
            yield Rejected(str(file), 0, cut_off(error))


def _examples(
    row: Mapping[str, Any] | Exception, domain: str, where: str, line: int, seen: Seen, reading: Reading, file: Path
) -> Iterator[Example | Rejected]:
    """The examples of one row, or why there is none."""
    try:
        if isinstance(row, Exception):
            raise row
        named = _named(row, reading)
        if isinstance(named.get("function"), list):  # BFCL keeps the right calls in a file beside it
            named = {**_right_calls(file).get(str(named.get("id")), {}), **named}
        form = _form_of(named, row, reading)
        pairs = form.read(named)
        found = [_example(named, pair, domain, f"{Path(where).name}:{line}", reading) for pair in pairs]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"unexpected values ({error!r})"
        keys = f"; the row has {_keys(row)}" if reason.startswith("there is no") and isinstance(row, dict) else ""
        yield Rejected(where, line, reason + keys)
        return
    seen.forms[form.name] += 1
    used = {name for pair in pairs for name in pair.used} | set(USED)
    names = {name for name, value in row.items() if value not in (None, "", [], {})} - set(reading.columns.values())
    seen.unused.update(name for name in names if name.casefold() not in used or reading.columns)
    seen.unused.update({what for pair in pairs for what in pair.unused})
    yield from found


def _named(row: Mapping[str, Any], reading: Reading) -> Mapping[str, Any]:
    """A row with its columns under the names of the forms: in small letters, or as `columns` maps them."""
    if reading.columns:
        missing = [column for column in reading.columns.values() if column not in row]
        if missing:
            raise ValueError(f"no column '{missing[0]}': the row has {_keys(row)}")
        return {name: row[column] for name, column in reading.columns.items()}
    lowered = {name.casefold(): value for name, value in row.items()}
    return lowered if len(lowered) == len(row) else row


def _form_of(named: Mapping[str, Any], row: Mapping[str, Any], reading: Reading) -> Form:
    wanted = "question" if reading.columns else reading.form
    form = next((f for f in FORMS if (f.name == wanted if wanted else f.fits(named))), None)
    if form is None:
        raise ValueError(
            f"no form fits a row with {_keys(row)}: rows need a question and an answer, such as 'question' and "
            "'answer', 'instruction' and 'output', or 'messages'"
        )
    return form


def _keys(row: Mapping[str, Any]) -> str:
    names = [f"'{str(name)[:40]}'" for name in row]
    return ", ".join(names[:_KEYS_SHOWN]) + (" ..." if len(names) > _KEYS_SHOWN else "") if names else "no columns"


def _example(row: Mapping[str, Any], pair: Pair, domain: str, source: str, reading: Reading) -> Example:
    """A pair as an example; `ValueError` if its domain, level or check is wrong."""
    domain = row.get("domain") or domain
    if not isinstance(domain, str):
        raise ValueError("domain must be a non-empty string")
    meta = _meta(row)
    if pair.check is not None and "check" not in meta:
        meta["check"] = dict(pair.check)
    if pair.rejected:
        meta["rejected"] = pair.rejected
    if licences := _licences(row, meta, {LICENCE: reading.licence}):
        meta[LICENCE] = licences
    example = Example(
        example_id(domain, pair.messages),
        domain,
        _level(row.get("difficulty")),
        pair.messages,
        pair.answer,
        source,
        meta,
    )
    if "check" in meta and (problem := problem_of(example)):
        raise ValueError(problem)
    try:
        to_line(example).encode()
    except UnicodeEncodeError as error:
        raise ValueError("not UTF-8 text, or an unpaired surrogate, which cannot be encoded as UTF-8") from error
    return example


def _licences(*holders: Mapping[str, Any]) -> list[str]:
    """The licences that the first of some objects names which names any, as a text or a list."""
    value: Any = next((holder[name] for holder in holders for name in _LICENCES if holder.get(name)), [])
    return [str(name).strip() for name in (value if isinstance(value, list) else [value])]


def _level(value: Any) -> int:
    """A difficulty as a level; 0 without one."""
    if value in (None, ""):
        return 0
    level = _LEVELS.get(value.strip().casefold(), value) if isinstance(value, str) else value
    try:
        number = int(level)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 <= number <= 5 or (isinstance(level, float) and level != number):
        raise ValueError("difficulty must be a whole number from 1 to 5, easy, medium or hard, or 0 without a level")
    return number


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's `meta` with its valid check, which may also be a column of its own."""
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise ValueError("meta must be an object")
    check = row.get("check") or meta.get("check")
    if check is not None and (problem := check_problem(check)):
        raise ValueError(problem)
    rest = {name: value for name, value in meta.items() if name != "check"}
    return rest if check is None else rest | {"check": check}


def companions(file: Path) -> list[Path]:
    """The files that rows of a file are joined with: BFCL's right calls, of the same name in `possible_answer`."""
    beside = file.parent / "possible_answer" / file.name
    return [beside] if beside.is_file() else []


def content_hashes(paths: Iterable[Path]) -> list[str]:
    """The sorted hashes of all files that some paths name. Raises `DataError` for a file that is not there."""
    hashes = {}
    for file in (file for path in paths for file in files_of(path)):
        if not file.is_file():
            raise DataError(f"there is no file {file}; check the path")
        hashes.update({str(one): sha256(one) for one in (file, *companions(file))})
    return sorted(hashes.values())


@cache
def _right_calls(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """BFCL's right calls by id; empty without a file of them."""
    lines = [line for beside in companions(file) for line in beside.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines if line.strip()]
    return {str(row["id"]): {"ground_truth": row["ground_truth"]} for row in rows}

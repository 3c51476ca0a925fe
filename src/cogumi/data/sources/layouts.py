"""How rows are written: JSON Lines, a JSON array or object, CSV, Parquet, Arrow, plain text, Python (SPEC A1).

Each layout yields (line, row) one by one, in constant memory; a row that cannot be read is a `ValueError` instead.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from cogumi.core.errors import DataError
from cogumi.core.packages import load
from cogumi.data.sources.containers import DAMAGED, Document
from cogumi.data.sources.forms import FORMS
from cogumi.data.sources.forms.documents import functions, sections

MAX_ROW, MAX_DOCUMENT = 64 << 20, 256 << 20
"""Bytes of the longest row, and of the longest plain text."""
Rows = Iterator[tuple[int, Mapping[str, Any] | Exception]]

_BY_NAME = {"csv": "csv", "tsv": "tsv", "arrow": "arrow", "py": "python", "txt": "text", "md": "text"}
_CHUNK = 1 << 16
_MARKS = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)
_OPENERS = {b"]": b"[", b"}": b"{"}


def rows_of(document: Document, layout: str | None = None) -> Rows:
    """The rows of a document; `layout` (a key of `LAYOUTS`) overrides what its name and its beginning say.

    Raises `DataError` if the layout is unknown.
    """
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"layout '{layout}' is not one of {', '.join(LAYOUTS)}")
    stream = cast(io.BufferedReader, document.stream)
    line = 0
    try:
        read = LAYOUTS[layout or detected(document.name, stream.peek(_CHUNK))]
        for line, row in read(document):
            yield line, row
    except (*DAMAGED, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield line + 1, ValueError(cut_off(error))


def cut_off(error: Exception) -> str:
    """The message for a file that cannot be read to its end."""
    return f"the file cannot be read on: {str(error) or type(error).__name__}; is it complete?"


def detected(name: str, head: bytes) -> str:
    """The layout of a file, by its name, and for JSON by its beginning."""
    ending = name.casefold().rsplit(".", 1)[-1]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16: save it as UTF-8")
    if head.startswith(b"PAR1"):
        return "parquet"
    if ending in _BY_NAME:
        return _BY_NAME[ending]
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if begins.startswith(b"["):
        return "array"
    if begins.startswith(b"{"):
        first, _, rest = begins.partition(b"\n")
        one_a_line = ending in ("jsonl", "ndjson") or (first.strip().endswith(b"}") and rest.lstrip().startswith(b"{"))
        return "lines" if one_a_line or _is_row(first) else "object"
    return "lines"


def _is_row(line: bytes) -> bool:
    """Whether a line is a JSON object that is a row itself, and not one that holds the rows."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and any(form.fits({k.casefold(): v for k, v in value.items()}) for form in FORMS)


def _lines(document: Document) -> Rows:
    number = 0
    skip = len(codecs.BOM_UTF8)
    while raw := document.stream.readline(MAX_ROW + 1):
        number += 1
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            raw = raw[skip:]
        if len(raw) > MAX_ROW:
            while raw and not raw.endswith(b"\n"):
                raw = document.stream.readline(MAX_ROW)
            yield number, ValueError(f"the row is longer than {MAX_ROW >> 20} MiB")
        elif raw.strip():
            yield number, _parsed(raw.strip())


def _parsed(raw: bytes) -> Mapping[str, Any] | Exception:
    if not raw:
        return ValueError("a row is missing here: an extra comma, or the file is truncated")
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: {error}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")
    return row if isinstance(row, dict) else ValueError("a row must be a JSON object")


def _array(document: Document) -> Rows:
    return ((line, _parsed(raw)) for line, raw in _elements(document, 1))


def _object(document: Document) -> Rows:
    """The objects of the lists in one JSON object."""
    found = False
    for line, raw in _elements(document, 2):
        if raw.startswith(b"{") or not raw:
            found = True
            yield line, _parsed(raw)
    if not found:
        yield 1, ValueError("the JSON object holds no list of rows")


def _elements(document: Document, depth: int) -> Iterator[tuple[int, bytes]]:
    """(line number, text) of every element of the lists at a depth of brackets, one element and chunk in memory.

    The list is split at commas outside strings and inner brackets, so that an invalid element rarely affects the
    next. A missing element, or the missing end of the list, gives an empty text.
    """
    line, pending, quoted, after_comma = 1, b"", False, False
    brackets: list[bytes] = []
    first = True
    file = cast(io.BufferedReader, document.stream)
    while chunk := file.read1(_CHUNK):  # `read` would lose what stands before the place where a file is cut off
        while chunk.endswith(b"\\") and (following := file.read(1)):  # do not split an escape sequence
            chunk += following
        begin = 0
        if first:
            chunk, first = chunk.removeprefix(codecs.BOM_UTF8), False
        for match in _MARKS.finditer(chunk):
            mark = match.group()
            if mark == b'"':
                quoted = not quoted
            if quoted or mark[:1] in b'"\\':
                continue
            if mark in _OPENERS.values():
                brackets.append(mark)
            elif mark in _OPENERS and _OPENERS[mark] in brackets:
                while brackets.pop() != _OPENERS[mark]:  # close brackets that an invalid element left open
                    pass
            inside = len(brackets) == depth and brackets[-1] == b"["
            if (inside and mark in b"[,") or (len(brackets) == depth - 1 and mark == b"]"):
                text = pending + chunk[begin : match.start()]
                if mark != b"[" and (text.strip() or mark == b"," or after_comma):
                    yield line + _leading_lines(text), text.strip()
                line, pending, begin = line + text.count(b"\n"), b"", match.end()
                after_comma = mark == b","
        pending += chunk[begin:]
        if len(brackets) < depth:  # keys and values beside the lists
            line, pending = line + pending.count(b"\n"), b""
        if len(pending) > MAX_ROW:
            raise ValueError(f"an element is longer than {MAX_ROW >> 20} MiB")
    if len(brackets) >= depth:
        if pending.strip():
            yield line + _leading_lines(pending), pending.strip()
        yield line + pending.count(b"\n"), b""


def _leading_lines(text: bytes) -> int:
    return text[: len(text) - len(text.lstrip())].count(b"\n")


def _csv(document: Document) -> Rows:
    return _table(document, ",")


def _tsv(document: Document) -> Rows:
    return _table(document, "\t")


def _table(document: Document, delimiter: str) -> Rows:
    """The rows of a table whose first line names the columns."""
    csv.field_size_limit(MAX_ROW)
    lines = io.TextIOWrapper(document.stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = lines.readline()
    if delimiter == "," and first.count(";") > first.count(","):
        delimiter = ";"
    names = next(csv.reader([first], delimiter=delimiter), [])
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 2
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield start, ValueError(f"not a row of the table: {error}")
            cells = []
        if cells is None:
            return
        if cells and len(cells) != len(names):
            yield start, ValueError(f"{len(cells)} cells, but the first line names {len(names)} columns")
        elif cells:
            yield start, dict(zip(names, cells, strict=True))
        start = reader.line_num + 2


def _parquet(document: Document) -> Rows:
    parquet = load("pyarrow.parquet", "a Parquet file")
    stream = document.stream
    source: Any = stream if stream.seekable() else io.BytesIO(stream.read(MAX_DOCUMENT))
    return _batches(parquet.ParquetFile(source).iter_batches(1_024))


def _arrow(document: Document) -> Rows:
    """A stream of Arrow batches, as the library `datasets` writes it."""
    return _batches(load("pyarrow.ipc", "an Arrow file").open_stream(document.stream))


def _batches(batches: Iterable[Any]) -> Rows:
    number = 0
    for batch in batches:
        plain = [(field.name, _plain(field.type)) for field in batch.schema]
        decoded = [(name, convert) for name, convert in plain if convert]
        for row in batch.to_pylist():
            number += 1
            row.update({name: convert(row[name]) for name, convert in decoded})
            yield number, row


def _plain(kind: Any) -> Callable[[Any], Any] | None:
    """What makes JSON texts in values of an Arrow type the values that they stand for; None if there are none."""
    types = load("pyarrow.types", "an Arrow file")
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if types.is_list(kind) or types.is_large_list(kind):
        if inner := _plain(kind.value_type):
            return lambda values: values and [inner(value) for value in values]
    elif types.is_struct(kind):
        fields = {field.name: convert for field in kind if (convert := _plain(field.type))}
        if fields:
            return lambda value: value and value | {name: fields[name](value[name]) for name in fields}
    return None


def _text(document: Document) -> Rows:
    return _whole(document, sections)


def _python(document: Document) -> Rows:
    return _whole(document, functions)


def _whole(document: Document, parts: Callable[[str], Iterator[tuple[int, dict[str, str]]]]) -> Rows:
    raw = document.stream.read(MAX_DOCUMENT + 1)
    if len(raw) > MAX_DOCUMENT:
        yield 1, ValueError(f"the text is longer than {MAX_DOCUMENT >> 20} MiB: divide it")
        return
    try:
        yield from parts(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield 1, ValueError(f"not UTF-8 text: {error}")
    except (SyntaxError, ValueError, RecursionError) as error:
        yield 1, ValueError(f"not Python: {error}")


LAYOUTS: Mapping[str, Callable[[Document], Rows]] = {
    "lines": _lines,
    "array": _array,
    "object": _object,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text,
    "python": _python,
}
"""Name of a layout -> its reader."""

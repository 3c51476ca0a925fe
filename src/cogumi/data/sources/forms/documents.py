"""Plain corpora as pairs: a text by its title, the rest of a text by its beginning, code by its docstring."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator

from cogumi.data.sources.forms.pairs import Form, Pair, Row, conversation, first_of, text

WORDS, SHORTEST = 300, 40
"""Words of a piece of a text, a quarter of which is the question; and of the shortest one."""
_HEADING = re.compile(r"^(?:#{1,6} +(?P<mark>.+?)|\s*=+ (?P<wiki>[^=]+?) =+|(?P<chapter>CHAPTER [IVXLC\d]+\.?.*))\s*$")


def fits(row: Row) -> bool:
    """A text and nothing that asks."""
    return isinstance(row.get("text", row.get("abstract")), str)


def read(row: Row) -> list[Pair]:
    """One pair: the text (or abstract) by its title, else the rest of the text by its beginning."""
    name = "abstract" if isinstance(row.get("abstract"), str) else "text"
    title, body = first_of(row, ("title", "heading", "section")), text(row[name], name)
    if title:
        kind = "the abstract of the paper" if name == "abstract" else "the text"
        question = f'Write {kind} "{text(row[title], title)}".'
        return [Pair(conversation(question), body, frozenset({name, title}))]
    words = body.split(" ")
    if len(words) < SHORTEST:
        raise ValueError(f"a text without a title and of fewer than {SHORTEST} words gives no question")
    cut = len(words) // 4
    question = f"Continue this text:\n\n{' '.join(words[:cut])}"
    return [Pair(conversation(question), " ".join(words[cut:]), frozenset({name}))]


FORM = Form("text", '{"text" or "abstract", "title"}', fits, read)


def sections(document: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row of the form `text`) for each section of a document, or each piece of one without headings."""
    title, start, lines = "", 1, list[str]()
    for number, line in enumerate([*document.splitlines(), ""], 1):
        heading = _HEADING.match(line)
        long = not title and sum(len(x.split()) for x in lines) >= WORDS and not line.strip()
        if heading or long or number > document.count("\n") + 1:
            if body := "\n".join(lines).strip():
                yield start, {"title": title, "text": body} if title else {"text": body}
            lines, start = [], number + 1
            title = next(filter(None, heading.groups()), "").strip() if heading else ""
        else:
            lines.append(line)
    if body := "\n".join(lines).strip():
        yield start, {"title": title, "text": body} if title else {"text": body}


def functions(source: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row of the form `instruction`) for each function of a Python file with a docstring.

    Raises `SyntaxError` or `ValueError` if the file is no Python.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not (said := ast.get_docstring(node)):
            continue
        code = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
        signature = code.split(":\n")[0].strip()
        if code and len(node.body) > 1:
            yield node.lineno, {"instruction": f"Write a Python function.\n\n{signature}\n\n{said}", "output": code}

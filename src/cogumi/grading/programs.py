"""The Python programs that an answer in chat form offers, the most probable first (SPEC B3)."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

from cogumi.core.text import without_thinking

MOST = 4
"""Programs of one answer that are tried."""
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)\n(?P<code>.*?)(?:\n?[ \t]*(?P=ticks)[`~]*|\Z)",
    re.DOTALL | re.MULTILINE,
)
_TAGGED = re.compile(r"\[BEGIN\](.*?)(?:\[DONE\]|\Z)", re.DOTALL)
_CODE_BEGINS = re.compile(r"^(?:def|class|import|from|async|@|[A-Za-z_]\w*\s*=)", re.MULTILINE)
_PYTHON = {"", "python", "py", "python3", "py3"}


def programs(output: str) -> list[str]:
    """At most `MOST` different programs: the last fence that compiles, then the others, then all of them together.

    Without a fence it is the whole output, or what is left of it from the first line of code on. An output with no
    program that compiles is returned as it is, so that its error can be shown.
    """
    text = without_thinking(output).replace("\r\n", "\n").lstrip("\ufeff")
    offered = _offered(text)
    compiling = [code for code in dict.fromkeys(offered) if _compiles(code)]
    return compiling[:MOST] or offered[:1]


def _offered(text: str) -> list[str]:
    """Candidate programs in the order in which they are tried."""
    if tagged := _TAGGED.findall(text):
        text = tagged[-1]
    fences = [(_language(match["info"]), _dedented(match)) for match in _FENCE.finditer(text)]
    python = [code for language, code in fences if language in _PYTHON]
    if fences:
        others = [code for language, code in fences if language not in _PYTHON]
        together = ["\n".join(python)] if len(python) > 1 else []
        return [*reversed(python), *together, *reversed(others)] or [text]
    found = [text, textwrap.dedent(text)]
    if begins := _CODE_BEGINS.search(text):
        found.append(text[begins.start() :])
        lines = found[-1].split("\n")
        found += ["\n".join(lines[:end]) for end in _paragraph_ends(lines)]
    return found


def _language(info: str) -> str:
    """The language of a fence: "python title=x.py" and "Python 3" are python."""
    return re.split(r"[\s{,:]", info.strip().lstrip("{.").casefold(), maxsplit=1)[0]


def _dedented(match: re.Match[str]) -> str:
    return textwrap.dedent(match["code"]) if match["indent"] else match["code"]


def _paragraph_ends(lines: list[str]) -> list[int]:
    """Where code without a fence may end and prose begin: before an unindented line after an empty one, last first."""
    return [i for i in range(len(lines) - 1, 0, -1) if lines[i] and not lines[i][0].isspace() and not lines[i - 1]][:20]


def _compiles(code: str) -> bool:
    if not code.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True

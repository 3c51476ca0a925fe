"""Self-consistency: what several answers to one question agree on (SPEC F13; Wang et al. 2022).

`final_answer` takes the answer out of a text, in a form in which equal answers are equal; `tally` counts. Free text
can be grouped by embeddings with `grouped` (DBSCAN, Ester et al. 1996, on cosine distance). Pure functions; no text
makes them raise.
"""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.signals import abstains
from cogumi.core.text import FENCE, NUMBER, normalise

EPS = 0.3
"""Cosine distance within which two free texts say the same."""

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to rows [n, width]."""

_UNIT = r"\s*(?:%|[^\W\d]+(?:\s+[^\W\d]+){0,2})?\W*$"
_ONLY_NUMBER = re.compile(rf"[\s$€£*(\"'`]*({NUMBER}){_UNIT}")
_LAST_NUMBER = re.compile(rf"(?<![\w.,:/])({NUMBER}){_UNIT}")
_MARKED = re.compile(
    r"(?:\banswer(?:\s+is)?\s*[:=]|\banswer\s+is\b|^####)[ \t*]*(\S[^\n]*)|\\boxed\{([^{}\n]+)\}", re.I | re.M
)
_EQUALS = re.compile(r"=|\b(?:is|are|equals|makes|gives)\b", re.IGNORECASE)
_CHOICE = re.compile(r"\W*([A-Z])(?:\W*$|[).:]\s)")
_CODE = re.compile(r"^(?:def|class|import|from|async def|@\w+)\b", re.M)
_REASONED = re.compile(r"[.!?]\s|\n")
_LONGEST = 200  # characters of a line in which a number or a letter can be the answer
_LAYOUT = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: "\n"}
_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


@dataclass(frozen=True, slots=True, order=True)
class Answer:
    """`kind` is abstain, json, code, choice, number or text; `value` is equal where the answers are."""

    kind: str
    value: str


def final_answer(text: str) -> Answer | None:
    """The answer that a text ends in; None if it says nothing.

    Tool calls and code count as a whole, without their layout. Else what follows "answer:" (or #### or in \\boxed{}),
    or the last line, if it is a choice's letter or a number (units are left out; in a single sentence only behind "is",
    an equals sign or the like). Anything else is its whole text without case, spacing and quotes.
    """
    if not text.strip():
        return None
    if abstains(text):
        return Answer("abstain", "")
    fence = FENCE.search(text)
    body = fence.group(1) if fence else text
    call = _json(body)
    if call is not None:
        return Answer("json", call)
    if fence or _CODE.search(text):
        return Answer("code", _code(body))
    marked = [first or second for first, second in _MARKED.findall(text)]
    line = (marked[-1] if marked else text.strip().splitlines()[-1]).strip()
    return (_short(line, bool(marked) or bool(_REASONED.search(text.strip()))) if len(line) <= _LONGEST else None) or (
        Answer("text", normalise(line if marked else text))
    )


def _short(line: str, reasoned: bool) -> Answer | None:
    """A letter or a number; a number at a sentence's end counts if a longer text leads to it."""
    if choice := _CHOICE.match(line):
        return Answer("choice", choice.group(1))
    line = line.replace("\u2212", "-")
    found = _ONLY_NUMBER.match(_EQUALS.split(line)[-1]) or (_LAST_NUMBER.search(line) if reasoned else None)
    if not found:
        return None
    digits = found.group(1).replace(",", "")
    value = Decimal(digits).normalize(Context(prec=len(digits)))
    return Answer("number", str(value or 0))


def _json(text: str) -> str | None:
    """A JSON object or a list of them, in one spelling; a lone object is a list of one. None for anything else."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text, parse_float=_whole)
        return json.dumps(value if isinstance(value, list) else [value], sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _whole(digits: str) -> float | int:
    value = float(digits)
    return int(value) if value.is_integer() else value


def _code(text: str) -> str:
    """Code without comments, blank lines and spacing; what is no Python only without its spacing."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError):  # IndentationError is one
        return re.sub(r"\s+", " ", text).strip()
    return " ".join(_LAYOUT.get(t.type, t.string) for t in tokens if t.type not in _IGNORED).strip()


def dbscan(rows: NDArray[Any], eps: float = EPS, least: int = 2) -> list[int]:
    """A cluster's number for each of the rows [n, width], by cosine distance; what belongs to none gets its own.

    A row with `least` rows within `eps` (itself among them) is a core; cores within `eps` share a cluster, and any
    other row joins that of its nearest core within reach, so that the order of rows does not matter.
    """
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    distance = 1.0 - unit @ unit.T
    np.fill_diagonal(distance, 0.0)
    near = distance <= eps
    cores = near.sum(axis=1) >= least
    labels = list(range(len(rows)))
    for start in np.flatnonzero(cores):
        reached, border = {int(start)}, [int(start)]
        while border:
            row = border.pop()
            more = {int(i) for i in np.flatnonzero(near[row] & cores)} - reached
            reached |= more
            border += more
        labels[start] = min(reached)
    for row in map(int, np.flatnonzero(~cores)):
        nearest = int(np.argmin(np.where(cores, distance[row], np.inf)))
        if cores[nearest] and near[row, nearest]:
            labels[row] = labels[nearest]
    return labels


def grouped(answers: Sequence[Answer | None], embed: Embed) -> list[Answer | None]:
    """The same answers, but free texts that mean the same by their embeddings all become the first by alphabet."""
    texts = sorted({answer.value for answer in answers if answer and answer.kind == "text"})
    if len(texts) < 2:
        return list(answers)
    labels = dbscan(embed(texts))
    first = dict(reversed(list(zip(labels, texts, strict=True))))
    named = {text: Answer("text", first[label]) for label, text in zip(labels, texts, strict=True)}
    return [named[a.value] if a and a.kind == "text" else a for a in answers]


@dataclass(frozen=True, slots=True)
class Tally:
    """`winner` is the index of the chosen answer, None if no two agree; `agreement` the share of all paths that do."""

    winner: int | None
    agreement: float


def tally(answers: Sequence[Answer | None], perplexities: Sequence[float]) -> Tally:
    """Count the votes of all paths; None is a path without an answer, which still counts in the share.

    The largest group wins, among equals that with the path of lowest perplexity, which is also the group's voice.
    """
    groups: dict[Answer, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(answer, []).append(i)
    if not groups:
        return Tally(None, 0.0)
    ranked = {answer: (-len(group), min(perplexities[i] for i in group), answer) for answer, group in groups.items()}
    group = groups[min(ranked, key=lambda answer: ranked[answer])]
    agreement = len(group) / len(answers)
    if len(group) == 1 < len(answers):
        return Tally(None, agreement)
    return Tally(min(group, key=lambda i: perplexities[i]), agreement)

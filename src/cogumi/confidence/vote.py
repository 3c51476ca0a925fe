"""Self-consistency: majority vote over several sampled answers (SPEC F13; Wang et al. 2022).

`final_answer` extracts the answer of a text in canonical form; `tally` counts votes. Free texts are compared by their
words, not by embeddings: with all-MiniLM-L6-v2, "yes" and "no" are as near (cosine distance 0.27) as "Paris" and "It is
Paris", and "The war ended in 1918." is nearer to "... in 1945." (0.19). Pure functions that never raise on any text.
"""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal

from cogumi.confidence.signals import abstains
from cogumi.core.text import FENCE, NUMBER, normalise

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
_MAX_LINE = 200  # characters of a line that is searched for a number or a choice
_LAYOUT = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: "\n"}
_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


@dataclass(frozen=True, slots=True, order=True)
class Answer:
    """`kind` is abstain, json, code, choice, number or text; equal answers have equal values."""

    kind: str
    value: str


def final_answer(text: str) -> Answer | None:
    """The final answer of a text in canonical form; None for an empty text.

    Tool calls and code count as a whole, without layout. Otherwise the text after "answer:" (or #### or in \\boxed{}),
    else the last line, is searched for a choice letter or a number (without unit; in a single sentence only after "is",
    an equals sign or similar). Else the answer is the whole normalised text.
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
    return (_short(line, bool(marked) or bool(_REASONED.search(text.strip()))) if len(line) <= _MAX_LINE else None) or (
        Answer("text", normalise(line if marked else text))
    )


def _short(line: str, reasoned: bool) -> Answer | None:
    """A choice letter or a number; a number at the end of a sentence counts only after reasoning text."""
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
    """Canonical JSON of an object or a list; a single object becomes a list of one. None for any other text."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text, parse_float=_int_if_integral)
        return json.dumps(value if isinstance(value, list) else [value], sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _int_if_integral(digits: str) -> float | int:
    value = float(digits)
    return int(value) if value.is_integer() else value


def _code(text: str) -> str:
    """Python code without comments, blank lines and spacing; other text only with white space collapsed."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError):  # IndentationError is one
        return re.sub(r"\s+", " ", text).strip()
    return " ".join(_LAYOUT.get(t.type, t.string) for t in tokens if t.type not in _IGNORED).strip()


@dataclass(frozen=True, slots=True)
class Tally:
    """`winner`: index of the chosen answer, None if no two samples agree; `agreement`: share of agreeing samples."""

    winner: int | None
    agreement: float


def tally(answers: Sequence[Answer | None], perplexities: Sequence[float]) -> Tally:
    """Majority vote over samples; None is a sample without an answer, which still counts in the share.

    The largest group wins, ties by lowest perplexity; the winner is the group's sample of lowest perplexity.
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

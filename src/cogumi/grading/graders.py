"""Grading an output against its example (SPEC B3). `example.meta["check"]["kind"]` selects the grader:

exact      the output equals `answer` (ignoring letter case, white space, outer quotes and a final full stop)
short_answer  the output, a phrase or a sentence, names one of `answers` and none of `rivals` (see `short_answer`)
numeric    the last number in the output equals `value` (default: the last number in `answer`)
choice     the output selects the same option as `answer` (by letter, or by the text of one of `options`)
code       the output, a Python program, passes every assert in `tests`, in the sandbox
tool_call  the output is the JSON of `call` (default: of `answer`): {"tool", "args"} or a list of them; keys in any
           order
abstain    the output declines in plain words (see `core.text.abstains`)

Without a check the grader is `exact`. Graders accept any output; an invalid check raises `DataError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from cogumi.core.errors import DataError
from cogumi.core.text import COURTESY, NUMBER, abstains, last_user_message, normalise, strip_fences
from cogumi.core.types import Example, Verdict
from cogumi.grading.checks import check_problem
from cogumi.grading.sandbox import Outcome, run_all
from cogumi.grading.short_answer import judge

Judgement = tuple[bool, str]
"""Whether the output is correct, and the reason if it is not."""

_NUMBER = re.compile(NUMBER)
_MINUS = re.compile(r"\u2212|(?<![\w\s)])\u2013(?=\d)|(?<=\s)\u2013(?=\d)|^\u2013(?=\d)|(?<=[=:] )- (?=\d)")
_SIGN_BEFORE_CURRENCY = re.compile(r"(?<![\w.)])-\s?[$\u20ac\u00a3\u00a5]\s?(?=\d)")
_NO_INTEGER_PART = re.compile(r"(?<![\w.)\]])\.(?=\d)")
_LATE_FENCE = re.compile(r"\n[ \t]*```")
_NOT_WORD = re.compile(r"[\W_]+")
_LETTER = (
    re.compile(r"^\W*([A-Z])\W*$"),
    re.compile(
        r"\b(?i:answer|choice|option)\b(?:\s+is)?\s*:?\s*(?:[Oo]ption\s+)?[(*\"'$]*(?:\\boxed\{)?([A-Z])\b(?!['’]|\s+[a-z])"
    ),
    re.compile(r"\\boxed\{(?:\\text\{)?\(?([A-Z])\)?\}"),
    re.compile(r"^\W*([A-Z])[).:]"),
)


def last_number(text: str) -> Decimal | None:
    """The last decimal number in a text; commas as thousands separators are allowed."""
    text = _SIGN_BEFORE_CURRENCY.sub("-", _MINUS.sub("-", text))
    found = _NUMBER.findall(_NO_INTEGER_PART.sub("0.", text))
    return Decimal(found[-1].replace(",", "")) if found else None


def _without_courtesy(text: str) -> str:
    """A text without its polite last sentences, which may hold numbers ("Let me know if you need 2 more.")."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    while len(parts) > 1 and COURTESY.fullmatch(normalise(parts[-1])):
        parts.pop()
    return "\n".join(parts)


def chosen(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that a text selects: by its exact text, by a letter, or as the only option mentioned."""
    wanted = [normalise(option) for option in options]
    if normalise(text) in wanted:
        return wanted.index(normalise(text))
    for pattern in _LETTER:
        if found := pattern.findall(text):
            index = ord(found[-1]) - ord("A")
            return index if not options or index < len(options) else None
    words = _words(text)
    mentioned = [i for i, option in enumerate(options) if _words(option).strip() and _words(option) in words]
    return mentioned[0] if len(mentioned) == 1 else None


def _words(text: str) -> str:
    """The words of a text separated and enclosed by single spaces, so that `in` matches whole words only."""
    return f" {_NOT_WORD.sub(' ', normalise(text)).strip()} "


def same_json(left: Any, right: Any) -> bool:
    """JSON equality: key order is ignored, 1 equals 1.0, but true differs from 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _exact(example: Example, check: Mapping[str, Any], output: str) -> Judgement:
    return normalise(output) == normalise(example.answer), f"expected: {example.answer}"


def _short_answer(example: Example, check: Mapping[str, Any], output: str) -> Judgement:
    return judge(output, last_user_message(example.messages), check["answers"], check.get("rivals", ()))


def _numeric(example: Example, check: Mapping[str, Any], output: str) -> Judgement:
    wanted = last_number(str(check.get("value", example.answer)))
    if wanted is None:
        raise DataError(f"example {example.id}: numeric check without a number; set `value` or give a numeric answer")
    found = last_number(_without_courtesy(output))
    return found == wanted, f"expected {wanted}, found {'no number' if found is None else found}"


def _choice(example: Example, check: Mapping[str, Any], output: str) -> Judgement:
    options = check.get("options", [])
    wanted = chosen(example.answer, options)
    if wanted is None:
        raise DataError(f"example {example.id}: the answer is not one of the options; give an option's letter or text")
    found = chosen(output, options)
    return (
        found == wanted,
        f"expected {example.answer}, found {'no choice' if found is None else chr(ord('A') + found)}",
    )


def _tool_call(example: Example, check: Mapping[str, Any], output: str) -> Judgement:
    try:
        wanted = check["call"] if "call" in check else json.loads(example.answer)
    except ValueError as error:
        raise DataError(f"example {example.id}: the answer must be the JSON of a tool call ({error})") from error
    try:
        found = json.loads(_json_part(output), parse_constant=_reject_constant)
        return same_json(_as_list(found), _as_list(wanted)), f"expected {json.dumps(wanted)}"
    except (ValueError, RecursionError) as error:
        return False, f"not JSON: {error}"


def _json_part(output: str) -> str:
    """The content of a fence, or what stands before a fence that is only closed."""
    return _LATE_FENCE.split(output)[0] if output.lstrip()[:1] in ("{", "[") else strip_fences(output)


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _as_list(calls: Any) -> list[Any]:
    return calls if isinstance(calls, list) else [calls]


def _abstain(example: Example, check: Mapping[str, Any], output: str) -> Judgement:
    return abstains(output), "the question has no answer; expected an abstention"


_GRADERS: dict[str, Callable[[Example, Mapping[str, Any], str], Judgement]] = {
    "exact": _exact,
    "short_answer": _short_answer,
    "numeric": _numeric,
    "choice": _choice,
    "tool_call": _tool_call,
    "abstain": _abstain,
}


def _check(example: Example) -> Mapping[str, Any]:
    if problem := check_problem(example.check):
        raise DataError(f"example {example.id}: {problem}")
    return example.check


def _program(check: Mapping[str, Any], output: str) -> str:
    return "\n".join([strip_fences(output), *check["tests"]])


def _verdict(example: Example, output: str, kind: str, correct: bool, reason: str) -> Verdict:
    return Verdict(example.id, output, correct, float(correct), kind, "" if correct else reason)


def grade_all(pairs: Sequence[tuple[Example, str]]) -> list[Verdict]:
    """Grade many `(example, output)` pairs; code runs in a few sandbox processes, equal programs only once."""
    checks = [_check(example) for example, _ in pairs]
    programs = [
        _program(check, output) if check["kind"] == "code" else None
        for check, (_, output) in zip(checks, pairs, strict=True)
    ]
    distinct = list(dict.fromkeys(program for program in programs if program is not None))
    outcomes: dict[str, Outcome] = dict(zip(distinct, run_all(distinct), strict=True))
    verdicts = []
    for (example, output), check, program in zip(pairs, checks, programs, strict=True):
        if program is not None:
            judgement = outcomes[program].ok, outcomes[program].reason
        else:
            judgement = _GRADERS[check["kind"]](example, check, output)
        verdicts.append(_verdict(example, output, check["kind"], *judgement))
    return verdicts


def grade(example: Example, output: str) -> Verdict:
    """Grade one output; `grade_all` is faster for many."""
    return grade_all([(example, output)])[0]

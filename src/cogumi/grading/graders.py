"""Grading an output against its example (SPEC B3). `example.meta["check"]["kind"]` selects the grader:

exact      the output equals `answer` (ignoring letter case, white space, outer quotes and a final full stop)
short_answer  the output, a phrase or a sentence, names one of `answers` and none of `rivals` (see `short_answer`)
numeric    the output commits to `value` (default: to what `answer` commits to; see `quantities`), at most `tolerance`
           or `relative_tolerance` away; `percent: share` reads 50% as 0.5, else the sign is ignored; with a `scale`
           (thousand, million, billion) the value may also be written out
math       the output's formula equals that of `answer`, both in LaTeX (library `math-verify`)
choice     the output selects the same option as `answer`, a letter, a text or an index (see `option_choice`)
code       one of the programs in the output passes every assert in `tests`, in the sandbox (see `programs`)
tool_call  the output has the calls of `call` (default: of `answer`) and no others, in any order unless `ordered`; or
           calls among those of `possible`, in BFCL's form (see `tool_calls`)
f1, rouge_l   the output shares enough words with one of `answers` (default: `answer`): a score of `at_least`
constraints   the output keeps all `rules` (see `constraints`); the score is the share of rules kept
abstain    the output declines in plain words (see `core.text.abstains`)
similarity  its sentence embedding is as similar to one of `answers` (default: `answer`): a cosine of `at_least`
judge      a judge's score of 1 to 10 is `least` (default: 7) or more

The last two ask a model (see `model_graders`). Without a check the grader is `exact`. Notes inside <think> are left
out. Graders accept any output; a check or an answer that no output could satisfy raises `DataError` (`problem_of` finds
it before).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from cogumi.core.errors import DataError
from cogumi.core.text import abstains, last_user_message, normalise, without_thinking
from cogumi.core.types import Example, Verdict
from cogumi.grading import formulas, option_choice, overlap, tool_calls
from cogumi.grading.checks import check_problem
from cogumi.grading.constraints import broken
from cogumi.grading.model_graders import LEAST, MODEL_CHECKS, NO_MODELS, Models, judged, similarities
from cogumi.grading.programs import programs
from cogumi.grading.quantities import SCALES, Quantity, committed
from cogumi.grading.sandbox import Outcome, Program, run_all
from cogumi.grading.short_answer import judge


class Judgement(NamedTuple):
    """The `score` of an output from 0 to 1, whether it is correct, and the reason if it is not."""

    correct: bool
    reason: str
    score: float | None = None


Check = Mapping[str, Any]
Grader = Callable[[Example, Check, str], Judgement]


def _exact(example: Example, check: Check, output: str) -> Judgement:
    right = normalise(without_thinking(output)) == normalise(example.answer)
    return Judgement(right, f"expected: {example.answer}")


def _short_answer(example: Example, check: Check, output: str) -> Judgement:
    question = last_user_message(example.messages)
    return Judgement(*judge(without_thinking(output), question, check["answers"], check.get("rivals", ())))


def _wanted_number(example: Example, check: Check) -> Quantity:
    if (wanted := committed(str(check.get("value", example.answer)))) is None:
        raise DataError("numeric check without a number; set `value` or give a numeric answer")
    return wanted


def _numeric(example: Example, check: Check, output: str) -> Judgement:
    wanted, found = _wanted_number(example, check), committed(output)
    if found is None:
        return Judgement(False, f"expected {wanted}, found no number")
    absolute, relative = (Fraction(str(check.get(name, 0))) for name in ("tolerance", "relative_tolerance"))
    one, other = (found.share(), wanted.share()) if check.get("percent") == "share" else (found, wanted)
    right = one.near(other, absolute, relative)
    if not right and "scale" in check:  # "in millions": 1.5 and 1.5 million are the same answer
        right = one.near(other.times(Fraction(10 ** SCALES[check["scale"]])), absolute, relative)
    return Judgement(right, f"expected {wanted}, found {found}")


def _math(example: Example, check: Check, output: str) -> Judgement:
    _wanted_formula(example, check)
    return Judgement(formulas.equal(example.answer, without_thinking(output)), f"expected: {example.answer}")


def _wanted_formula(example: Example, check: Check) -> None:
    if not formulas.parsed(example.answer):
        raise DataError("the answer has no formula; write it in LaTeX, as $...$ or \\boxed{...}")


def _wanted_option(example: Example, check: Check) -> int:
    if (wanted := option_choice.gold(example.answer, check.get("options", []))) is None:
        raise DataError("the answer is not one of the options; give an option's letter, text or index")
    return wanted


def _choice(example: Example, check: Check, output: str) -> Judgement:
    options, wanted = check.get("options", []), _wanted_option(example, check)
    if (found := option_choice.chosen(output, options)) is None:
        return Judgement(False, f"expected {example.answer}, found no choice")
    right = option_choice.same_option(found, wanted, options)
    return Judgement(right, f"expected {example.answer}, found {chr(ord('A') + found)}")


def _wanted_calls(example: Example, check: Check) -> list[tool_calls.Call]:
    try:
        return tool_calls.calls_of(check["call"] if "call" in check else json.loads(example.answer))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the answer must be the JSON of a tool call ({error})") from error


def _tool_call(example: Example, check: Check, output: str) -> Judgement:
    ordered = check.get("ordered", "possible" not in check)
    wanted = [] if "possible" in check else _wanted_calls(example, check)
    expected = f"expected {json.dumps(check.get('possible', check.get('call', example.answer)))}"
    try:
        found = tool_calls.calls_in(output)
    except (ValueError, RecursionError) as error:
        return Judgement(False, str(error))
    if "possible" in check:
        return Judgement(tool_calls.allowed(found, check["possible"], ordered), expected)
    return Judgement(tool_calls.same_calls(found, wanted, ordered), expected)


def _overlap(example: Example, check: Check, output: str) -> Judgement:
    measure = overlap.MEASURES[check["kind"]]
    answers = check.get("answers", [example.answer])
    score = max(measure(without_thinking(output), answer) for answer in answers)
    return Judgement(score >= check["at_least"], f"{score:.2f} of {check['at_least']:g} with: {answers[0]}", score)


def _constraints(example: Example, check: Check, output: str) -> Judgement:
    rules = check["rules"]
    missed = broken(without_thinking(output), rules)
    return Judgement(not missed, f"breaks {', '.join(missed)}", 1 - len(missed) / len(rules))


def _abstain(example: Example, check: Check, output: str) -> Judgement:
    right = abstains(without_thinking(output))
    return Judgement(right, "the question has no answer; expected an abstention")


_GRADERS: dict[str, Grader] = {
    "exact": _exact,
    "short_answer": _short_answer,
    "numeric": _numeric,
    "math": _math,
    "choice": _choice,
    "tool_call": _tool_call,
    "f1": _overlap,
    "rouge_l": _overlap,
    "constraints": _constraints,
    "abstain": _abstain,
}


def problem_of(example: Example) -> str | None:
    """Why no output could be right by the example's check; None if one can be."""
    check = example.check
    if problem := check_problem(check):
        return problem
    wanted: dict[str, Callable[[Example, Check], object]] = {
        "numeric": _wanted_number,
        "math": _wanted_formula,
        "choice": _wanted_option,
        "tool_call": lambda example, check: "possible" in check or _wanted_calls(example, check),
    }
    try:
        if check["kind"] in wanted:
            wanted[check["kind"]](example, check)
    except DataError as error:
        return str(error)
    return None


def grade_all(pairs: Sequence[tuple[Example, str]], models: Models = NO_MODELS) -> list[Verdict]:
    """Grade many `(example, output)` pairs; code runs in a few sandbox processes, equal programs only once.

    Raises `DataError` for an invalid check, and for one that asks a model which `models` lacks.
    """
    for example, _ in pairs:
        if problem := check_problem(example.check) or models.missing(example.check["kind"]):
            raise DataError(f"example {example.id}: {problem}")

    def of(kind: str) -> dict[int, tuple[Example, str]]:
        return {i: pair for i, pair in enumerate(pairs) if pair[0].check["kind"] == kind}

    found = _run_programs(of("code")) | _embedded(models, of("similarity")) | _scored(models, of("judge"))
    return [
        _verdict(example, output, found[i] if i in found else _judged(example, output))
        for i, (example, output) in enumerate(pairs)
    ]


def grade(example: Example, output: str, models: Models = NO_MODELS) -> Verdict:
    """Grade one output; `grade_all` is faster for many."""
    return grade_all([(example, output)], models)[0]


def asks_model(example: Example) -> bool:
    """Whether the example's check asks a model, so that the steps of a build cannot grade it."""
    return example.check["kind"] in MODEL_CHECKS


def _judged(example: Example, output: str) -> Judgement:
    try:
        return _GRADERS[example.check["kind"]](example, example.check, output)
    except DataError as error:
        raise DataError(f"example {example.id}: {error}") from error


def _verdict(example: Example, output: str, judgement: Judgement) -> Verdict:
    correct, reason, score = judgement
    value = float(correct) if score is None else score
    return Verdict(example.id, output, correct, value, example.check["kind"], "" if correct else reason)


def _run_programs(pairs: Mapping[int, tuple[Example, str]]) -> dict[int, Judgement]:
    """Judgements of outputs with code: their programs are tried in turn until one passes.

    The reason for a failure is that of the first program.
    """
    offered = {i: programs(output) for i, (_, output) in pairs.items()}
    found: dict[int, Judgement] = {}
    known: dict[Program, Outcome] = {}
    for attempt in range(max(map(len, offered.values()), default=0)):
        waiting = {
            i: Program(codes[attempt], "\n".join(pairs[i][0].check["tests"]))
            for i, codes in offered.items()
            if attempt < len(codes) and not (i in found and found[i].correct)
        }
        new = [program for program in dict.fromkeys(waiting.values()) if program not in known]
        known |= zip(new, run_all(new), strict=True)
        for i, program in waiting.items():
            outcome = known[program]
            if outcome.ok or i not in found:
                found[i] = Judgement(outcome.ok, outcome.reason)
    return found


def _embedded(models: Models, pairs: Mapping[int, tuple[Example, str]]) -> dict[int, Judgement]:
    """Judgements by the similarity of sentence embeddings."""
    if not pairs:
        return {}
    assert models.embed is not None  # see `Models.missing`
    compared = [(output, example.check.get("answers", [example.answer])) for example, output in pairs.values()]
    found = {}
    for (i, (example, _)), score in zip(pairs.items(), similarities(compared, models.embed), strict=True):
        least = example.check["at_least"]
        found[i] = Judgement(score >= least, f"similarity {score:.2f}, below {least:g}: {example.answer}", score)
    return found


def _scored(models: Models, pairs: Mapping[int, tuple[Example, str]]) -> dict[int, Judgement]:
    """Judgements by a judge's scores; without a score an output is not right."""
    if not pairs:
        return {}
    assert models.judge is not None  # see `Models.missing`
    found = {}
    for (i, (example, _)), score in zip(pairs.items(), judged(list(pairs.values()), models.judge), strict=True):
        least = example.check.get("least", LEAST)
        reason = "the judge gave no score" if score is None else f"the judge's score is {score}, below {least}"
        found[i] = Judgement(score is not None and score >= least, reason, (score or 0) / 10)
    return found

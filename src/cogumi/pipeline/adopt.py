"""From a model and question files to a calibrated bundle (SPEC M4).

The recipe grows: the base answers first; where it fails often enough, modifiers are trained; those that answer better
on selection questions stay. Each phase is an ordinary build of the recipe so far, so that nothing is done twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cogumi.confidence.guarantee import upper_bound
from cogumi.core import artifact
from cogumi.core.amounts import duration
from cogumi.core.errors import CogumiError
from cogumi.core.files import exclusive_lock, write_text
from cogumi.data.responses import read_responses
from cogumi.data.sources.survey import Survey
from cogumi.pipeline.adopted_recipe import (
    FIRST,
    SHARES,
    Adoption,
    first_answers,
    head,
    modifiers,
    step_names,
    whole,
)
from cogumi.pipeline.adoption_checks import parsed

FAILURES = 60
"""Failed training questions that a modifier needs."""
GAIN = 0.05
"""Least gain on selection questions with which a modifier is kept."""
CONFIDENCE = 0.95
ENDED = 0.9
"""Share of the model's first answers that must end within the tokens of an answer."""

Build = Callable[[Any], dict[str, Any]]
Report = Callable[[str], None]


def least_accepted(e: float) -> int:
    """Accepted answers without an error that prove at most the share `e` of errors with 95% confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - e))


def rows_for_promise(e: float, coverage: float) -> int:
    """Questions that the promise takes if the share `coverage` is accepted without an error."""
    return math.ceil(least_accepted(e) / coverage * sum(SHARES.values()) / SHARES["threshold"])


def shortage(survey: Survey, e: float) -> str:
    """A line about too few questions for the promise; empty if there are enough for a coverage of one half."""
    rows, needed = sum(d.questions for d in survey.gradable), rows_for_promise(e, 0.5)
    if rows >= needed:
        return ""
    threshold = rows * SHARES["threshold"] // sum(SHARES.values())
    best = upper_bound(0, threshold, CONFIDENCE) if threshold else 1.0
    return (
        f"{rows} questions are too few for the guarantee of at most {e:.0%} wrong: about {needed:,} are needed if half "
        f"of them can be accepted, {rows_for_promise(e, 1.0):,} at least. With {threshold} questions to test on, even "
        f"without an error only {best:.0%} can be proved. P(correct) is calibrated as far as possible."
    )


@dataclass(slots=True)
class Adopted:
    """The finished build: its recipe file, its report, and why each domain has a modifier or not."""

    recipe: Path
    report: Mapping[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)


@contextmanager
def only_adoption(home: Path) -> Iterator[None]:
    """Make the folder and lock it, so that no second adoption builds in it between two phases of this one."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(home):
            yield
    except BlockingIOError:
        raise CogumiError(f"another adoption is running in {home}; wait for it, or choose another --out") from None


def adopt(
    plan: Adoption, runs: Path, wanted: Sequence[str] | None, build: Build, say: Report, obstacle: str = ""
) -> Adopted:
    """Build a bundle in phases. `wanted`: domains that get a modifier in any case, None for an automatic choice.

    `build` runs a recipe; `say` prints a line; `obstacle` is the reason why nothing can be trained, else empty. See
    `adoption_checks.check` for what must hold.
    """
    names = [d.name for d in plan.survey.gradable]
    home = runs / plan.name
    plan = replace(plan, max_tokens=_answer_tokens(plan, home, build, say))
    build(parsed(head(plan), plan))
    say(f"answering the questions of the other sets takes about {duration(_seconds(home, 'responses'))} more")
    reasons = dict.fromkeys(names, f"no modifier: {obstacle}") if obstacle else _candidates(home, names, wanted)
    chosen = [name for name, reason in reasons.items() if not reason]
    if chosen:
        say(f"modifiers: training {', '.join(chosen)}")
        build(parsed(head(plan) + modifiers(plan, chosen), plan))
        for name in chosen:
            found = artifact.read_manifest(home / step_names(name)[2]).metrics
            what = f"{found['before']:.0%} -> {found['after']:.0%} of {found['n']} selection questions"
            keeps = wanted is not None or found["gain"] >= GAIN
            why = "it answers fewer" if found["gain"] < 0 else "it gains too little"
            reasons[name] = f"modifier: {what}" if keeps else f"no modifier, because {why}: {what}"
    kept = [name for name in chosen if reasons[name].startswith("modifier")]
    for name, reason in reasons.items():
        say(f"{name}: {reason}")
    file, text = plan.root / f"{plan.name}.yaml", whole(plan, kept)
    if file.is_file() and file.read_text("utf-8") != text:
        say(f"the recipe that was in {file} is now {file.replace(file.with_suffix('.old.yaml'))}")
    write_text(file, text)
    return Adopted(file, build(parsed(text, plan)), reasons)


def _answer_tokens(plan: Adoption, home: Path, build: Build, say: Report) -> int:
    """Tokens within which most of the model's answers end; at least those that the answers of the files take.

    A chat model explains its answer where a file has a number; cut off, the explanation is graded as it stands.
    """
    build(parsed(first_answers(plan, plan.room), plan))
    answers = read_responses(home / FIRST).values()
    lengths = sorted(answer.tokens if answer.finished else plan.room for answer in answers)
    usual = lengths[math.ceil(ENDED * len(lengths)) - 1]
    chosen = min(plan.room, max(plan.max_tokens, 16 * math.ceil(usual / 16)))
    ended = sum(answer.finished and answer.tokens <= chosen for answer in answers)
    say(f"answers: up to {chosen} tokens, within which {ended} of the model's first {len(lengths)} answers end")
    spent = duration(_seconds(home, FIRST, training=True))
    say(f"answering all questions takes about {spent}; training and the rest of the report come on top")
    return chosen


def _seconds(home: Path, step: str, training: bool = False) -> float:
    """Seconds that calibration and report take at the speed with which `step` answered, with the `training` questions.

    The report asks the questions that it has again of a modifier, hence the factor.
    """
    answered, rows = artifact.read_manifest(home / step), artifact.read_manifest(home / "data").metrics["rows"]
    others = float(rows["selection"] + rows["fit"] + rows["threshold"] + 1.3 * rows["heldout"])
    asked = others + (rows["train"] if training else 0)
    return answered.seconds / max(int(answered.metrics["rows"]), 1) * asked


def intention(survey: Survey, wanted: Sequence[str] | None) -> str:
    """What `adopt` does with these questions, in one line; `wanted` as for `adopt`."""
    questions = sum(d.questions for d in survey.gradable)
    sets = {name: f"{round(questions * share / sum(SHARES.values())):,}" for name, share in SHARES.items()}
    training = f"trains a modifier for a domain of which it fails {FAILURES} or more"
    if wanted is not None:
        training = f"trains modifiers for {', '.join(wanted)}" if wanted else "trains no modifier"
    return (
        f"adopt asks the model about {sets['train']} questions for training, {training}, calibrates it on about "
        f"{sets['fit']} and {sets['threshold']} others, and measures it on about {sets['heldout']}; after the first "
        "answers it says how long this takes"
    )


def _candidates(home: Path, names: Sequence[str], wanted: Sequence[str] | None) -> dict[str, str]:
    """Domain -> why it gets no modifier; empty for those to train."""
    metrics = artifact.read_manifest(home / "responses").metrics
    failed, asked = Counter(metrics["failures"]), Counter(metrics["asked"])
    reasons: dict[str, str] = {}
    for name in names:
        what = f"the base failed {failed[name]} of {asked[name]} training questions"
        if wanted is not None:
            reasons[name] = "" if name in wanted else "no modifier, as asked"
        elif failed[name] < FAILURES:
            reasons[name] = f"no modifier: {what}, and {FAILURES} failures are needed"
        else:
            reasons[name] = ""
    return reasons

"""What `cogumi adopt` refuses before any work: models, questions and folders that it cannot use (SPEC M4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogumi.core import artifact
from cogumi.core.errors import CogumiError, DataError, ExportError, TrainingError
from cogumi.core.files import sha256
from cogumi.core.registry import nearest
from cogumi.core.types import Request
from cogumi.data.sources.survey import LONGEST_ANSWER, Survey, domain_name
from cogumi.pipeline import fingerprint
from cogumi.pipeline.adopted_recipe import SHARES, WEIGHTS, Adoption, head, modifiers
from cogumi.pipeline.build import check_home
from cogumi.pipeline.plan import recipe_plan
from cogumi.pipeline.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from cogumi.engine.llama.binding.model import Model


LEAST = 40
"""Questions that leave hardly any of the sets empty, whatever the seed; far more are needed for the guarantee."""


def parsed(text: str, plan: Adoption) -> Recipe:
    """A recipe of an adoption, or its beginning."""
    return parse_recipe(text, f"{plan.name}.yaml", plan.root.resolve())


def usable_model(name: str) -> Model:
    """The vocabulary of the model; the errors of `open_model`, and `ExportError` for one that cannot chat."""
    from cogumi.compress.gguf.gguf_file import open_model
    from cogumi.engine.llama.binding.model import Model

    model = Model(open_model(name, Path()).path, vocabulary_only=True)
    if model.tokenizer.template is None:
        raise ExportError(f"{name} has no chat template, so it cannot be asked questions; take a chat model (instruct)")
    return model


def check(plan: Adoption, model: Model, wanted: Sequence[str] | None) -> str:
    """Why no modifier can be trained, empty if they can; `wanted` are the domains that must get one (None: any may).

    Raises `DataError` for questions that cannot be graded, `CogumiError` for an unknown domain and for a folder with
    other work in it, `TrainingError` if a wanted modifier cannot be trained.
    """
    names = [d.name for d in plan.survey.gradable]
    if not names:
        raise DataError(
            "the answers are free text, which no grader can judge: give short answers, or a 'check' in each row "
            "(docs/your-data.md lists the graders)"
        )
    for name in wanted or ():
        if name in {d.name for d in plan.survey.domains} - set(names):
            raise DataError(
                f"the answers of '{name}' are free text, which no grader can judge; no modifier can be trained"
            )
        if name not in names:
            raise CogumiError(f"no question is of the domain '{name}'; {nearest(name, names)}")
    questions = sum(d.questions for d in plan.survey.gradable)
    if questions < LEAST:
        raise DataError(
            f"{questions} different questions cannot be divided into {len(SHARES)} sets; give at least {LEAST}"
        )
    _check_folder(plan, model)
    if wanted is not None and not wanted:
        return ""
    problems = recipe_plan.plan(parsed(head(plan) + modifiers(plan, wanted or names), plan)).problems
    step = f"step '{WEIGHTS}': "
    found = next((line.removeprefix(step) for line in problems if line.startswith(step)), "")
    if found and wanted:
        raise TrainingError(f"{found}: leave out --modifiers")
    return found


def room_for_answers(survey: Survey, model: Model) -> int:
    """Tokens that the model's context leaves for an answer to the longest question, at most `LONGEST_ANSWER`.

    Raises `DataError` if these are fewer than the answers of the files take.
    """
    context, room = model.trained_context, LONGEST_ANSWER
    for domain in survey.gradable:
        tokens = len(model.tokenizer.render(Request(messages=domain.longest.messages)))
        if context and tokens + survey.max_tokens > context:
            raise DataError(
                f"the question {domain.longest.source} has {tokens} tokens; with {survey.max_tokens} for an answer "
                f"that is more than the model's context of {context}: shorten that row or remove it"
            )
        room = min(room, context - tokens) if context else room
    return room


def _check_folder(plan: Adoption, model: Model) -> None:
    """`CogumiError` if the folder is no build, or holds a bundle of another model or of other questions."""
    home = plan.root / plan.name
    if domain_name(plan.name) != plan.name:
        raise CogumiError(
            f"'{plan.name}' cannot be the name of a build; use letters, digits, - and _: {domain_name(plan.name)}"
        )
    check_home(home)
    if not (home / "bundle" / artifact.MANIFEST).is_file():
        return
    rows, base = (artifact.read_manifest(home / step) for step in ("rows", "base"))
    planned = {step.name: step.fingerprint for step in fingerprint.plan(parsed(head(plan), plan))}
    file = base.metrics.get("requantized_from", {}).get("sha256", base.metrics["base_fingerprint"])
    other = "another model" if file != sha256(model.path) else "other questions" * (rows.fingerprint != planned["rows"])
    if other:
        raise CogumiError(f"{home} holds a bundle made from {other}: choose another --out, or remove that folder")

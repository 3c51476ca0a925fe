"""The command `adopt`: a model and question files become a calibrated bundle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cogumi.cli import console
from cogumi.cli.building import JobsOption
from cogumi.cli.options import RUNS, ColumnOption, FormOption, JsonOption, LayoutOption, chosen_reading
from cogumi.cli.progress import BuildProgress
from cogumi.cli.type_table import base_line, chosen_type, print_types

if TYPE_CHECKING:
    from cogumi.data.sources.question_files import Reading
    from cogumi.data.sources.survey import Survey
    from cogumi.evaluate.bench.type_comparison import Comparison
    from cogumi.pipeline.adopt import Adopted
    from cogumi.pipeline.adopted_recipe import Adoption

AUTO, NONE = "auto", "none"
UPPER = 1 / 3
"""Share of the layers, from the top, that modifiers are trained on."""


def adopt(
    model: Annotated[str, typer.Argument(help="A GGUF file, or the name `smollm2`.")],
    data: Annotated[list[Path], typer.Option("--data", help="File of questions with answers; may be repeated.")],
    domains: Annotated[
        str | None, typer.Option(help="Use only these domains, separated by commas.", show_default="all")
    ] = None,
    modifiers: Annotated[
        str,
        typer.Option(help="Domains that get a modifier, separated by commas; `auto`: where it helps; `none`."),
    ] = AUTO,
    e: Annotated[
        float, typer.Option("--errors", min=0.001, max=0.5, help="Largest share of wrong answers among accepted ones.")
    ] = 0.05,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the build.", show_default="runs/<first file's name>")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the model into the bundle.")] = False,
    type: Annotated[
        str | None,
        typer.Option(
            help="Requantize the model to this llama.cpp type, or to the `fastest` here; what that costs is measured "
            "and shown.",
            show_default="the file as it is",
        ),
    ] = None,
    layout: LayoutOption = None,
    form: FormOption = None,
    column: ColumnOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the work begins.")] = False,
    jobs: JobsOption = 1,
    json: JsonOption = False,
) -> None:
    """Make a model honest about your questions: calibrate it on them, train modifiers where it fails, report.

    Your files are divided into five sets, so that every figure is measured on questions that nothing was fitted on. The
    recipe is written beside the build; change it and run `cogumi build` on it.

    Example: `cogumi adopt model.gguf --data questions.jsonl`, then `cogumi chat runs/questions/bundle`
    """
    from cogumi.data.sources.survey import domain_name
    from cogumi.pipeline import adoption_checks
    from cogumi.pipeline.adopted_recipe import Adoption

    opened, found = adoption_checks.usable_model(model), _survey(data, domains, chosen_reading(layout, form, column))
    layers = int(opened.describe()["layers"])
    home = out or RUNS / domain_name(data[0].name.split(".")[0])
    home = home if home.name.strip(".") else home.resolve()
    chosen = None if modifiers == AUTO else [] if modifiers == NONE else [domain_name(n) for n in modifiers.split(",")]
    home.parent.mkdir(parents=True, exist_ok=True)  # relative paths of the recipe start there
    room = adoption_checks.room_for_answers(found, opened)
    upper = max(1, round(UPPER * layers))
    plan = Adoption(home.name, model, found, home.parent, e, upper, found.max_tokens, room, copy)
    obstacle = adoption_checks.check(plan, opened, chosen)
    kind, types = chosen_type(model, type) if found.gradable else (None, None)
    plan = replace(plan, type=kind)
    if not json:
        _announce(plan, chosen, types, obstacle)
        if not yes and console.STDERR.is_terminal and not typer.confirm("Build this?", default=True):
            raise SystemExit(1)
    began = time.monotonic()
    done = _build(plan, chosen, obstacle, jobs)
    report = {**done.report, "seconds": time.monotonic() - began}  # of all phases, not of the last build alone
    if json:
        shown = {"recipe_file": str(done.recipe), "modifier_reasons": done.reasons}
        console.print_json({**report, **shown, "type": kind, "types": types.document() if types else None})
        return
    console.print_report(report)
    console.STDOUT.print(f"recipe: {done.recipe}", soft_wrap=True, markup=False)
    console.print_next(home / "bundle")


def _announce(plan: Adoption, chosen: Sequence[str] | None, types: Comparison | None, obstacle: str) -> None:
    """Print what the files hold, what will be done, what a chosen type costs, and what will be missing."""
    from cogumi.pipeline.adopt import intention, shortage

    _show(plan.survey)
    if plan.survey.gradable:
        _say(intention(plan.survey, chosen))
    if types:
        print_types(plan.model, types)
        console.STDOUT.print(base_line(types, plan.type), soft_wrap=True, markup=False)
    if plan.survey.gradable and (line := shortage(plan.survey, plan.e)):
        _say(line)
    if obstacle:
        _say(f"without modifiers: {obstacle}")


def _say(line: str) -> None:
    console.STDERR.print(line, soft_wrap=True, markup=False)


def _build(plan: Adoption, chosen: Sequence[str] | None, obstacle: str, jobs: int | None) -> Adopted:
    """Build the bundle with a progress bar; Ctrl-C ends with a line and code 130."""
    from cogumi.pipeline import adopt as adoption
    from cogumi.pipeline.build import build

    def run(recipe: Any) -> dict[str, Any]:
        with BuildProgress() as progress:
            return build(recipe, plan.root, jobs=jobs, progress=progress)

    try:
        with adoption.only_adoption(plan.root / plan.name):
            return adoption.adopt(plan, plan.root, chosen, run, _say, obstacle)
    except KeyboardInterrupt:
        _say("cogumi: stopped; finished steps are kept: run the same command again to continue")
        raise SystemExit(130) from None


def _survey(data: list[Path], domains: str | None, reading: Reading) -> Survey:
    """What the files hold of the named domains (None: of all). Raises `CogumiError` for an unknown domain."""
    from cogumi.core.errors import CogumiError
    from cogumi.data.sources.survey import domain_name, survey

    found = survey(data, reading)
    if domains is None:
        return found
    wanted = [domain_name(name) for name in domains.split(",")]
    if unknown := sorted(set(wanted) - {d.name for d in found.domains}):
        names = ", ".join(d.name for d in found.domains)
        raise CogumiError(f"no question is of the domain '{unknown[0]}'; the files have: {names}")
    return replace(found, domains=tuple(d for d in found.domains if d.name in wanted))


def _show(found: Survey) -> None:
    """Print what the files hold."""
    rows = [
        [
            d.name,
            f"{d.rows:,}",
            f"{d.questions:,}",
            f"{d.rejected:,}",
            d.grader or "none: free text",
            " ".join(d.example.messages[-1].content.split())[:40],
            " ".join(d.example.answer.split())[:20],
        ]
        for d in found.domains
    ]
    columns = ["domain", "rows", "different", "rejected", "grader", "first question", "its answer"]
    console.table("questions", columns, rows)

"""Commands that build, and that look ahead: `build`, `demo`, `plan`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from cogumi import show
from cogumi.cli.options import RUNS, JsonOption, RunsOption


def _build(recipe: str, runs: Path, seed: int | None) -> dict[str, Any]:
    from cogumi.pipeline import build
    from cogumi.recipe import load_recipe

    with show.BuildProgress() as progress:
        return build(load_recipe(recipe), runs, seed=seed, progress=progress)


def build(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name, or a YAML file.")] = "tiny",
    runs: RunsOption = RUNS,
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's.", show_default="recipe's")] = None,
    json: JsonOption = False,
) -> None:
    """Build a bundle from a recipe; what is built already is kept, what was interrupted goes on.

    Example: `cogumi build tiny` leaves the bundle in runs/tiny/bundle and its figures in runs/tiny/report.md.
    """
    report = _build(recipe, runs, seed)
    if not report:
        return  # a process that only helped to train
    if json:
        show.emit(report)
    else:
        show.print_report(report)


def demo(runs: RunsOption = RUNS) -> None:
    """Build the tiny recipe, ask it questions that take different routes, and show what it came to.

    Example: `cogumi demo` (some ten minutes the first time, seconds after that).
    """
    from cogumi.cascade.opening import open_cascade
    from cogumi.chat import Conversation

    report = _build("tiny", runs, None)
    bundle = runs / report["recipe"] / "bundle"
    with closing(open_cascade(bundle)) as cascade:
        for row in report["showcase"]:
            show.print_question(row["question"], row["why"])
            show.print_reasons(Conversation(cascade).say(row["question"], show.stream))
    show.print_report(report)
    show.print_next(bundle)


def plan(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name, or a YAML file.")] = "tiny",
    check: Annotated[
        bool, typer.Option("--check", help="Only say what would stop it, a line each; exit code 1 if anything would.")
    ] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of one GPU, such as 80GB: what takes more is a problem.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share weights, gradients and optimizer.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest row.", show_default="by the size of the data")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what a recipe takes before anything is built: parameters, tokens, memory, disk. Nothing is downloaded.

    Example: `cogumi plan cogumi-8b --check --gpu-memory 80GB`
    """
    from dataclasses import asdict

    from cogumi import plan as planning
    from cogumi.recipe import load_recipe

    hardware = planning.Hardware(planning.parse_bytes(gpu_memory) if gpu_memory else None, gpus)
    found = planning.plan(load_recipe(recipe), hardware, length)
    if json:
        show.emit(asdict(found))
    elif not check:
        show.table(f"recipe {found.recipe}", planning.COLUMNS, planning.table(found))
        for line in planning.remarks(found):
            show.OUT.print(line, soft_wrap=True, markup=False)
    for line in found.problems if not json else ():
        show.NOTES.print(line, soft_wrap=True, markup=False)
    if check and found.problems:
        raise SystemExit(1)
    if check and not json:
        show.OUT.print(f"recipe {found.recipe}: {len(found.steps)} steps, nothing in the way")

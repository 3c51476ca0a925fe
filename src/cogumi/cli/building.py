"""Commands that build, and that look ahead: `build`, `demo`, `plan`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cogumi.cli import console
from cogumi.cli.options import RUNS, BandwidthOption, JsonOption, PlannedArgument, RunsOption
from cogumi.cli.progress import BenchProgress, BuildProgress, ByteProgress

if TYPE_CHECKING:
    from cogumi.pipeline.plan.command import Answer

JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Steps that run side by side, each with its share of the cores. Another number of threads per step gives "
        "other bytes.",
        show_default="as many as cores and recipe allow, 1 with a GPU",
    ),
]


def _build(recipe: str, runs: Path, seed: int | None, jobs: int | None) -> dict[str, Any]:
    from cogumi.pipeline.build import build
    from cogumi.pipeline.recipe import load_recipe

    try:
        with BuildProgress() as progress:
            return build(load_recipe(recipe), runs, seed=seed, jobs=jobs, progress=progress)
    except KeyboardInterrupt:
        console.NOTES.print("cogumi: stopped; run the same command again to go on: finished steps are kept")
        raise SystemExit(130) from None


def build(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name, or a YAML file.")] = "tiny",
    runs: RunsOption = RUNS,
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's.", show_default="recipe's")] = None,
    jobs: JobsOption = None,
    json: JsonOption = False,
) -> None:
    """Build a bundle from a recipe; what is built already is kept, what was interrupted goes on.

    Example: `cogumi build tiny` leaves the bundle in runs/tiny/bundle and its figures in runs/tiny/report.md.
    """
    report = _build(recipe, runs, seed, jobs)
    if not report:
        return  # a process that only helped to train
    if json:
        console.emit(report)
    else:
        console.print_report(report)


def demo(runs: RunsOption = RUNS, jobs: JobsOption = None) -> None:
    """Build the tiny recipe, ask it questions that take different routes, and show what it came to.

    Example: `cogumi demo` (some ten minutes the first time, seconds after that).
    """
    from cogumi.cascade.opening import open_cascade
    from cogumi.cli.chat import answer

    report = _build("tiny", runs, None, jobs)
    bundle = runs / report["recipe"] / "bundle"
    with closing(open_cascade(bundle)) as cascade:
        for row in report["showcase"]:
            console.print_question(row["question"], row["why"])
            console.print_reasons(answer(cascade.chat(), row["question"]))
    console.print_report(report)
    console.print_next(bundle)


def plan(
    what: PlannedArgument = "tiny",
    disk: Annotated[str | None, typer.Option(help="Bytes that the bundle may have, such as 890MB.")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory it may take when opened, such as 1.5GB.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Speed at which it must at least answer.")] = None,
    context: Annotated[int, typer.Option(min=32, help="Tokens of prompt and answer together, per request.")] = 2048,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 1,
    cache: Annotated[
        str | None,
        typer.Option(help="Type of the key-value cache: f16, q8_0 or q4_0.", show_default="q8_0 where heads allow"),
    ] = None,
    bandwidth: BandwidthOption = None,
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
    """Say what a recipe takes and what comes of it before anything is built. Nothing is downloaded.

    Training: parameters, tokens, memory, disk. The bundle: bytes of every file from the shapes alone, memory when
    opened, and the speed that memory bandwidth allows. Ask whether it fits with --disk, --ram and --tokens-per-second:
    if not, the smallest change that makes it fit is named; if nothing does, the arithmetic why, and exit code 1.

    A GGUF file is also run: its real bytes and speed stand beside the planned ones.

    Examples: `cogumi plan laptop-890mb --disk 890MB --ram 1.5GB --tokens-per-second 30`,
    `cogumi plan Llama-3.1-8B --disk 540MB`, `cogumi plan cogumi-8b --check --gpu-memory 80GB`
    """
    from cogumi.core.amounts import parse_bytes, parse_rate
    from cogumi.core.estimate import Hardware
    from cogumi.pipeline.plan.bundle_memory import Serving
    from cogumi.pipeline.plan.command import Options, answer_to
    from cogumi.pipeline.plan.routes import Budget

    of_disk, of_ram, of_gpu = (parse_bytes(text) if text is not None else None for text in (disk, ram, gpu_memory))
    options = Options(
        budget=Budget(of_disk, of_ram, tokens_per_second),
        serving=Serving(context, slots, cache),
        bandwidth=parse_rate(bandwidth) if bandwidth is not None else None,
        hardware=Hardware(of_gpu, gpus),
        length=length,
    )
    answer = answer_to(what, options, BenchProgress)
    if json:
        console.emit(answer.document())
    elif check:
        _print_problems(answer)
    else:
        _print_plan(answer)
    if answer.refused or (check and answer.problems):
        raise SystemExit(1)


def _print_problems(answer: Answer) -> None:
    """What stands in the way of a plan, a line each."""
    for line in answer.problems:
        console.NOTES.print(line, soft_wrap=True, markup=False)
    if not answer.problems:
        console.OUT.print(f"{answer.title}, nothing in the way")


def _print_plan(answer: Answer) -> None:
    """The tables of a plan, remarks, and what makes it impossible."""
    for title, columns, rows in answer.tables():
        console.table(title, columns, rows)
    for line in answer.remarks():
        console.OUT.print(line, soft_wrap=True, markup=False)
    for line in answer.faults:
        console.NOTES.print(line, soft_wrap=True, markup=False)


def vocabulary(
    model: Annotated[Path, typer.Argument(help="A model folder; of its files only the tokenizer's are read.")],
    corpus: Annotated[
        list[Path], typer.Option(help="Text file or folder that tokens are counted in; may be repeated.")
    ],
    measure: Annotated[list[Path], typer.Option(help="Text file or folder to measure on, kept out of the corpus.")],
    size: Annotated[list[int] | None, typer.Option(min=257, help="So many tokens.")] = None,
    cover: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="What covers this share of the corpus's tokens.", show_default="the stage's"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what the stage `trim` would make of a vocabulary: tokens per word before and after, and lines that come back.

    Example: `cogumi vocabulary models/llama --corpus texts --measure kept_out --size 32768 --cover 0.995`
    """
    from cogumi.compress.trim.choice import COVERS, Choice, survey
    from cogumi.compress.trim.fertility import read_texts
    from cogumi.compress.trim.trimmed_vocabulary import Vocabulary

    whole = Vocabulary.load(model)
    asked = [*(size or ()), *(cover or ())] or COVERS
    texts = list(read_texts(measure))
    with ByteProgress("counting tokens") as bar:
        choice = Choice.by(whole, [], read_texts(corpus, bar.advanced))
    with ByteProgress("measuring") as bar:
        found = survey(choice, texts, asked, bar.advanced)
    if json:
        console.emit(found)
        return
    rows = [
        [
            str(row["asked"]),
            f"{row['tokens']:,}",
            f"{row['coverage']:.2%}",
            f"{row['tokens_per_word']['before']:.3f}",
            f"{row['tokens_per_word']['after']:.3f}",
            f"{row['tokens_per_word']['rise']:+.2%}",
            f"{row['round_trip']['ascii']:.2%} of {row['lines']['ascii']:,}",
            f"{row['round_trip']['unicode']:.2%} of {row['lines']['unicode']:,}",
        ]
        for row in found
    ]
    columns = ("asked", "tokens", "covers", "per word before", "after", "rise", "ASCII lines back", "other lines back")
    console.table(f"vocabulary of {model}: {len(whole.bpe.ids):,} tokens", columns, rows)

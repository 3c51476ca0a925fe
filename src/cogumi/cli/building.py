"""Commands that build or plan: `build`, `demo`, `plan`, `vocabulary`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cogumi.cli import console
from cogumi.cli.options import RUNS, BandwidthOption, JsonOption, PlannedArgument, RunsOption
from cogumi.cli.progress import BenchProgress, BuildProgress, ByteProgress
from cogumi.cli.type_table import plan_types
from cogumi.core.errors import CogumiError, RecipeError

if TYPE_CHECKING:
    from cogumi.pipeline.plan.command import Answer

JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Number of steps to run in parallel; they share the cores, and their threads affect the bytes of the "
        "result. `build` runs as many as cores and recipe allow, with a GPU 1.",
    ),
]


FOLLOW_UP = (
    ("What is the capital of Italy?", "an everyday fact"),
    ("And of Japan?", "a follow-up: it makes sense after the question before only"),
)
"""The end of the demo: a conversation of two questions."""


def _build(recipe: str, runs: Path, seed: int | None, jobs: int | None) -> dict[str, Any]:
    from cogumi.pipeline.build import build
    from cogumi.pipeline.plan import recipe_plan
    from cogumi.pipeline.recipe import load_recipe

    loaded = load_recipe(recipe)
    if problems := recipe_plan.plan(loaded).problems:
        raise RecipeError("; ".join(problems))
    try:
        with BuildProgress() as progress:
            return build(loaded, runs, seed=seed, jobs=jobs, progress=progress)
    except KeyboardInterrupt:
        console.STDERR.print("cogumi: stopped; finished steps are kept: run the same command again to continue")
        raise SystemExit(130) from None


def build(
    recipe: Annotated[str, typer.Argument(help="Name of a built-in recipe, or a YAML file.")] = "smollm2",
    runs: RunsOption = RUNS,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="the recipe's")] = None,
    jobs: JobsOption = None,
    json: JsonOption = False,
) -> None:
    """Build a bundle from a recipe; finished steps are kept, interrupted ones continue.

    Example: `cogumi build smollm2` writes the bundle to runs/smollm2/bundle and its figures to runs/smollm2/report.md.
    """
    report = _build(recipe, runs, seed, jobs)
    if not report:
        return  # a helper process of a distributed training
    if json:
        console.print_json(report)
    else:
        console.print_report(report)


def demo(runs: RunsOption = RUNS, jobs: JobsOption = 1) -> None:
    """Build the recipe smollm2, ask questions that take different routes through the cascade, and show the figures.

    Example: `cogumi demo` (about 25 minutes the first time on two cores, seconds after that).
    """
    from cogumi.cascade.opening import open_cascade
    from cogumi.cli.chat import answer

    report = _build("smollm2", runs, None, jobs)
    bundle = runs / report["recipe"] / "bundle"
    with closing(open_cascade(bundle)) as cascade:
        for row in report["showcase"]:
            console.print_question(row["question"], row["why"])
            console.print_verdict(answer(cascade.chat(), row["question"]))
        conversation = cascade.chat()
        for question, why in FOLLOW_UP:
            console.print_question(question, why)
            console.print_verdict(answer(conversation, question))
    console.print_report(report)
    console.print_next(bundle)


def plan(
    what: PlannedArgument = "smollm2",
    disk: Annotated[str | None, typer.Option(help="Size limit of the bundle, such as 890MB.")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory limit of the opened bundle, such as 1.5GB.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Minimum speed of an answer.")] = None,
    context: Annotated[int, typer.Option(min=32, help="Maximum tokens per request, prompt and answer.")] = 2048,
    slots: Annotated[int, typer.Option(min=1, help="Number of requests answered at the same time.")] = 1,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Type of the key-value cache: f16, q8_0 or q4_0.", show_default="q8_0 if the model allows it"
        ),
    ] = None,
    bandwidth: BandwidthOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Print only the problems, one per line; exit code 1 if there are any.")
    ] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of one GPU, such as 80GB; a step that needs more is a problem.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share weights, gradients and optimizer state.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest row.", show_default="estimated from the data")
    ] = None,
    types: Annotated[
        bool, typer.Option("--types", help="Measure the types of a model (a GGUF file, a folder, `smollm2`) here.")
    ] = False,
    questions: Annotated[
        int | None, typer.Option(min=5, help="With --types: questions that each type answers.", show_default="60")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Estimate the cost of a recipe and the size of its bundle before the build. Downloads nothing.

    For training: parameters, tokens, memory, disk. For the bundle: bytes of every file, computed from the model's
    shape; memory when opened; the speed that memory bandwidth allows. If a limit (--disk, --ram,
    --tokens-per-second) is missed, the smallest change that meets it is shown; if there is none, the calculation is
    shown and the exit code is 1. A GGUF file is also run and its measured size and speed are shown.

    With --types, the model is measured in every llama.cpp type that makes sense: speed, loss, accuracy, and how well
    it knows when it is right. With --check too, only the disk space is checked.

    Examples: `cogumi plan laptop-890mb --disk 890MB --ram 1.5GB --tokens-per-second 30`,
    `cogumi plan Llama-3.1-8B --disk 540MB`, `cogumi plan cogumi-8b --check --gpu-memory 80GB`,
    `cogumi plan model.gguf --types`
    """
    if questions is not None and not types:
        raise CogumiError("--questions is for --types, which asks them")
    if types:
        limits = (disk, ram, tokens_per_second, cache, bandwidth, gpu_memory, length)
        plan_types(what, questions, any(limit is not None for limit in limits), check, json)
        return
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
        console.print_json(answer.document())
    elif check:
        _print_problems(answer)
    else:
        _print_plan(answer)
    if answer.refused or (check and answer.problems):
        raise SystemExit(1)


def _print_problems(answer: Answer) -> None:
    """Print the problems of a plan, one per line."""
    for line in answer.problems:
        console.STDERR.print(line, soft_wrap=True, markup=False)
    if not answer.problems:
        console.STDOUT.print(f"{answer.title}, no problems found")


def _print_plan(answer: Answer) -> None:
    """Print the tables of a plan, its remarks, and the limits it cannot meet."""
    for title, columns, rows in answer.tables():
        console.table(title, columns, rows)
    for line in answer.remarks():
        console.STDOUT.print(line, soft_wrap=True, markup=False)
    for line in answer.faults:
        console.STDERR.print(line, soft_wrap=True, markup=False)


def vocabulary(
    model: Annotated[Path, typer.Argument(help="Folder of a model; only its tokenizer is read.")],
    corpus: Annotated[list[Path], typer.Option(help="Text file or folder to count tokens in; may be repeated.")],
    measure: Annotated[list[Path], typer.Option(help="Text file or folder to measure on, not part of the corpus.")],
    size: Annotated[list[int] | None, typer.Option(min=257, help="Keep this many tokens; may be repeated.")] = None,
    cover: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep enough tokens to cover this share of the corpus; may be repeated.",
            show_default="the stage's default",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Preview a vocabulary trimmed by the stage `trim`: tokens per word, and share of lines that round-trip.

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
        console.print_json(found)
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
    columns = ("requested", "tokens", "coverage", "tokens/word before", "after", "rise", "ASCII lines", "other lines")
    console.table(f"vocabulary of {model}: {len(whole.bpe.ids):,} tokens", columns, rows)

"""Commands that inspect and measure: `inspect`, `eval`, `bench`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogumi.cli import console
from cogumi.cli.options import (
    RUNS,
    BaseModelOption,
    BaseUrlOption,
    BundleArgument,
    ColumnOption,
    FormOption,
    JsonOption,
    JudgeModelOption,
    JudgeOption,
    LayoutOption,
    ThreadsOption,
    chosen_bundle,
    chosen_engines,
    chosen_reading,
)
from cogumi.cli.progress import BenchProgress, SuiteProgress
from cogumi.core.errors import CogumiError
from cogumi.core.types import Example, Request

if TYPE_CHECKING:
    from cogumi.evaluate.suite import Task

MAX_TOKENS = 256
"""Most tokens of an answer in `eval`."""
TIER = "cascade"
"""Tier that `eval` asks by default."""
CONTEXTS = (512, 4096)
"""Smallest and largest context of `eval`."""


def inspect(
    path: Annotated[str, typer.Argument(help="Bundle, artifact, folder of a run, or recipe.")],
    json: JsonOption = False,
) -> None:
    """Describe a bundle, artifact, run or recipe: sizes, fingerprints, figures. Verifies every checksum.

    Example: `cogumi inspect runs/smollm2/bundle`
    """
    from cogumi.cli.inspection import describe

    found = describe(path)
    if json:
        console.print_json(found)
    else:
        console.print_inspection(found)


def evaluate(
    bundle: BundleArgument = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Questions: JSONL of any form in docs/your-data.md; with --suite, the suite's data."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Run this suite instead: honesty, routing, domains, escalation, cache, deliberation, learning, "
            "templates, compression, training, cloze or automation.",
            show_default="grade the answers to --data",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the questions with their answers and verdicts, one JSON object per line; with --suite, "
            "folder for pictures and figures."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --suite: random seed.")] = 0,
    tier: Annotated[str, typer.Option(help="Tier to ask: cascade, base, draft or modifier:NAME.")] = TIER,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use only this many rows of a file, from the first; also suites cloze, automation."),
    ] = None,
    threads: ThreadsOption = None,
    base_url: BaseUrlOption = None,
    base_model: BaseModelOption = None,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    layout: LayoutOption = None,
    form: FormOption = None,
    column: ColumnOption = None,
    json: JsonOption = False,
) -> None:
    """Ask a bundle the questions in a file and grade the answers, or run a suite of measurements.

    Example: `cogumi eval runs/smollm2/bundle --data questions.jsonl --tier base --limit 200`, or
    `cogumi eval --suite honesty --out honesty`
    """
    if suite is not None:
        from cogumi.evaluate.suite import Task

        chosen = {
            "--tier": tier != TIER,
            "--base-url": base_url,
            "--base-model": base_model,
            "--judge": judge,
            "--judge-model": judge_model,
            "--layout": layout,
            "--form": form,
            "--column": column,
        }
        if ignored := [name for name, value in chosen.items() if value]:
            raise CogumiError(f"{', '.join(ignored)} does not apply to a suite; leave it out")
        _measure(suite, Task(bundle, data, out, seed, limit, threads), json)
        return
    if data is None:
        raise CogumiError("give a file of questions with --data FILE, or a suite with --suite NAME")
    from cogumi.cascade.opening import open_cascade
    from cogumi.core.files import write_text
    from cogumi.data.sources.question_files import load
    from cogumi.evaluate.accuracy import ask, figures, with_checks
    from cogumi.evaluate.grading_models import grading_models

    examples, rejected = load(data, reading=chosen_reading(layout, form, column))
    examples, graders = with_checks(examples[:limit])
    engines = chosen_engines(base_url, base_model)
    size = _context(examples)
    with closing(open_cascade(chosen_bundle(bundle), context=size, threads=threads, engines=engines)) as cascade:
        model = _model(tier, cascade.models)
        resolved = [
            cascade.resolve(model, Request(messages=example.messages, max_tokens=MAX_TOKENS)) for example in examples
        ]
        with grading_models(judge, judge_model) as models:
            asked, failed = ask(resolved[0][0], [request for _, request in resolved], examples, models)
    found = figures(asked)
    found |= {
        "tier": tier,
        "graders": graders,
        "data": str(data),
        "rejected": [str(row) for row in rejected],
        "failed": failed,
    }
    if out is not None:
        write_text(out, "".join(dumps(one.row(), ensure_ascii=False) + "\n" for one in asked))
        found["out"] = str(out)
    if json:
        console.print_json(found)
    else:
        console.print_evaluation(found)


def _context(examples: Sequence[Example]) -> int:
    """A context that holds the longest question and an answer; a row that exceeds `CONTEXTS` is reported as failed."""
    from cogumi.core.facts import TEMPLATE, RowFacts

    pairs = [(sum(len(m.content.encode()) for m in example.messages), 0) for example in examples]
    longest = RowFacts.of(pairs, len(pairs)).rows(TEMPLATE).longest
    least, most = CONTEXTS
    return min(max(longest + MAX_TOKENS, least), most)


def _model(tier: str, models: Iterable[str]) -> str:
    """The model name of a tier; `CogumiError` for an unknown tier."""
    names = {TIER: "cogumi"}
    for model in models:
        name = model.removeprefix("cogumi:")
        if name in ("base", "draft"):
            names[name] = model
        elif name.startswith("base+"):
            names[name.replace("base+", "modifier:")] = model
    if tier not in names:
        raise CogumiError(f"this bundle has no tier {tier!r}; it has: {', '.join(names)}")
    return names[tier]


def _measure(name: str, task: Task, json: bool) -> None:
    """Run a suite, on the newest bundle if none is given, and print its table; write the figures to `task.out`."""
    from cogumi.bundle.packed import is_packed
    from cogumi.bundle.unpack import BundleFiles
    from cogumi.core.files import write_json
    from cogumi.evaluate.suite import suite

    measured, bundle = suite(name), task.bundle
    if bundle is None and any(RUNS.glob("*/bundle/bundle.json")):
        bundle = chosen_bundle(None)
    with ExitStack() as opened:
        if bundle is not None and is_packed(bundle):  # suites read the files of the bundle directly
            bundle = opened.enter_context(closing(BundleFiles(bundle))).bundle.path
        progress = opened.enter_context(SuiteProgress(name))
        found = measured.run(replace(task, bundle=bundle, progress=progress.advanced))
    figures = console.findings(name, found)
    if task.out is not None:
        write_json(task.out / f"{name}.json", figures)
    if json:
        console.print_json(figures)
    else:
        console.print_findings(figures)


def bench(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Measure only this row; may be repeated.")] = None,
    shape: Annotated[
        str, typer.Option(help="Shape of the random model: pico, draft, 1b (0.7 GB) or 8b (4.9 GB).")
    ] = "1b",
    model: Annotated[
        Path | None, typer.Option(help="GGUF file, or bundle, to measure instead of a random model.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --model: text file to measure perplexity on.")] = None,
    accept: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Acceptance rate of the simulated draft; may be repeated.", show_default="four"
        ),
    ] = None,
    threads: ThreadsOption = None,
    minutes: Annotated[float, typer.Option(min=0, help="Duration of the row `soak`.")] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="Plot the figures to this file, such as bench.png.")] = None,
) -> None:
    """Measure the speed and memory of each feature with and without it, alternating, and against memory bandwidth.

    Downloads nothing: models of real shapes with random weights are written to the cache folder once. The rows
    `soak`, `start`, `unpack`, `concurrency_16`, `adapter_training`, those for bundles of real shapes
    (`bundle_1b_q4_k_m`, `bundle_1b_iq4_xs`, `bundle_mobile`) and `price` (the time of a bundle's answers against
    llama.cpp's server: give the bundle with --model) run only with --only.

    Example: `cogumi bench --json bench.json --picture bench.png`, or `cogumi bench --only single_stream`
    """
    from cogumi.core.files import write_json
    from cogumi.evaluate.bench import picture as pictures
    from cogumi.evaluate.bench.run import ACCEPT, run

    if picture is not None and picture.suffix not in pictures.FORMATS:
        raise CogumiError(f"{picture} is not a picture file; use one of the endings {', '.join(pictures.FORMATS)}")
    with BenchProgress() as progress:
        found = run(
            progress,
            only=only or (),
            shape=shape,
            model=model,
            accept=accept or ACCEPT,
            threads=threads,
            text=text,
            minutes=minutes,
        )
    if json is not None:
        write_json(json, found)
    if picture is not None:
        pictures.draw(picture, found)
    console.print_bench(found)

"""The `cogumi` command: parses, calls, prints. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from cogumi import __version__, show
from cogumi.errors import BundleError, CogumiError
from cogumi.types import Request

app = typer.Typer(
    name="cogumi",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RUNS = Path("runs")
_debug = False

RunsOption = Annotated[Path, typer.Option(help="Folder that builds are kept in.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
BundleArgument = Annotated[
    Path | None, typer.Argument(help="Folder of a bundle.", show_default="the newest runs/*/bundle")
]
ModeOption = Annotated[
    str | None,
    typer.Option(
        help="`fast` never asks a modifier, `balanced` may, `accurate` tries more on hard questions; also `turbo`, "
        "`mobile`, `desktop`, or one of your --settings.",
        show_default="what suits the question",
    ),
]
SettingsOption = Annotated[
    Path | None, typer.Option(help="YAML with modes of your own, and which questions get which mode.")
]
StateOption = Annotated[
    Path | None,
    typer.Option(help="Folder for what is kept between runs: session memory, ratings.", show_default="keep nothing"),
]

ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Processor threads to compute with.", show_default="what suits the model")
]


def _version(asked: bool) -> None:
    if asked:
        print(f"cogumi {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Build and run small local chat systems that know how sure they are.

    A first look: `cogumi demo`. Then: `cogumi chat`, `cogumi serve`, `cogumi inspect`.
    """
    global _debug
    _debug = debug


def _found(bundle: Path | None) -> Path:
    """The bundle named, or the newest one that was built here."""
    if bundle is not None:
        return bundle
    built = sorted(RUNS.glob("*/bundle/bundle.json"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise BundleError(f"there is no bundle in {RUNS}/; build one: cogumi build tiny, or name its folder")
    return built[-1].parent


def _build(recipe: str, runs: Path, seed: int | None) -> dict[str, Any]:
    from cogumi.pipeline import build
    from cogumi.recipe import load_recipe

    with show.BuildProgress() as progress:
        return build(load_recipe(recipe), runs, seed=seed, progress=progress)


@app.command()
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


@app.command()
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


@app.command()
def chat(
    bundle: BundleArgument = None,
    mode: ModeOption = None,
    once: Annotated[str | None, typer.Option(help="Answer this one question and end.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help='Worked examples to answer after: a JSON line {"question", "answer"} for each.')
    ] = None,
    settings: SettingsOption = None,
    state: StateOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to a bundle; under each answer stand the tier that gave it, P(correct) and why.

    Example: `cogumi chat runs/tiny/bundle --once "What is 3 + 4?"`
    """
    from cogumi.cascade.modes import load_settings
    from cogumi.cascade.opening import open_cascade
    from cogumi.chat import Conversation, load_examples, talk

    if json and once is None:
        raise CogumiError('--json prints one answer: give its question with --once "..."')
    chosen = load_settings(settings)
    chosen.check(mode)
    shown = load_examples(examples) if examples else ()
    with closing(open_cascade(_found(bundle), threads=threads, settings=chosen, state=state)) as cascade:
        conversation = Conversation(cascade, mode, chosen, shown)
        if once is None:
            talk(conversation)
        elif json:
            from cogumi.serve.schema import extension

            reply = conversation.say(once)
            show.emit({"question": once, "answer": reply.text, "finish_reason": reply.finish_reason} | extension(reply))
        else:
            show.print_reasons(conversation.say(once, show.stream))


@app.command()
def serve(
    bundle: BundleArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 8,
    context: Annotated[int, typer.Option(min=32, help="Tokens of prompt and answer together, per request.")] = 512,
    threads: ThreadsOption = None,
    cache: Annotated[
        str | None, typer.Option(help="Key-value cache: f16, q8_0 or q4_0.", show_default="q8_0 where it fits")
    ] = None,
    settings: SettingsOption = None,
    state: StateOption = None,
    reuse: Annotated[
        str | None,
        typer.Option(
            help="Give sure answers again: to the same question (`exact`), to near ones (`static`), or only where "
            "near ones have proven to be the same (`verified`).",
            show_default="never",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Serve a bundle to any OpenAI client, at http://HOST:PORT/v1; any API key is accepted.

    Example: `cogumi serve runs/tiny/bundle --port 8000`
    """
    from cogumi.cascade.modes import load_settings
    from cogumi.serve import api

    folder, chosen = _found(bundle), load_settings(settings)
    listener = api.bind(host, port)
    where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    show.NOTES.print(f"cogumi: loading {folder}", soft_wrap=True)

    def load() -> api.Served:
        from cogumi.cascade.opening import open_cascade

        return open_cascade(
            folder,
            slots=slots,
            context=context,
            threads=threads,
            cache=cache,
            settings=chosen,
            state=state,
            reuse=reuse,
        )

    def ready(cascade: api.Served) -> None:
        if json:
            show.emit({"url": f"{where}/v1", "bundle": str(folder), "models": list(cascade.models)})
        else:
            show.print_serving(where, cascade.models)

    api.serve(load, listener, ready)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A bundle, an artifact, a run's folder, or a recipe.")],
    json: JsonOption = False,
) -> None:
    """Say what something is: sizes, fingerprints, figures. Checksums are verified on the way.

    Example: `cogumi inspect runs/tiny/bundle`
    """
    from cogumi.inspection import look

    found = look(path)
    if json:
        show.emit(found)
    else:
        show.print_inspection(found)


def _model(tier: str, models: Sequence[str]) -> str:
    """The model name of a tier; `CogumiError` lists the tiers there are."""
    names = {"cascade": "cogumi"}
    for model in models:
        name = model.removeprefix("cogumi:")
        if name in ("base", "draft"):
            names[name] = model
        elif name.startswith("base+"):
            names[name.replace("base+", "modifier:")] = model
    if tier not in names:
        raise CogumiError(f"this bundle has no tier {tier!r}; it has: {', '.join(names)}")
    return names[tier]


@app.command(name="eval")
def evaluate(
    bundle: BundleArgument = None,
    data: Annotated[
        Path | None, typer.Option(help="Questions: JSONL in Alpaca or messages form; with --suite what that one wants.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Measure instead: honesty, routing, domains, escalation, cache, deliberation, learning, templates or "
            "training.",
            show_default="grade the answers to --data",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --suite: folder for its pictures and figures.")] = None,
    seed: Annotated[int, typer.Option(help="With --suite: seed of what it draws.")] = 0,
    tier: Annotated[str, typer.Option(help="cascade, base, draft or modifier:NAME.")] = "cascade",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Ask a bundle the questions of a file and grade the answers, or measure one of the suites.

    Example: `cogumi eval runs/tiny/bundle --data questions.jsonl --tier base --limit 200`, or
    `cogumi eval --suite honesty --out honesty`
    """
    if suite is not None:
        _measure(suite, bundle, data, out, seed, json)
        return
    if data is None:
        raise CogumiError("name the questions with --data FILE, or a --suite")
    from cogumi.cascade.opening import open_cascade
    from cogumi.data.load import load
    from cogumi.evaluate.measure import measure

    examples, rejected = load(data)
    examples = examples[:limit]
    with closing(open_cascade(_found(bundle), threads=threads)) as cascade:
        model = _model(tier, cascade.models)
        resolved = [cascade.resolve(model, Request(messages=example.messages)) for example in examples]
        figures = measure(resolved[0][0], [request for _, request in resolved], examples)
    figures |= {"tier": tier, "data": str(data), "rejected": [str(row) for row in rejected]}
    if json:
        show.emit(figures)
    else:
        show.print_evaluation(figures)


def _measure(name: str, bundle: Path | None, data: Path | None, out: Path | None, seed: int, json: bool) -> None:
    """Run a suite and print its table; with `out` the figures are kept beside the pictures."""
    from cogumi.artifact import write_json
    from cogumi.suite import Task, suite

    measured = suite(name)
    if bundle is None and any(RUNS.glob("*/bundle/bundle.json")):
        bundle = _found(None)
    with show.SuiteProgress(name) as progress:
        found = measured.run(Task(bundle, data, out, seed, progress.advanced))
    figures = show.findings(name, found)
    if out is not None:
        write_json(out / f"{name}.json", figures)
    if json:
        show.emit(figures)
    else:
        show.print_findings(figures)


@app.command()
def forget(
    user: Annotated[str, typer.Argument(help="The user as requests name them; `local` is the terminal's.")],
    state: Annotated[Path, typer.Option(help="The folder that --state named.")],
) -> None:
    """Delete what is remembered of a user: questions, answers, ratings.

    Example: `cogumi forget alice --state state`
    """
    from cogumi.cascade.memory import FILE, Memory

    if not (state / FILE).is_file():
        raise CogumiError(f"{state} holds no memory; name the folder that was given with --state")
    with closing(Memory(state / FILE)) as memory:
        show.OUT.print(f"{memory.forget(user)} turns of {user} deleted")


@app.command()
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


@app.command()
def bench(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Measure only the row of this name; may be repeated.")] = None,
    shape: Annotated[str, typer.Option(help="Made-up model: pico, draft, 1b (0.7 GB) or 8b (4.9 GB).")] = "1b",
    model: Annotated[Path | None, typer.Option(help="A GGUF file of your own instead.")] = None,
    text: Annotated[Path | None, typer.Option(help="With --model: a text to measure perplexity on.")] = None,
    accept: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Acceptance of a simulated draft; may be repeated.", show_default="four"),
    ] = None,
    threads: ThreadsOption = None,
    minutes: Annotated[float, typer.Option(min=0, help="How long the row `soak` runs.")] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="Draw the figures to this file, such as bench.png.")] = None,
) -> None:
    """Measure every feature against the same without it, in turns, and against what the memory allows.

    Without downloads: models of real shapes with made-up weights are written to the cache folder once. The rows
    `soak`, `start` and `concurrency_16` run only when named.

    Example: `cogumi bench --json bench.json --picture bench.png`, or `cogumi bench --only single_stream`
    """
    from cogumi.artifact import write_json

    try:
        from cogumi.bench import picture as pictures
        from cogumi.bench.run import ACCEPT, run
    except ModuleNotFoundError as error:
        raise CogumiError(f"cogumi bench needs the package '{error.name}': pip install 'cogumi[bench]'") from error
    if picture is not None and picture.suffix not in pictures.FORMATS:
        raise CogumiError(f"{picture} is no picture; name it with one of {', '.join(pictures.FORMATS)}")
    with show.BenchProgress() as progress:
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
    show.print_bench(found)


def main() -> None:
    """Run the command; an error of ours is one line and exit code 1."""
    try:
        app()
    except (CogumiError, OSError) as error:
        if _debug:
            raise
        show.print_error(error)
        raise SystemExit(1) from None

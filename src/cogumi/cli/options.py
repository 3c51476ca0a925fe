"""Options that several commands share, and the default bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogumi.cli import console
from cogumi.core.errors import BundleError, CogumiError
from cogumi.core.model_files import PACKAGED

if TYPE_CHECKING:
    from cogumi.cascade.engines import EngineFactory
    from cogumi.data.sources.question_files import Reading

RUNS = Path("runs")
RunsOption = Annotated[Path, typer.Option(help="Folder of the builds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
BundleArgument = Annotated[
    Path | None, typer.Argument(help="Folder of a bundle, packed or not.", show_default="the newest runs/*/bundle")
]
ModeOption = Annotated[
    str | None,
    typer.Option(
        help="`fast` uses the base only, `balanced` also modifiers, `accurate` also votes and critique for hard "
        "questions; or `straight`, `turbo`, `mobile`, `desktop`, or a mode of your --settings.",
        show_default="chosen per question",
    ),
]
SettingsOption = Annotated[
    Path | None, typer.Option(help="YAML file with your own modes and the rules that choose a mode per question.")
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for data kept between runs: conversations, ratings, added modifiers.", show_default="keep nothing"
    ),
]
HostOption = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")]
KeysOption = Annotated[
    Path | None,
    typer.Option(
        help="File of API keys (`cogumi keys add`): requests without one of them are refused.",
        show_default="any key is accepted, on this machine only",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="chosen for the model")
]
RepackOption = Annotated[
    bool,
    typer.Option(help="Keep a second copy of the weights in the layout that this CPU multiplies fastest."),
]
UnpackOption = Annotated[
    str | None,
    typer.Option(
        help="How to unpack a packed bundle: once into the cache folder (`cached`), into a temporary folder at each "
        "start (`eager`), or into the cache folder with each modifier at its first use (`lazy`).",
        show_default="cached",
    ),
]
PlannedArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A built-in recipe or a YAML file; or a single model: a known name such as Llama-3.2-1B, its folder, its "
        "config.json, or a GGUF file.",
    ),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option(help="Memory bandwidth of the target machine, such as 50GB/s.", show_default="measured here"),
]
AdapterMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory budget for modifiers, such as 500MB; above it, idle modifiers are freed, least recently used "
        "first.",
        show_default="no limit",
    ),
]
ModifiersOption = Annotated[
    Path | None,
    typer.Option(help="Folder from which clients may add modifiers at run time.", show_default="not allowed"),
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="Type of the key-value cache: f16, q8_0 or q4_0.", show_default="q8_0 if the model allows it"),
]
BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        help="Address, ending in /v1, of a server with OpenAI's API that replaces the bundle's base; no answer is then "
        "accepted as sure."
    ),
]
BaseModelOption = Annotated[str | None, typer.Option(help="With --base-url: the model name on that server.")]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="Model that scores answers from 1 to 10, where a check is `judge`: a bundle, a GGUF file, a model folder "
        "or smollm2; or with --judge-model the address of a server, ending in /v1."
    ),
]
JudgeModelOption = Annotated[str | None, typer.Option(help="With a server as --judge: the model name on it.")]
ReuseOption = Annotated[
    str | None,
    typer.Option(
        help="Reuse accepted answers: for the same question (`exact`), also for similar ones (`static`), or for "
        "similar ones once comparisons have verified that their answers agree (`verified`).",
        show_default="never",
    ),
]
LayoutOption = Annotated[
    str | None, typer.Option(help="How the question files are written, such as csv.", show_default="seen")
]
FormOption = Annotated[str | None, typer.Option(help="The form of their rows, such as messages.", show_default="seen")]
ColumnOption = Annotated[
    list[str] | None, typer.Option(help="A column by its name in the files: question=Problem. Repeat it.")
]
ReuseCheckOption = Annotated[
    Path | None,
    typer.Option(help="File of a second check of similar questions, fitted by `eval --suite cache --out FOLDER`."),
]


def chosen_bundle(bundle: Path | None) -> Path:
    """The given bundle, or else the newest one in `RUNS`."""
    if bundle is not None:
        own = RUNS / bundle / "bundle"
        if str(bundle) in PACKAGED and not bundle.exists() and own.is_dir():
            console.STDERR.print(
                f"cogumi: {bundle} is the model alone; the bundle built from it is {own}", soft_wrap=True
            )
        return bundle
    built = sorted(RUNS.glob("*/bundle/bundle.json"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise BundleError(f"there is no bundle in {RUNS}/; build one (cogumi build tiny), or name its folder")
    return built[-1].parent


def chosen_reading(layout: str | None, form: str | None, columns: list[str] | None) -> Reading:
    """How question files are read. Raises `CogumiError` for unknown names."""
    from cogumi.data.sources.question_files import Reading

    named = {}
    for text in columns or ():
        name, _, column = text.partition("=")
        if not name or not column:
            raise typer.BadParameter(f"'{text}' is not of the form question=Problem", param_hint="--column")
        named[name] = column
    return Reading(layout, form, named)


def chosen_engines(url: str | None, model: str | None) -> EngineFactory:
    """The engine factory: the bundle's own models, or `model` on the server at `url` as the base."""
    from cogumi.cascade.engines import llama_engines, remote_base

    if (url is None) != (model is None):
        raise CogumiError(
            "--base-url and --base-model must be given together: the server's address with /v1, and its model's name"
        )
    return remote_base(url, model) if url and model else llama_engines

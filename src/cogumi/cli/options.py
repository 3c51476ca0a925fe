"""Options that several commands share, and the bundle that is meant where none is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogumi.core.errors import BundleError, CogumiError

if TYPE_CHECKING:
    from cogumi.cascade.engines import EngineFactory

RUNS = Path("runs")
RunsOption = Annotated[Path, typer.Option(help="Folder that builds are kept in.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
BundleArgument = Annotated[
    Path | None, typer.Argument(help="Folder of a bundle, packed or not.", show_default="the newest runs/*/bundle")
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
RepackOption = Annotated[
    bool,
    typer.Option(help="Keep a second copy of the weights in the order in which this processor multiplies fastest."),
]
UnpackOption = Annotated[
    str | None,
    typer.Option(
        help="A packed bundle is unpacked once into the cache folder (`cached`), every time into a temporary folder "
        "(`eager`), or into the cache folder with modifiers only when they are used (`lazy`).",
        show_default="cached",
    ),
]
PlannedArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A built-in recipe's name or a YAML file; or a model alone: a known name such as Llama-3.2-1B, a "
        "folder, its config.json, or a GGUF file.",
    ),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option(help="Memory bandwidth of another machine, such as 50GB/s.", show_default="this one's, measured"),
]
AdapterMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory for modifiers, such as 500MB: those that are not answering are freed beyond it, the longest "
        "unused first.",
        show_default="no limit",
    ),
]
ModifiersOption = Annotated[
    Path | None,
    typer.Option(help="Folder out of which clients may add modifiers while it runs.", show_default="they may not"),
]
CacheOption = Annotated[
    str | None, typer.Option(help="Key-value cache: f16, q8_0 or q4_0.", show_default="q8_0 where it fits")
]
BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        help="A server with OpenAI's API (its address with /v1) that answers in place of the bundle's base; no answer "
        "counts as sure then."
    ),
]
BaseModelOption = Annotated[str | None, typer.Option(help="With --base-url: the name of its model.")]
ReuseOption = Annotated[
    str | None,
    typer.Option(
        help="Give sure answers again: to the same question (`exact`), to near ones (`static`), or only where "
        "near ones have proven to be the same (`verified`).",
        show_default="never",
    ),
]
ReuseCheckOption = Annotated[
    Path | None, typer.Option(help="A second check of near questions, fitted by `eval --suite cache --out FOLDER`.")
]


def chosen_bundle(bundle: Path | None) -> Path:
    """The bundle named, or the newest one that was built here."""
    if bundle is not None:
        return bundle
    built = sorted(RUNS.glob("*/bundle/bundle.json"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise BundleError(f"there is no bundle in {RUNS}/; build one: cogumi build tiny, or name its folder")
    return built[-1].parent


def chosen_engines(url: str | None, model: str | None) -> EngineFactory:
    """What opens the engines of a bundle: its own models, or the base on the server at `url`."""
    from cogumi.cascade.engines import llama_engines, remote_base

    if (url is None) != (model is None):
        raise CogumiError(
            "--base-url and --base-model go together: the server's address with /v1, and its model's name"
        )
    return remote_base(url, model) if url and model else llama_engines

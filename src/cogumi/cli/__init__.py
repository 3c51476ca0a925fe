"""The `cogumi` command: parses, calls, prints. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

from typing import Annotated

import typer

from cogumi import __version__, show
from cogumi.cli import build, measure, pack, run
from cogumi.errors import CogumiError

app = typer.Typer(
    name="cogumi",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


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


app.command()(build.build)
app.command()(build.demo)
app.command()(run.chat)
app.command()(run.serve)
app.command()(measure.inspect)
app.command(name="eval")(measure.evaluate)
app.command()(run.forget)
app.command()(pack.pack)
app.command()(pack.unpack)
app.command()(build.plan)
app.command()(build.vocabulary)
app.command()(measure.bench)


def main() -> None:
    """Run the command; an error of ours is one line and exit code 1."""
    try:
        app()
    except (CogumiError, OSError) as error:
        if _debug:
            raise
        show.print_error(error)
        raise SystemExit(1) from None

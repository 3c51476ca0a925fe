"""The `cogumi` command: parses arguments, calls the library, prints. Commands import heavy modules when they run."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from cogumi.cli import adopting, building, console, converting, data, keys, measuring, packing, running
from cogumi.core.errors import CogumiError
from cogumi.core.packages import missing
from cogumi.core.version import __version__

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
    """Build and run small local chat systems with calibrated confidence.

    Start with `cogumi demo`; continue with `cogumi chat`, `cogumi serve` or `cogumi inspect`.
    """
    global _debug
    _debug = debug


app.command()(building.build)
app.command()(building.demo)
app.command()(adopting.adopt)
app.command()(running.chat)
app.command()(running.serve)
app.command()(running.ui)
app.command()(measuring.inspect)
app.command(name="eval")(measuring.evaluate)
app.command()(running.personal)
app.command()(running.forget)
app.command()(packing.pack)
app.command()(packing.unpack)
app.command()(converting.convert)
app.command()(building.plan)
app.command()(building.vocabulary)
app.command()(measuring.bench)
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command. An error that the user can fix prints one line and exits with code 1; a warning is one line."""
    warnings.formatwarning = lambda message, *_, **__: f"cogumi: warning: {message}\n"
    try:
        app()
    except (CogumiError, OSError, ModuleNotFoundError) as error:
        if _debug:
            raise
        console.print_error(missing(error, "this command") if isinstance(error, ModuleNotFoundError) else error)
        raise SystemExit(1) from None

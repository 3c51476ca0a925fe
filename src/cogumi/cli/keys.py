"""Commands `keys ...`: API keys of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cogumi.cli import console
from cogumi.cli.options import JsonOption

app = typer.Typer(no_args_is_help=True, help="API keys of a server: add, list or revoke them.")

FileOption = Annotated[Path, typer.Option("--keys", help="File of the keys, as for `cogumi serve --keys FILE`.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the key: who uses it.")]


@app.command()
def add(
    name: NameArgument,
    keys: FileOption,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests allowed per minute.", show_default="any number")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompts and answers allowed per minute.", show_default="any number"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add a key and print it, once: the file has only its SHA-256. A running server accepts it at once.

    Example: `cogumi keys add anna --keys keys.json --requests 60 --tokens 20000`
    """
    from cogumi.serve.api_keys import KeyFile

    secret = KeyFile(keys).add(name, requests, tokens)
    if json:
        console.print_json({"name": name, "key": secret})
    else:
        print(secret)
        console.STDERR.print("Keep this key: it is not stored and cannot be shown again.")


@app.command(name="list")
def listed(keys: FileOption, json: JsonOption = False) -> None:
    """List the keys: name, first characters, day, limits."""
    from cogumi.serve.api_keys import KeyFile

    found = KeyFile(keys).listed()
    if json:
        console.print_json([key.model_dump(exclude={"sha256"}) for key in found])
        return
    table = Table("name", "key", "created", "requests/min", "tokens/min")
    for key in found:
        limits = ("-" if limit is None else f"{limit:,}" for limit in (key.requests, key.tokens))
        table.add_row(key.name, f"{key.prefix}...", key.created[:10], *limits)
    console.STDOUT.print(table)


@app.command()
def revoke(name: NameArgument, keys: FileOption) -> None:
    """Remove a key. A running server refuses it at once; answers that are running end as usual."""
    from cogumi.serve.api_keys import KeyFile

    KeyFile(keys).revoke(name)
    console.STDERR.print(f"{name}: revoked")

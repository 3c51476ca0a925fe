"""Commands that pack and unpack bundles: `pack`, `unpack`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cogumi.cli import console
from cogumi.cli.options import JsonOption
from cogumi.cli.progress import ByteProgress
from cogumi.core.amounts import size

COLUMNS = ("file", "size", "zstd", "with dictionary", "ratio")


def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of a bundle, or of a model.")],
    out: Annotated[Path, typer.Argument(help="New folder for its packed form.")],
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Try to store safetensors files without their zeros: for pruned models.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Pack a bundle with zstd, without loss; `chat`, `serve`, `inspect` and `eval` open it as it is.

    Quantized weights are close to random and hardly get smaller; the figures say what was won. A model's folder is
    packed to be kept: `unpack` brings it back. The manifest.json of the build that made a folder is left out.

    Example: `cogumi pack runs/tiny/bundle tiny.packed`
    """
    from cogumi.bundle.packed import staged
    from cogumi.compress.pack.archive import Config, pack_folder

    with staged(out, folder) as part, ByteProgress(f"packing {folder}") as bar:
        figures = pack_folder(folder, part, Config(sparse=sparse), bar.advanced)
    if json:
        console.emit(figures)
    else:
        _print(out, figures)


def unpack(
    packed: Annotated[Path, typer.Argument(help="Folder of a packed bundle.")],
    out: Annotated[Path, typer.Argument(help="New folder for its files.")],
    json: JsonOption = False,
) -> None:
    """Unpack a packed bundle: the same files, byte for byte.

    Example: `cogumi unpack tiny.packed tiny`
    """
    from cogumi.compress.pack import archive

    with ByteProgress(f"unpacking {packed}") as bar:
        count = archive.unpack(packed, out, bar.advanced)
    if json:
        console.emit({"out": str(out), "bytes": count})
    else:
        console.OUT.print(f"{out}: {size(count)}", soft_wrap=True, markup=False)


def _print(out: Path, figures: Mapping[str, Any]) -> None:
    """A row per file, the two forms that were tried, and what it came to."""
    rows = []
    for name, file in figures["files"].items():
        tried = file["with_dictionary_bytes"]
        forms = [size(file["plain_bytes"]), "-" if tried is None else size(tried)]
        rows.append([name, size(file["bytes"]), *forms, f"{file['ratio']:.3f}"])
    rows.append(["all", size(figures["bytes"]), "", "", f"{figures['ratio']:.3f}"])
    console.table(f"Packed in {out}: {size(figures['packed_bytes'])}", COLUMNS, rows)
    for name, file in figures.get("sparse", {}).items():
        kept = "stored without them" if file["packed_bytes"] < file["zstd_alone_bytes"] else "stored as it is"
        sizes = f"{size(file['packed_bytes'])} against {size(file['zstd_alone_bytes'])} with zstd alone"
        console.OUT.print(f"{name}: {file['zeros']:.1%} zeros, {sizes}: {kept}.", soft_wrap=True, markup=False)
    models = [file for name, file in figures["files"].items() if name.endswith(".gguf")]
    before, after = (sum(file[key] for file in models) for key in ("bytes", "packed_bytes"))
    if models:
        console.OUT.print(f"The models alone are {before / after:.3f} times smaller.")
    dictionary = figures["dictionary_bytes"]
    if dictionary:
        console.OUT.print(f"The dictionary takes {size(dictionary)}.")
    elif all(file["with_dictionary_bytes"] is None for file in figures["files"].values()):
        console.OUT.print("There is too little to learn a dictionary from.")
    else:
        console.OUT.print("The dictionary would have saved less than it takes: none is used.")

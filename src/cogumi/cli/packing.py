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
    folder: Annotated[Path, typer.Argument(help="Folder of a bundle or a model.")],
    out: Annotated[Path, typer.Argument(help="New folder for the packed files.")],
    sparse: Annotated[
        bool,
        typer.Option("--sparse", help="Store safetensors files without their zeros if smaller: for pruned models."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Compress a bundle losslessly with zstd; `chat`, `serve`, `inspect` and `eval` open packed bundles directly.

    Quantized weights are close to random and hardly shrink; the printed figures show the gain. A packed model folder
    is for storage: `unpack` restores it. The manifest.json of a build is not packed.

    Example: `cogumi pack runs/smollm2/bundle smollm2.packed`
    """
    from cogumi.bundle.packed import staged
    from cogumi.compress.pack.archive import Config, pack_folder

    with staged(out, folder) as part, ByteProgress(f"packing {folder}") as bar:
        figures = pack_folder(folder, part, Config(sparse=sparse), bar.advanced)
    if json:
        console.print_json(figures)
    else:
        _print(out, figures)


def unpack(
    packed: Annotated[Path, typer.Argument(help="Folder of a packed bundle.")],
    out: Annotated[Path, typer.Argument(help="New folder for the unpacked files.")],
    json: JsonOption = False,
) -> None:
    """Unpack a packed bundle; every file is restored byte for byte.

    Example: `cogumi unpack tiny.packed tiny`
    """
    from cogumi.compress.pack import archive

    with ByteProgress(f"unpacking {packed}") as bar:
        count = archive.unpack(packed, out, bar.advanced)
    if json:
        console.print_json({"out": str(out), "bytes": count})
    else:
        console.STDOUT.print(f"{out}: {size(count)}", soft_wrap=True, markup=False)


def _print(out: Path, figures: Mapping[str, Any]) -> None:
    """Print one row per file with the two encodings tried, and the totals."""
    rows = []
    for name, file in figures["files"].items():
        tried = file["with_dictionary_bytes"]
        forms = [size(file["plain_bytes"]), "-" if tried is None else size(tried)]
        rows.append([name, size(file["bytes"]), *forms, f"{file['ratio']:.3f}"])
    rows.append(["all", size(figures["bytes"]), "", "", f"{figures['ratio']:.3f}"])
    console.table(f"Packed in {out}: {size(figures['packed_bytes'])}", COLUMNS, rows)
    for name, file in figures.get("sparse", {}).items():
        kept = "stored without zeros" if file["packed_bytes"] < file["zstd_alone_bytes"] else "stored unchanged"
        sizes = f"{size(file['packed_bytes'])} against {size(file['zstd_alone_bytes'])} with zstd alone"
        console.STDOUT.print(f"{name}: {file['zeros']:.1%} zeros, {sizes}: {kept}.", soft_wrap=True, markup=False)
    models = [file for name, file in figures["files"].items() if name.endswith(".gguf")]
    before, after = (sum(file[key] for file in models) for key in ("bytes", "packed_bytes"))
    if models:
        console.STDOUT.print(f"Models alone: compression ratio {before / after:.3f}.")
    dictionary = figures["dictionary_bytes"]
    if dictionary:
        console.STDOUT.print(f"The dictionary takes {size(dictionary)}.")
    elif all(file["with_dictionary_bytes"] is None for file in figures["files"].values()):
        console.STDOUT.print("Too few small files to train a dictionary.")
    else:
        console.STDOUT.print("No dictionary is used: it would save less than its own size.")

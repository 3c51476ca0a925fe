"""Command `convert`: between a GGUF file and a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogumi.cli import console
from cogumi.cli.options import JsonOption
from cogumi.cli.progress import ByteProgress
from cogumi.core.amounts import size


def convert(
    model: Annotated[str, typer.Argument(help="A GGUF file, a Hugging Face folder, or a short name such as smollm2.")],
    out: Annotated[Path, typer.Argument(help="New folder for a GGUF file's weights, or new .gguf file for a folder.")],
    type: Annotated[
        str | None, typer.Option(help="Type of the GGUF file, such as q4_k_m.", show_default="q8_0")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Convert a GGUF file to a Hugging Face folder with fp32 weights, or a folder to a GGUF file; nothing is trained.

    The folder has the tokenizer, special tokens and chat template of the file, and gives the same answers. Anything
    that the other form cannot represent is said, or is the reason of a refusal.

    Example: `cogumi convert smollm2 models/smollm2`, `cogumi convert models/smollm2 smollm2.gguf --type q4_0`
    """
    from cogumi.compress.gguf.convert import convert_model
    from cogumi.core.model_files import locate_model

    path = locate_model(model, Path())
    with ByteProgress(f"converting {model}") as bar:
        figures = convert_model(path, out, type, bar.advanced)
    if json:
        console.print_json(figures)
    else:
        line = f"{out}: {figures['parameters']:,} weights as {figures['type']}, {size(figures['bytes'])}"
        console.STDOUT.print(line, soft_wrap=True, markup=False)

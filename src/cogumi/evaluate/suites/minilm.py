"""The sentence encoder used by suites, exported once per machine."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from cogumi.core.environment import cache_folder
from cogumi.engine.embedder import MODEL, TOKENIZER, Embedder
from cogumi.models.encoder import DEFAULT, export_encoder, load_encoder


def cached_embedder() -> Embedder:
    """all-MiniLM-L6-v2 in int8; the first call exports it to the user's cache folder (ten seconds).

    Raises `RecipeError` if the model is not installed.
    """
    folder = cache_folder() / f"{DEFAULT}-int8"
    if not (folder / MODEL).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            made = Path(place) / "made"
            made.mkdir()
            export_encoder(*load_encoder(DEFAULT, Path()), made / MODEL, made / TOKENIZER, int8=True)
            with suppress(OSError):  # another process was faster
                made.rename(folder)
    return Embedder(folder)

"""A vocabulary without some single bytes, as that of SmolLM2: its training text had none of them."""

import json
from pathlib import Path

from cogumi.models.tokenization import BYTE_OF

MISSING = (0x04, 0x13, 0xC0, 0xF1, 0xFF)


def without_bytes(folder: Path) -> Path:
    """Remove the tokens of the `MISSING` bytes from a folder's tokenizer; ids of other tokens stay."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    for character, byte in BYTE_OF.items():
        if byte in MISSING:
            del document["model"]["vocab"][character]
    path.write_text(json.dumps(document))
    return folder
